"""LEAF JSON: users, each with a list ``x`` and a list ``y``, in the folders train and test.

    {"users": [user, ...], "num_samples": [n, ...], "user_data": {user: {"x": [...], "y": [...]}, ...}}

Source: S. Caldas et al., "LEAF: A Benchmark for Federated Settings", arXiv:1812.01097,
https://github.com/TalwalkarLab/leaf.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from iciia_exp.data.dataset import wrong_folder
from iciia_exp.errors import UserError, first_line

__all__ = ["describe_files", "find_data", "list_files", "read_users"]

#: LEAF's folders, and the splits of the dataset.
_SPLITS = ("train", "test")

# all_data_<shard>_niid_<fraction>_keep_<least>_train_<percent>, as LEAF names its files
_LEAF_NAME = re.compile(r"(.*?)_\d+_((?:n?iid)_.*?)_(?:train|test)_\d+")

T = TypeVar("T")


def find_data(root: Path, tree: str) -> Path:
    """Return the folder with train and test: the given folder, or data in it, as in a checkout of LEAF."""
    for folder in (root, root / "data"):
        if all((folder / split).is_dir() for split in _SPLITS):
            return folder
    missing = next(split for split in _SPLITS if not (root / split).is_dir())
    raise wrong_folder(root, f"has no folder {missing}, nor has its folder data", tree)


def list_files(data: Path, tree: str) -> list[tuple[str, Path]]:
    """Return split and path of every JSON file, train first, each split sorted by name and not empty.

    Raises a `UserError` if the files' names are those of several samplings by LEAF.
    """
    files = []
    for split in _SPLITS:
        if not (paths := sorted((data / split).glob("*.json"))):
            raise wrong_folder(data / split, "has no .json file", tree)
        files += [(split, path) for path in paths]
    samplings: dict[str, Path] = {}
    for _, path in files:
        if match := _LEAF_NAME.fullmatch(path.stem):
            samplings.setdefault("".join(match.groups()), path)
    if len(samplings) > 1:
        names = " and ".join(f"{path.parent.name}/{path.name}" for path in list(samplings.values())[:2])
        raise UserError(f"{data}: has files of {len(samplings)} samplings ({names}); delete those of all but one")
    return files


def describe_files(files: list[tuple[str, Path]]) -> list[list[Any]]:
    """Return split, name and size in bytes of every file, which identify a sampling of LEAF cheaply."""
    return [[split, path.name, path.stat().st_size] for split, path in files]


def read_users(path: Path, pack: Callable[[list[Any], list[Any]], T]) -> dict[str, T]:
    """Return ``pack(x, y)`` of every user in a file, in the file's order.

    ``pack`` gets the two lists of a user, of the same length, as soon as they are read, so that the numbers of only one
    user are in memory as Python objects, in addition to the text of the file. It raises `ValueError` for invalid data.

    Raises `UserError`, with the file and the user, for invalid data and for a file that is not LEAF's JSON.
    """

    def packed(item: dict[str, Any]) -> Any:
        """Return the number of a user's entries, and the packed data or an error."""
        if not ("x" in item and "y" in item):
            return item
        x, y = item["x"], item["y"]
        if not (isinstance(x, list) and isinstance(y, list)):
            return 0, ValueError("x and y must be lists")
        if len(x) != len(y):
            return 0, ValueError(f"x has {len(x)} entries, y has {len(y)}")
        try:
            return len(x), pack(x, y)
        except ValueError as error:
            return 0, error

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
        if not isinstance(user_data[user], tuple):
            raise UserError(f"{path}: user {user}: has no x and y")
        entries, value = user_data[user]
        if isinstance(value, ValueError):
            raise UserError(f"{path}: user {user}: {value}")
        if count is not None and count != entries:
            raise UserError(f"{path}: user {user}: num_samples says {count}, x and y have {entries} entries")
        values[user] = value
    return values
