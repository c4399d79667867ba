"""FEMNIST: handwritten digits and letters by 3,597 writers, from LEAF's JSON.

Source: S. Caldas et al., "LEAF: A Benchmark for Federated Settings", arXiv:1812.01097,
https://github.com/TalwalkarLab/leaf (data/femnist); the images are from NIST Special Database 19. Published with
ICIIA: 817,851 images, split within each writer 90 to 10 (``./preprocess.sh -s niid --sf 1.0 -k 0 -t sample``).

The gigabytes of JSON are converted once, file by file, into a folder of the cache, named after a digest of the names
and sizes of the files:

    manifest.json    number of images, and the JSON files; written last
    images.npy       uint8 [M, 28, 28], memory-mapped; a pixel is k of LEAF's k / 255
    table.parquet    label, split, owner

Legend: M images, n images of one writer in one file.
"""

import logging
import string
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from iciia_exp.artifacts import (
    allocate,
    atomic_write,
    make_folder,
    read_array,
    read_parquet,
    resolve_cache_dir,
    write_json,
)
from iciia_exp.data.content import Content, row_digests
from iciia_exp.data.dataset import ImageDataset, existing_root
from iciia_exp.data.readers.leaf import describe_files, find_data, list_files, read_users
from iciia_exp.digest import digest
from iciia_exp.errors import UserError, check_int

__all__ = ["Femnist"]

log = logging.getLogger(__name__)

WHAT = "FEMNIST as LEAF's preprocess.sh leaves it (https://github.com/TalwalkarLab/leaf, data/femnist)"

TREE = """data/train/<name>.json
data/test/<name>.json
(both made by ./preprocess.sh -s niid --sf 1.0 -k 0 -t sample; the folder data itself also works)"""

# LEAF's order of the labels.
_NAMES = string.digits + string.ascii_uppercase + string.ascii_lowercase

SIDE = 28

# Format of the converted data.
FORMAT = 1


class Femnist(ImageDataset):
    """28x28 images of 62 characters, dark on white; the owner is the writer, the splits are LEAF's train and test.

    Args:
        root: LEAF's folder data/femnist, its folder data, or any folder with train and test; see `TREE`.
        num_classes: number of LEAF's labels (digits, capitals, small letters) in the data; 10 for the digits.
        cache_dir: folder of the converted data, in a folder ``datasets``; None: the user's cache directory.
    """

    name = "femnist"
    cosmetic: ClassVar[frozenset[str]] = frozenset({"root", "cache_dir"})
    open_files: ClassVar[frozenset[str]] = frozenset({"_images"})

    def __init__(self, root: str | Path | None, num_classes: int = len(_NAMES), cache_dir: str | None = None) -> None:
        #: the folder with train and test
        self.root = find_data(existing_root(root, WHAT, TREE), TREE)
        self._names = tuple(_NAMES[: check_int("num_classes", num_classes, 2, len(_NAMES))])
        self.cache_dir = resolve_cache_dir(cache_dir)

    @property
    def class_names(self) -> Sequence[str]:
        """The characters, in LEAF's order of labels."""
        return self._names

    def load_table(self) -> pd.DataFrame:
        """Return the images in the order of LEAF's files, train first; converts the files at the first call."""
        table = read_parquet(self._prepared / "table.parquet")
        if len(beyond := table[table["label"] >= self.num_classes]):
            label, owner = beyond["label"].iloc[0], beyond["owner"].iloc[0]
            problem = f"user {owner} has label {label} ({_NAMES[label]}), but there are num_classes={self.num_classes}"
            raise UserError(f"{self.root}: {problem}; set num_classes to at least {table['label'].max() + 1}")
        return table.astype({"split": object, "owner": object}).assign(parent=None)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one image as float32 [1, 28, 28], 0 black to 1 white."""
        return (self._images[index] / np.float32(255))[None]

    def fingerprint(self) -> Any:
        """Return split, name and size of every JSON file."""
        return describe_files(self._files)

    def content(self, kept: Content) -> str:
        """Return a digest of the JSON files."""
        return kept.of(self.root, [path.relative_to(self.root).as_posix() for _, path in self._files])

    def image_digests(self) -> np.ndarray:
        """Return a digest of every image; of the published 817,851 in 3 s."""
        return row_digests(self._images)

    @cached_property
    def _files(self) -> list[tuple[str, Path]]:
        return list_files(self.root, TREE)

    @cached_property
    def _prepared(self) -> Path:
        kept = Content(self.cache_dir / "datasets")
        folder = self.cache_dir / "datasets" / f"femnist-{digest([FORMAT, self.fingerprint(), self.content(kept)])}"
        make_folder(folder, "the converted FEMNIST", lambda partial: _convert(self._files, partial))
        return folder

    @cached_property
    def _images(self) -> np.ndarray:
        return read_array(self._prepared / "images.npy")


def _pack(x: list[Any], y: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return a writer's images, uint8 [n, 28, 28], and labels, int64 [n]; invalid data raises `ValueError`."""
    pixels = SIDE * SIDE
    lengths = [len(image) if isinstance(image, list) else 0 for image in x]
    if wrong := [i for i, length in enumerate(lengths) if length != pixels]:
        raise ValueError(f"x[{wrong[0]}] has {lengths[wrong[0]]} numbers, must have {pixels} ({SIDE}x{SIDE} pixels)")
    try:
        levels = np.array(x, dtype=np.float32).reshape(len(x), SIDE, SIDE) * 255
    except (TypeError, ValueError) as error:
        raise ValueError(f"x has pixels that are not numbers ({error})") from error
    images = np.rint(levels)
    good = (np.abs(levels - images) < 0.01) & (images >= 0) & (images <= 255)  # false for NaN
    if not good.all():
        pixel = levels[~good][0] / 255
        raise ValueError(f"x has a pixel {pixel:g}, must be 0 to 1 in steps of 1/255 (0 black, 1 white)")
    labels = np.array(y) if y else np.empty(0, dtype=np.int64)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError("y must be whole numbers, the labels")
    if len(beyond := labels[(labels < 0) | (labels >= len(_NAMES))]):
        raise ValueError(f"y has the label {beyond[0]}, must be 0 to {len(_NAMES) - 1}")
    return images.astype(np.uint8), labels.astype(np.int64)


def _convert(files: list[tuple[str, Path]], partial: Path) -> None:
    """Convert LEAF's files one by one into the folder ``partial``, then join them; an earlier conversion is resumed."""
    log.info("converting %d files of FEMNIST, once; this takes a few minutes", len(files))
    parts = [partial / f"part_{i}.npz" for i in range(len(files))]
    for i, ((split, path), part) in enumerate(zip(files, parts, strict=True), start=1):
        if part.is_file():  # complete, from an earlier conversion
            continue
        users = read_users(path, _pack)
        images, labels = zip(*users.values(), strict=True) if users else ((), ())
        with atomic_write(part, "wb") as file:
            np.savez(
                file,
                images=np.concatenate([np.empty((0, SIDE, SIDE), dtype=np.uint8), *images]),
                label=np.concatenate([np.empty(0, dtype=np.int64), *labels]),
                owner=np.repeat(np.array(list(users), dtype=str), [len(label) for label in labels]),
            )
        log.info("FEMNIST: %d of %d files converted (%s of %s)", i, len(files), path.name, split)

    tables = []
    for (split, _), part in zip(files, parts, strict=True):
        with np.load(part) as arrays:
            owner = arrays["owner"].astype(object)
            tables.append(pd.DataFrame({"label": arrays["label"], "split": split, "owner": owner}))
    table = pd.concat(tables, ignore_index=True)
    listed = pd.concat([part.drop_duplicates("owner") for part in tables], ignore_index=True)
    twice = listed[listed.duplicated(["split", "owner"])]
    if len(twice):
        folder, owner = files[0][1].parent.parent / twice["split"].iloc[0], twice["owner"].iloc[0]
        raise UserError(f"{folder}: user {owner} is in two files; delete the files of another sampling")
    if table.empty:
        raise UserError(f"{files[0][1].parent.parent}: LEAF's {len(files)} files hold no images; make them again")
    shape = len(table), SIDE, SIDE
    joined = np.lib.format.open_memmap(partial / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    allocate(partial / "images.npy")
    first = 0
    for part, rows in zip(parts, tables, strict=True):
        with np.load(part) as arrays:
            joined[first : first + len(rows)] = arrays["images"]
        first += len(rows)
    joined.flush()
    with atomic_write(partial / "table.parquet", "wb") as file:
        table.to_parquet(file, index=False)
    for part in parts:
        part.unlink()
    write_json(partial / "manifest.json", {"format": FORMAT, "images": len(table), "files": describe_files(files)})
