"""Dropout at a third of its cost on a CPU.

PyTorch draws a number of its own for every value, on one thread: with many groups that is a quarter of a training step
of ICIIA. Here a 64-bit number decides for four values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Dropout", "drop"]

_STEPS = 1 << 16  # of 16 random bits


def drop(x: Tensor, p: float) -> Tensor:
    """Return ``x`` with a share ``p`` of its values, each by chance, set to 0 and the others divided by 1 - p.

    As `torch.nn.functional.dropout` does, from PyTorch's generator; on a processor ``p`` is rounded to 1/65536.
    """
    kept = round((1 - p) * _STEPS)
    if x.device.type != "cpu" or not 0 < kept < _STEPS or torch.compiler.is_compiling():
        return F.dropout(x, p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    mask = words.view(torch.int16)[: x.numel()].view(x.shape) < kept - _STEPS // 2
    return x * mask.to(x.dtype).mul_(_STEPS / kept)


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` by `drop`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, in training without some of its values."""
        return drop(x, self.p) if self.training else x
