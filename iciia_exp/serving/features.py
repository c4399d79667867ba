"""Features as an application has them: tensors, arrays and lists become float32 tensors; the rest is refused."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iciia_exp.errors import UserError
from iciia_exp.methods.base import Method

__all__ = ["all_finite", "as_arrays", "as_features", "as_mask", "check_answers", "check_features", "numeric"]


def numeric(value: Any) -> bool:
    """Return whether a value is a tensor or array of numbers."""
    if isinstance(value, Tensor):
        return not value.is_complex()
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub"


def _of_numbers(value: Any) -> bool:
    """Return whether nested lists hold numbers or arrays; NumPy would also turn pictures into numbers."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, int | float | np.generic) or numeric(value)


def as_features(value: Any, who: str, shape: str) -> Tensor:
    """Return features as a float32 tensor on the CPU, which shares no memory with an array of another layout.

    Args:
        value: tensor or array of numbers of any type and layout, or nested lists of numbers.
        who: client or function, for the error.
        shape: that is expected, for the error.
    """
    if isinstance(value, list | tuple) and value and all(isinstance(part, Tensor) for part in value):
        value = torch.stack(list(value)) if len({part.shape for part in value}) == 1 else value
    elif isinstance(value, list | tuple) and _of_numbers(value):
        with contextlib.suppress(ValueError):  # of different lengths
            value = np.asarray(value)
    if not numeric(value):
        got = type(value).__name__
        if isinstance(value, np.ndarray):
            got = f"{got} of {value.dtype}"
        elif isinstance(value, list | tuple) and value:
            got = f"{got} of {type(value[0]).__name__}"
        hint = "for images use the features of run.load_backbone(), or a session with backbone=, image by image"
        raise UserError(f"{who}: expected features, numbers {shape}, got {got}; {hint}")
    if isinstance(value, np.ndarray):  # also big-endian, read-only or with negative strides, which torch refuses
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
            value = torch.from_numpy(np.require(value, np.float32, ["C", "W"]))
    return value.detach().cpu().float()


def as_mask(mask: Any, x_CSD: Tensor) -> Tensor:
    """Return a mask as bool [C, S], from bools or numbers 0 and 1."""
    try:
        found = torch.as_tensor(mask, device=x_CSD.device)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.shape != x_CSD.shape[:2]:
        got = list(found.shape) if found.numel() else type(mask).__name__
        raise UserError(f"predict: mask is {got}, the images are {list(x_CSD.shape[:2])}")
    if not ((found == 0) | (found == 1)).all():
        raise UserError("predict: mask is True where an image is real, and False where it is padding")
    return found.bool()


def all_finite(values: Tensor) -> bool:
    """Return whether all numbers are finite; a sum, which reads them once, mostly says so."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def check_features(x_CD: Tensor, clients: Sequence[str], dim: int, finite: bool = True) -> Tensor:
    """Return the features; the error names the first client with features of a wrong shape or not finite."""
    if x_CD.ndim != 2 or x_CD.shape[1] != dim:
        raise UserError(f"{clients[0]}: features have shape {list(x_CD.shape[1:])}, the run wants [{dim}]")
    if finite and not all_finite(x_CD):
        raise UserError(f"{clients[int(x_CD.isfinite().all(1).int().argmin())]}: features are not finite numbers")
    return x_CD


def check_answers(who: str, *tensors: Tensor) -> None:
    """Raise a `UserError` if an answer or a new state is not finite."""
    if not all(map(all_finite, tensors)):
        problem = "the answer is not finite: the features are too large for the method; are they those of the run?"
        raise UserError(f"{who}: {problem}")


def as_arrays(
    given: Mapping[str, Any],
    method: Method,
    shapes: Mapping[str, Sequence[int]],
    x_CSD: Tensor,
    who: str = "predict",
) -> dict[str, Tensor]:
    """Return what a method reads beside the features, float32 [C, S, ...] each.

    Args:
        given: arrays by name; those of one client without C.
        method: names what it reads.
        shapes: of one image, by name.
        x_CSD: the features.
        who: function, for errors.

    Raises a `UserError` for an array that is missing, of another shape, or not finite.
    """
    found = {}
    for name in sorted(method.reads - {"features"}):
        shape = (*x_CSD.shape[:2], *shapes[name])
        if name not in given:
            raise UserError(f"{method.name}: reads {name}; give arrays={{{name!r}: ...}}, {list(shape)}")
        values = as_features(given[name], who, f"{name} {list(shape)}")
        if values.numel() != math.prod(shape) or not values.isfinite().all():
            raise UserError(f"{who}: {name} must be finite numbers {list(shape)}, got {list(values.shape)}")
        found[name] = values.reshape(shape)
    return found
