"""Dropout at a third of PyTorch's cost on a CPU.

PyTorch draws a random number for every value, on one thread: with many groups that is a quarter of a training step of
ICIIA. Here a 64-bit number decides for four values.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Dropout", "drop"]

_STEPS = 1 << 16  # of 16 random bits


def drop(x: Tensor, p: float) -> Tensor:
    """Set each value to 0 with probability ``p`` and divide the others by 1 - p, as `torch.nn.functional.dropout`.

    Random numbers are PyTorch's; on a CPU ``p`` is rounded to a multiple of 1/65536.
    """
    kept = round((1 - p) * _STEPS)
    if x.device.type != "cpu" or not 0 < kept < _STEPS or torch.compiler.is_compiling():
        return F.dropout(x, p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    steps = words.view(torch.int16)[: x.numel()].view(x.shape)
    # comparing as floats, in place, is four times as fast as making booleans and then floats of them
    scale = steps.to(torch.float32).lt_(kept - _STEPS // 2).to(x.dtype).mul_(_STEPS / kept)
    return x * scale


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` that computes with `drop`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``; in training, after `drop`."""
        return drop(x, self.p) if self.training else x
