"""Payloads: tokens as numbers of fewer bytes.

``int8`` has a scale for each token, its largest magnitude / 127: class tokens and patches differ by an order of
magnitude.

Legend: n tokens, d features of a token.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

__all__ = ["PAYLOADS", "pack", "packed_bytes", "unpack"]

PAYLOADS = ("float32", "float16", "int8")


def pack(tokens: Tensor, form: str) -> tuple[Tensor, ...]:
    """Return tokens [..., n, d] as they are sent: one tensor, or with ``int8`` values and scales [..., n]."""
    if form == "int8":
        scale = tokens.abs().amax(-1).float() / 127
        values = (tokens / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().to(torch.int8)
        return values, scale
    return (tokens.to(getattr(torch, form)),)


def unpack(packed: tuple[Tensor, ...]) -> Tensor:
    """Return the tokens as they are received, float32 [..., n, d]."""
    if len(packed) == 1:
        return packed[0].float()
    values, scale = packed
    return values.float() * scale[..., None]


def packed_bytes(shape: Sequence[int], form: str) -> int:
    """Return the bytes of tokens of a shape [..., n, d].

    >>> packed_bytes((197, 768), "float16"), packed_bytes((197, 768), "int8")
    (302592, 152084)
    """
    size = {"float32": 4, "float16": 2, "int8": 1}[form]
    return prod(shape) * size + (4 * prod(shape[:-1]) if form == "int8" else 0)
