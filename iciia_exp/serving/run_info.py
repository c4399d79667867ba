"""Contents of ``run.json``, checked before anything is built from them."""

import re
from pathlib import Path
from typing import Any

from iciia_exp.errors import UserError
from iciia_exp.tasks import TASKS

__all__ = ["FORMAT", "checked_info"]

FORMAT = 2

# Of classes, features, and images of a chunk; a damaged file could ask for all memory.
_LARGEST = 1_000_000

_OLD = "it was made by an older version of this package; repeat its command to make it again"


def checked_info(info: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the contents of ``run.json`` if format and values are valid; the `UserError` names a wrong key."""
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise UserError(f"{path}: format {found}, this version reads {FORMAT}; {_OLD}")

    def require(key: str, right: bool, want: str) -> None:
        if not right:
            raise UserError(f"{path}: {key}: expected {want}; repeat the run's command to make it again")

    for key in ("dim", "num_classes", "images"):
        require(key, _whole(info.get(key)), f"a whole number of 1 to {_LARGEST:,}")
    require("task", isinstance(info.get("task"), str) and info["task"] in TASKS, f"one of {', '.join(TASKS)}")
    names = info.get("class_names")
    right = isinstance(names, list) and len(names) == info["num_classes"] and all(map(_text, names))
    require("class_names", right, f"a list of {info['num_classes']} names")
    require("features", _folder_name(info.get("features")), "the name of a folder")
    right = isinstance(shapes := info.get("arrays", {}), dict) and all(map(_sizes, shapes.values()))
    require("arrays", right, f"lists of whole numbers of 1 to {_LARGEST:,}")
    require("method", isinstance(info.get("method"), dict), "an object with name and arguments")
    require("backbone", "backbone" in info, "an object, or null")
    if (backbone := info["backbone"]) is not None:
        keys = {"name", "train", "model", "pretrained", "classes", "folder", "weights"}
        right = isinstance(backbone, dict) and set(backbone) - {"arguments"} == keys
        require("backbone", right, f"an object with {', '.join(sorted(keys))}")
        right = isinstance(more := backbone.get("arguments", {}), dict) and all(map(_argument, more, more.values()))
        require("backbone.arguments", right, f"whole numbers of 0 to {_LARGEST:,}, or lists of them; pairs of texts")
        require("backbone.name", _text(backbone["name"]), "text")
        require("backbone.train", backbone["train"] in ("all", "head", "none"), "all, head or none")
        require("backbone.pretrained", isinstance(backbone["pretrained"], bool), "true or false")
        folder, file, classes = backbone["folder"], backbone["weights"], backbone["classes"]
        require("backbone.folder", folder is None or _folder_name(folder), "the name of a folder")
        right = isinstance(file, dict) and set(file) == {"file", "digest"} and all(map(_text, file.values()))
        require("backbone.weights", file is None or right, "a file's name and digest")
        right = _folder_name(classes) or (isinstance(classes, list) and all(map(_text, classes)))
        require("backbone.classes", classes is None or right, "the name of a list of classes, or a list of names")
    return info


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


def _argument(name: str, value: Any) -> bool:
    """Whether a value is what a dataset tells a backbone: numbers, or the pairs of texts that judge pictures."""
    if name == "alignment":
        return isinstance(value, bool)
    if name == "pairs":
        texts = list(value.values()) if isinstance(value, dict) else [None]
        return all(isinstance(pair, list) and len(pair) == 2 and all(map(_text, pair)) for pair in texts)
    return _numbers(value)


def _numbers(value: Any) -> bool:
    """Whether a value is a whole number, or a list of such numbers or lists."""
    return (
        all(map(_numbers, value)) if isinstance(value, list) else _whole(value) or (value == 0 and value is not False)
    )


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _folder_name(value: Any) -> bool:
    """Whether a value is the name of a folder, without a path."""
    return isinstance(value, str) and re.fullmatch(r"[\w\-][\w.\-]*", value) is not None
