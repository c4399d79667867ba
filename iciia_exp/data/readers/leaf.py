"""LEAF JSON: users, each with a list ``x`` and a list ``y``, in the folders train and test.

    {"users": [user, ...], "num_samples": [n, ...], "user_data": {user: {"x": [...], "y": [...]}, ...}}

Source: S. Caldas et al., "LEAF: A Benchmark for Federated Settings", arXiv:1812.01097,
https://github.com/TalwalkarLab/leaf.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from iciia_exp.data.dataset import wrong_folder
from iciia_exp.errors import UserError, first_line

__all__ = ["LEAF_SPLITS", "describe_files", "find_data", "list_files", "read_users"]

#: LEAF's folders, which are the dataset's splits.
LEAF_SPLITS = ("train", "test")

T = TypeVar("T")


def find_data(root: Path, tree: str) -> Path:
    """Return the folder that holds train and test: the given one, or data below it, as in a checkout of LEAF.

    Raises:
        UserError: there is no such folder; ``tree`` is what it should look like.
    """
    for folder in (root, root / "data"):
        if all((folder / split).is_dir() for split in LEAF_SPLITS):
            return folder
    lacking = [split for split in LEAF_SPLITS if not (root / split).is_dir()]
    raise wrong_folder(root, f"has no folder {lacking[0]}, nor has its folder data", tree)


def list_files(data: Path, tree: str) -> list[tuple[str, Path]]:
    """Return split and path of every JSON file, train first, each sorted by name; both splits have some."""
    files = [(split, path) for split in LEAF_SPLITS for path in sorted((data / split).glob("*.json"))]
    for split in LEAF_SPLITS:
        if split not in {s for s, _ in files}:
            raise wrong_folder(data / split, "has no .json file", tree)
    return files


def describe_files(files: list[tuple[str, Path]]) -> list[list[Any]]:
    """Return split, name and size in bytes of every file: what tells one sampling of LEAF from another, cheaply."""
    return [[split, path.name, path.stat().st_size] for split, path in files]


@dataclass(frozen=True)
class _Packed:
    """What became of a user's data: a value, or why there is none."""

    count: int
    value: Any = None
    problem: str | None = None


def read_users(path: Path, pack: Callable[[list[Any], list[Any]], T]) -> dict[str, T]:
    """Return what ``pack(x, y)`` makes of the data of every user in a file, in the file's order.

    It is called as soon as a user is read, so that only one user's numbers are ever in memory as Python objects, beside
    the text of the file.

    Args:
        path: the file.
        pack: takes the lists of a user, which are of the same length; raises `ValueError` for what it cannot use.

    Raises:
        UserError: the file is not LEAF's JSON, or ``pack`` raised; names the file and the user.
    """

    def packed(item: dict[str, Any]) -> Any:
        if not ("x" in item and "y" in item):
            return item
        x, y = item["x"], item["y"]
        if not (isinstance(x, list) and isinstance(y, list)):
            return _Packed(0, problem="x and y must be lists")
        if len(x) != len(y):
            return _Packed(0, problem=f"x has {len(x)} entries, y has {len(y)}")
        try:
            return _Packed(len(x), pack(x, y))
        except ValueError as error:
            return _Packed(0, problem=str(error))

    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_hook=packed)
    except (ValueError, RecursionError) as error:  # JSON errors and wrong encodings are ValueErrors
        raise UserError(f"{path}: not valid JSON, or cut off ({first_line(error)}); make or copy it again") from error
    users, user_data = (content.get(k) if isinstance(content, dict) else None for k in ("users", "user_data"))
    if not (isinstance(users, list) and isinstance(user_data, dict)):
        raise UserError(f"{path}: has no users and user_data, so it is not one of LEAF's files")
    counts = content.get("num_samples")
    counts = counts if isinstance(counts, list) and len(counts) == len(users) else [None] * len(users)
    values: dict[str, T] = {}
    for user, count in zip(users, counts, strict=True):
        if user not in user_data:
            raise UserError(f"{path}: user {user} is in users, but not in user_data; make or copy the file again")
        if user in values:
            raise UserError(f"{path}: user {user} is twice in users")
        own = user_data[user]
        if not isinstance(own, _Packed):
            raise UserError(f"{path}: user {user}: has no x and y")
        if own.problem is not None:
            raise UserError(f"{path}: user {user}: {own.problem}")
        if count is not None and count != own.count:
            raise UserError(f"{path}: user {user}: num_samples says {count}, x and y have {own.count} entries")
        values[user] = own.value
    return values
