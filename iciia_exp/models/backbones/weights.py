"""Weights of backbones: files, downloads, and the rows of a classifier that a dataset needs."""

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from iciia_exp.errors import ConfigError, UserError, first_line

__all__ = ["class_rows", "fetched", "read_weights"]

T = TypeVar("T")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read weights from a .safetensors file, or from tensors saved by `torch.save` (also under ``state_dict``).

    Raises a `UserError` if there is no such file, or none with named tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError("weights", path, "no such file; give a .safetensors, .pt or .pth file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model", "model_state_dict"):
            if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
                state = state[key]
        items = state.items() if isinstance(state, Mapping) else ()
        state = {str(k).removeprefix("module."): v for k, v in items if isinstance(v, Tensor)}
    except Exception as error:
        problem = "not a .safetensors file, nor tensors saved by torch.save; files with other objects are not read"
        raise UserError(f"{path}: cannot be read as weights ({problem})") from error
    if not state:
        raise UserError(f"{path}: holds no tensors by name")
    return state


def known_classes(classes: str | Sequence[str]) -> list[str]:
    """Return class names from a list, a text file, or timm's list of that name (wnids for ImageNet)."""
    if not isinstance(classes, str):
        return list(classes)
    if (file := Path(classes).expanduser()).is_file():
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return listed_classes(classes)


def listed_classes(classes: str) -> list[str]:
    """Return the class names of timm's list of that name. Raises a `ConfigError` if there is none."""
    from timm.data import ImageNetInfo

    try:
        return list(ImageNetInfo(classes).label_names())
    except (AssertionError, KeyError, ValueError, FileNotFoundError) as error:
        raise ConfigError("classes", classes, "must be a text file of class names, or imagenet-1k") from error


def class_rows(
    classes: str | Sequence[str] | None, outputs: int, wanted: Sequence[str], needed: bool
) -> list[int] | None:
    """Return the rows of a classifier for the dataset's classes ``wanted``, in their order.

    ``classes`` names the classifier's ``outputs`` (`known_classes`). None means that the classifier fits as it is, or
    that it cannot be used; with ``needed`` the latter raises a `ConfigError` with the remedy.
    """
    if classes is None:
        if outputs == len(wanted) or not needed:
            return None
        problem = f"the weights know {outputs} classes, the dataset has {len(wanted)}; name the weights' classes"
        raise ConfigError(
            "classes", "null", f"{problem}, or use backbone.train=head to fit a classifier on the dataset"
        )
    names = known_classes(classes)
    if len(names) != outputs:
        raise ConfigError("classes", classes, f"has {len(names)} names, the weights know {outputs} classes")
    number = {name: i for i, name in enumerate(names)}
    unknown = [name for name in wanted if name not in number]
    twice = [name for name in wanted if names.count(name) > 1] if len(number) < len(names) else []
    if needed and twice:
        raise ConfigError("classes", classes, f"has {twice[0]!r} more than once; give names that differ")
    if not unknown and not twice:
        return [number[name] for name in wanted]
    if needed:
        problem = f"{len(unknown)} of the dataset's {len(wanted)} classes are not among them, {unknown[0]!r} first"
        raise ConfigError("classes", classes, f"{problem}; use backbone.train=head to fit a classifier")
    return None


def fetched(load: Callable[[], T], what: str, host: str, bring: str) -> T:
    """Return ``load()``, which may download; if it fails, raise a `UserError` with the remedy.

    Args:
        load: reads the weights from the library's cache or the network.
        what: the weights in words.
        host: of the download; looked up first, because some libraries try for a minute.
        bring: the file to get, and its place.
    """
    try:
        if not any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
            socket.getaddrinfo(host, 443)
        return load()
    except Exception as error:
        problem = f"cannot be read from the cache or downloaded ({first_line(error)})"
        raise UserError(f"{what}: {problem}; {bring}") from error
