"""Digests: names of artifacts from the plain values that made them."""

import hashlib
import json
from pathlib import Path
from typing import Any

__all__ = ["digest", "file_digest"]


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)  # lr=1 and lr=1.0 are one run
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a digest takes plain values, not {type(value).__name__}: {value!r}")


def digest(value: Any, length: int = 12) -> str:
    """Return ``length`` hexadecimal digits that depend on the content of ``value`` and not on the order of its keys.

    >>> digest({"a": 1, "b": 2.0}) == digest({"b": 2, "a": 1.0})
    True
    >>> digest({"seed": 0}) == digest({"seed": None})
    False
    """
    text = json.dumps(_canonical(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def file_digest(path: Path, length: int = 12) -> str:
    """Return the first ``length`` hexadecimal digits of the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:length]
