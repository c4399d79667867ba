"""Payloads: tokens, and weights of a network, as numbers of fewer bytes.

``int8`` has a scale for each token, its largest magnitude / 127: class tokens and patches differ by an order of
magnitude. Of weights, each row of a matrix and each filter has a scale, and vectors (biases, norms) stay float32.

Legend: n tokens, d features of a token.
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

__all__ = ["PAYLOADS", "pack", "pack_weights", "packed_bytes", "packed_weights_bytes", "unpack", "unpack_weights"]

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


def _form_of(tensor: Tensor, form: str) -> str:
    """Return how a tensor of a network is sent: vectors have no rows to scale."""
    return "float32" if form == "int8" and tensor.ndim < 2 else form


def _rows(tensor: Tensor) -> Tensor:
    """Return the rows of a matrix, or the filters, [rows, numbers]; a vector as it is."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor


def pack_weights(weights: Mapping[str, Tensor], form: str) -> dict[str, tuple[Tensor, ...]]:
    """Return the weights of a network as they are sent: of each a tensor, or with ``int8`` values and scales."""
    packed: dict[str, tuple[Tensor, ...]] = {}
    for name, tensor in weights.items():
        values, *scale = pack(_rows(tensor), _form_of(tensor, form))
        packed[name] = (values.view(tensor.shape), *scale)
    return packed


def unpack_weights(packed: Mapping[str, tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Return the weights as they are received, float32."""
    return {name: unpack((_rows(values), *scale)).view(values.shape) for name, (values, *scale) in packed.items()}


def packed_weights_bytes(weights: Mapping[str, Tensor], form: str) -> int:
    """Return the bytes of the weights of a network."""
    return sum(packed_bytes(_rows(tensor).shape, _form_of(tensor, form)) for tensor in weights.values())
