"""Image folder: the user's own images in class folders, with optional split folders and an optional CSV table."""

import logging
import posixpath
from collections import Counter
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
from PIL import Image

from iciia_exp.data.dataset import ImageFiles, existing_root, wrong_folder
from iciia_exp.data.readers.files import check_distinct, existing_file, few, list_files, list_folders
from iciia_exp.data.readers.images import extensions, read_image
from iciia_exp.data.readers.metadata import (
    COLUMNS,
    SPLIT_NAMES,
    check_columns,
    check_shares,
    image_table,
    parse_times,
    read_metadata,
)
from iciia_exp.data.readers.parents import parents_file, read_parents
from iciia_exp.errors import UserError, check_int

__all__ = ["Folder"]

log = logging.getLogger(__name__)

TREE = """<class>/<image>.jpg
or, already split,
train/<class>/<image>.jpg
val/<class>/<image>.jpg (test images, if there is no test folder)
test/<class>/<image>.jpg
or images anywhere, with a CSV table of their path, label and split"""

CSV_FORM = "a CSV table with a column path and any of label, owner, split, parent, time"

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


class Folder(ImageFiles):
    """Images in class folders, in the layouts of `TREE`.

    Every format that Pillow reads is an image; other files are counted and passed over. The orientation of EXIF is
    applied, transparent pixels are white, 16 bits become 8 (`iciia_exp.data.readers.images.read_image`).

    An image in a deeper folder belongs to the class folder above. Split folders are train, test, val and backbone, or
    training, testing, valid, validation and dev; without a test folder, val is the test split. If neither folders nor
    table give splits, the images of each class are split by ``shares``, or the owners if the table gives owners.

    Args:
        root: folder of the images.
        csv: table by path, or by its name within ``root``. Columns: ``path`` (relative to ``root`` or to the table, or
            absolute; images lie in ``root``) and any of ``label``, ``owner``, ``split``, ``parent`` (texts) and
            ``time`` or ``timestamp`` (seconds, or ISO dates). Its cells take precedence over the folders, which are
            used for empty cells and missing columns. Images that are not in the table are left out.
        parents: CSV table of parent categories by class (`iciia_exp.data.readers.parents`); a parent in ``csv``
            takes precedence.
        shares: shares of the splits, with sum 1, for data without splits; train, test and any of val and backbone.
        seed: seed of that split.
        columns: names of the columns in ``csv``, by ours, where they are others: ``{"owner": "user"}``.
    """

    name = "folder"
    # their content is in the table, which is in the fingerprint
    cosmetic: ClassVar[frozenset[str]] = frozenset({"root", "csv", "parents", "shares", "seed", "columns"})

    def __init__(
        self,
        root: str | Path | None,
        csv: str | Path | None = None,
        parents: str | Path | None = None,
        shares: Mapping[str, float] = SHARES,
        seed: int = 0,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.columns = check_columns(columns, ("path", *COLUMNS))
        self.root = existing_root(root, "your images", TREE)
        if csv is not None and (self.root / csv).is_file():
            csv = self.root / csv
        self.csv = None if csv is None else existing_file("csv", csv, f"{CSV_FORM}, by path or by name within root")
        self.parents = parents_file(parents)
        self.shares = check_shares(shares)
        self.seed = check_int("seed", seed, 0)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the K classes, sorted; by value if all are whole numbers."""
        return self._data[1]

    def load_table(self) -> pd.DataFrame:
        """Return the images in the order of their paths, with ``time`` if the table has it."""
        return self._data[0]

    def __getitem__(self, index: int) -> Image.Image:
        """Return one image as RGB (`read_image`)."""
        return read_image(self.root / self.path(index))

    @cached_property
    def _data(self) -> tuple[pd.DataFrame, tuple[str, ...]]:
        where = self.csv or self.root
        found, others = list_files(self.root, extensions())
        self._say_passed_over(others)
        if not found:
            raise wrong_folder(self.root, "has no images", TREE)
        given = pd.DataFrame({"path": found}, dtype=object) if self.csv is None else self._read_table(self.csv, found)
        given = given.sort_values("path", ignore_index=True)  # the order of a table's rows changes no number
        time = given.pop("time") if "time" in given else None
        splits, labels = self._read_folders(given["path"])
        for column, folders in (("label", labels), ("split", splits)):
            given[column] = _fill(given, column, folders)
            if len(lost := given["path"][given[column].isna()]) and (column == "label" or len(lost) < len(given)):
                folder = "class" if column == "label" else column
                hint = f"use {folder} folders, or give all in a table's column {column}{self._classes_below()}"
                raise wrong_folder(where, f"{len(lost)} images have no {column} ({few(lost)}); {hint}", TREE)
        if given["split"].isna().all():
            del given["split"]
        if len(classes := set(given["label"])) < 2:
            problem = f"has a single class ({few(classes)}), at least 2 are needed{self._classes_below()}"
            raise wrong_folder(where, problem, TREE)
        table, class_names = image_table(given, self.shares, self.seed, where)
        if untrained := set(table["label"]) - set(table["label"][table["split"] == "train"]):
            log.warning("%s: no train images of %s", where, few(class_names[i] for i in sorted(untrained)))
        if self.parents is not None:
            parents = np.array(read_parents(self.parents, class_names), dtype=object)
            table["parent"] = _fill(table, "parent", parents[table["label"]])
        if time is not None:
            table["time"] = time
        return table, class_names

    def _classes_below(self) -> str:
        """Return a hint where the only folder with folders is one around the classes."""
        inner = [top for top in list_folders(self.root) if len(list_folders(self.root / top)) > 1]
        if self.csv is not None or len(inner) != 1 or inner[0].lower() in SPLIT_NAMES:
            return ""
        return f"; the folders in it are the classes with data_dir={self.root / inner[0]}"

    def _say_passed_over(self, others: list[str]) -> None:
        tables = {file.resolve() for file in (self.csv, self.parents) if file is not None}
        names = [n for n in others if not n.lower().endswith(".csv") or (self.root / n).resolve() not in tables]
        if names:
            kinds = Counter(posixpath.splitext(name)[1].lower() or "no extension" for name in names)
            counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
            problem = f"passing over {_files(len(names), 'file')} that Pillow does not read as images"
            log.warning("%s: %s: %s (%s)", self.root, problem, counts, few(names))

    def _read_table(self, file: Path, found: list[str]) -> pd.DataFrame:
        """Return the user's table, checked; ``time`` in seconds, the other columns text or None."""
        table = read_metadata(file, required=("path",), columns=self.columns)
        path = self._within_root(table["path"].str.replace("\\", "/"), file, set(found)).astype(object)
        if len(outside := table["path"][path.str.startswith(("/", "../"))]):
            raise UserError(f"{file}: every path must lie in {self.root} ({few(outside)})")
        check_distinct(file, path, "paths")
        table["path"] = path
        files = set(found)
        missing = [p for p in path if p not in files and not (self.root / p).is_file()]
        if len(missing) == len(table):
            raise UserError(f"{file}: none of its {len(table)} images is in {self.root} ({few(missing)})")
        if missing:  # extraction reports them, like damaged images
            log.warning("%s: %d of %d images are missing (%s)", file, len(missing), len(table), few(missing))
        if left_out := sorted(files - set(path)):
            log.info("%s lacks %d images of %s, left out (%s)", file, len(left_out), self.root, few(left_out))
        if "time" in table:
            table["time"] = parse_times(table["time"], file)
        return table

    def _within_root(self, paths: pd.Series, file: Path, found: set[str]) -> pd.Series:
        """Return paths relative to the root: of absolute ones, and of those relative to the table."""
        root, beside = (posixpath.normpath(place.absolute().as_posix()) for place in (self.root, file.parent))

        resolved = cache(posixpath.realpath)

        def within(path: str) -> str:
            plain = posixpath.normpath(path)
            if plain in found or (beside == root and not plain.startswith("/")):
                return plain
            other = posixpath.relpath(posixpath.join(beside, plain), root)  # of an absolute path that path itself
            if other.startswith("../"):  # of one through a link
                folder, name = posixpath.split(posixpath.join(beside, plain))
                other = posixpath.join(posixpath.relpath(resolved(folder), resolved(root)), name)
            return other if other in found or plain.startswith(("/", "../")) else plain

        return paths.map(within)

    def _read_folders(self, paths: pd.Series) -> tuple[np.ndarray, np.ndarray]:
        """Return the split and the class of every image by its folders; None if they give none."""
        tops = list_folders(self.root)
        split_of = {top: SPLIT_NAMES[top.lower()] for top in tops if top.lower() in SPLIT_NAMES}
        split = "train" in split_of.values() and len(set(split_of.values())) > 1  # "train" alone may be a class
        if split and "test" not in split_of.values():
            split_of = {
                top: "test" if name == "val" and top.lower() != "selection" else name for top, name in split_of.items()
            }
        level = 1 if split else 0
        parts = [p.split("/") for p in paths]
        splits = np.array([split_of.get(p[0]) if split else None for p in parts], dtype=object)
        classes = np.array([p[level] if len(p) > level + 1 else None for p in parts], dtype=object)
        if self.csv is None:  # a table may use other classes
            if split and (strange := [t for t in tops if t not in split_of]):
                problem = f"has {few(strange)} beside the split folders {', '.join(split_of)}"
                raise wrong_folder(self.root, problem, TREE)
            if split and "test" not in split_of.values():
                raise wrong_folder(self.root, f"has the split folders {', '.join(split_of)} and none for test", TREE)
            folders = [f"{t}/{c}" for t in tops for c in list_folders(self.root / t)] if split else tops
            if empty := sorted(set(folders) - {"/".join(p[: level + 1]) for p in parts}):
                log.warning(
                    "%s: passing over %s without images (%s)", self.root, _files(len(empty), "folder"), few(empty)
                )
            trained = set(classes[splits == "train"])
            if split and (strange := sorted({c for c in classes if c is not None} - trained)):
                problem = f"has {len(strange)} classes without train images ({few(strange)})"
                raise wrong_folder(self.root, problem, TREE)
        return splits, classes


def _files(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _fill(table: pd.DataFrame, column: str, other: np.ndarray) -> pd.Series:
    """Return a column of text with its empty cells filled from ``other``; None if both are empty."""
    filled = pd.Series(other, index=table.index, dtype=object)
    return table[column].astype(object).where(table[column].notna(), filled) if column in table else filled
