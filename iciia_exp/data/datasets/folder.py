"""Image folder: class folders, with or without split folders above them, and optionally a table beside them.

This is how to bring data of one's own. The table (CSV, one row per image) adds what folders cannot say, such as who
owns an image, and decides wherever it says something.
"""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from PIL import Image

from iciia_exp.data.dataset import ImageDataset, existing_root, table_digest, wrong_folder
from iciia_exp.data.readers.files import existing_file, few, list_folders, list_images, open_image
from iciia_exp.data.readers.metadata import check_shares, image_table, parse_times, read_metadata
from iciia_exp.data.readers.parents import PARENTS_FORM, read_parents
from iciia_exp.errors import UserError, check_int

__all__ = ["Folder"]

log = logging.getLogger(__name__)

TREE = """<class>/<image>.jpg
or, already split,
train/<class>/<image>.jpg
val/<class>/<image>.jpg (test images, where there is no test folder)
test/<class>/<image>.jpg
or images anywhere, with a CSV table of their path, label and split"""

CSV_FORM = "a CSV table with a column path and any of label, owner, split, parent, time"

# Names of split folders, in lower case.
_VAL = ("val", "valid", "validation")
_SPLIT_FOLDERS = ("backbone", "train", "selection", *_VAL, "test")

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


class Folder(ImageDataset):
    """Images in class folders, in the layouts of `TREE`.

    An image in a deeper folder belongs to the class folder above. Split folders are train, test, val, backbone,
    and val (valid, validation), which is for val where there is a test folder and is the test split otherwise.
    Where neither folders nor table give splits, images are split by ``shares``: within each class, or, where the table
    gives owners, owner by owner, so that no owner is on two sides.

    Args:
        root: folder of the images.
        csv: table by path, or by its name within ``root``; None does without. Columns: ``path`` (relative to ``root``)
            and any of ``label``, ``owner``, ``split``, ``parent`` (texts) and ``time`` or ``timestamp`` (seconds, or
            ISO dates). It decides where it says something; where a cell is empty or a column is missing, the folders
            do. Images that it lacks are left out.
        parents: CSV table of parent categories by class (`iciia_exp.data.readers.parents`); a parent in ``csv``
            comes first.
        shares: shares of the splits, summing to one, where the data has none; train, test and any of val and
            backbone.
        seed: seed of that split.
    """

    name = "folder"
    # what they say is in the table, and the table in the fingerprint
    cosmetic: ClassVar[frozenset[str]] = frozenset({"root", "csv", "parents", "shares", "seed"})

    def __init__(
        self,
        root: str | Path | None,
        csv: str | Path | None = None,
        parents: str | Path | None = None,
        shares: Mapping[str, float] = SHARES,
        seed: int = 0,
    ) -> None:
        self.root = existing_root(root, "your images", TREE)
        if csv is not None and (self.root / csv).is_file():
            csv = self.root / csv
        self.csv = None if csv is None else existing_file("csv", csv, f"{CSV_FORM}, by path or by name within root")
        self.parents = None if parents is None else existing_file("parents", parents, PARENTS_FORM)
        self.shares = check_shares(shares)
        self.seed = check_int("seed", seed, 0)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the K classes, sorted; by value where all are whole numbers."""
        return self._data[1]

    def load_table(self) -> pd.DataFrame:
        """Return the images in the order of their paths, with ``time`` where the table gives it."""
        return self._data[0]

    def __getitem__(self, index: int) -> Image.Image:
        """Return one image as RGB, in its own size."""
        return open_image(self.root / self.path(index))

    def fingerprint(self) -> Any:
        """Return a digest of the table, which files there are and all that is known about them, and the classes."""
        return [table_digest(self.table), *self.class_names]

    @cached_property
    def _data(self) -> tuple[pd.DataFrame, tuple[str, ...]]:
        where = self.csv or self.root
        found = list_images(self.root)
        if not found:
            raise wrong_folder(self.root, "has no images", TREE)
        given = pd.DataFrame({"path": found}, dtype=object) if self.csv is None else self._read_table(self.csv, found)
        given = given.sort_values("path", ignore_index=True)  # the order of a table's rows changes no number
        time = given.pop("time") if "time" in given else None
        splits, labels = self._read_folders(given["path"])
        for column, folders in (("label", labels), ("split", splits)):
            given[column] = _fill(given, column, folders)
            if len(lost := given["path"][given[column].isna()]) and (column == "label" or len(lost) < len(given)):
                hint = (
                    f"use {'class' if column == 'label' else column} folders, or give all in a table's column {column}"
                )
                raise wrong_folder(where, f"{len(lost)} images have no {column} ({few(lost)}); {hint}", TREE)
        if given["split"].isna().all():
            del given["split"]
        if len(classes := set(given["label"])) < 2:
            raise wrong_folder(where, f"has a single class ({few(classes)}), at least 2 are needed", TREE)
        table, class_names = image_table(given, self.shares, self.seed, where)
        if untrained := set(table["label"]) - set(table["label"][table["split"] == "train"]):
            log.warning("%s: no train images of %s", where, few(class_names[i] for i in sorted(untrained)))
        if self.parents is not None:
            parents = np.array(read_parents(self.parents, class_names), dtype=object)
            table["parent"] = _fill(table, "parent", parents[table["label"]])
        if time is not None:
            table["time"] = time
        return table, class_names

    def _read_table(self, file: Path, found: list[str]) -> pd.DataFrame:
        """Return the table that the user gave, checked; ``time`` in seconds, the other columns texts or None."""
        table = read_metadata(file, required=("path",), extra=("path",))
        given = table["path"].str.replace("\\", "/")
        path = given.map(posixpath.normpath).astype(object)
        if len(outside := table["path"][path.str.startswith(("/", "../"))]):
            raise UserError(f"{file}: every path must be relative to {self.root} and lie in it ({few(outside)})")
        if (twice := path.duplicated()).any():
            raise UserError(f"{file}: has {twice.sum()} paths twice ({few(path[twice])})")
        table["path"] = path
        files = set(found)
        missing = [p for p in path if p not in files and not (self.root / p).is_file()]
        if len(missing) == len(table):
            raise UserError(f"{file}: none of its {len(table)} images is in {self.root} ({few(missing)})")
        if missing:  # extraction reports them, with those that cannot be decoded
            log.warning("%s: %d of %d images are missing (%s)", file, len(missing), len(table), few(missing))
        if left_out := sorted(files - set(path)):
            log.info("%s lacks %d images of %s, left out (%s)", file, len(left_out), self.root, few(left_out))
        if "time" in table:
            table["time"] = parse_times(table["time"], file)
        return table

    def _read_folders(self, paths: pd.Series) -> tuple[np.ndarray, np.ndarray]:
        """Return what the folders say about images: split and class, None where they say nothing."""
        tops = list_folders(self.root)
        # "train" alone may well be a class
        known = {top: top.lower() for top in tops if top.lower() in _SPLIT_FOLDERS}
        split = "train" in known.values() and len(known) > 1
        if split and "test" not in known.values():
            known = {top: "test" if name in _VAL else name for top, name in known.items()}
        level = 1 if split else 0
        parts = [p.split("/") for p in paths]
        splits = np.array([known.get(p[0]) if split else None for p in parts], dtype=object)
        classes = np.array([p[level] if len(p) > level + 1 else None for p in parts], dtype=object)
        if self.csv is None:  # a table may have its own idea of classes
            if split and (strange := [t for t in tops if t not in known]):
                raise wrong_folder(self.root, f"has {few(strange)} beside the split folders {', '.join(known)}", TREE)
            if split and "test" not in known.values():
                raise wrong_folder(self.root, f"has the split folders {', '.join(known)} and none for test", TREE)
            folders = [f"{t}/{c}" for t in tops for c in list_folders(self.root / t)] if split else tops
            if empty := sorted(set(folders) - {"/".join(p[: level + 1]) for p in parts}):
                raise wrong_folder(self.root, f"has class folders without images ({few(empty)})", TREE)
            trained = set(classes[splits == "train"])
            if split and (strange := sorted({c for c in classes if c is not None} - trained)):
                problem = f"has {len(strange)} classes without train images ({few(strange)})"
                raise wrong_folder(self.root, problem, TREE)
        return splits, classes


def _fill(table: pd.DataFrame, column: str, other: np.ndarray) -> pd.Series:
    """Return a column of texts, with ``other`` where it says nothing; None where neither does."""
    filled = other.copy()
    if column in table:
        said = table[column].notna().to_numpy()
        filled[said] = table[column].to_numpy(dtype=object)[said]
    return pd.Series(filled, dtype=object)
