"""CelebA: faces of celebrities with yes-or-no attributes, split by LEAF.

Sources: Z. Liu et al., "Deep Learning Face Attributes in the Wild", arXiv:1411.7766,
http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html; S. Caldas et al., "LEAF: A Benchmark for Federated Settings",
arXiv:1812.01097, https://github.com/TalwalkarLab/leaf (data/celeba). LEAF's own task is smiling or not; here the task
is 38 attributes at once, as published with ICIIA (ACML 2024, PMLR 260:223-238): 9,343 people with at least 5 images,
200,288 images, 8,408 people to train and 935 to test. LEAF itself leaves out people with fewer than 5 images; its
option ``-k 5`` leaves out those with exactly 5, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
from PIL import Image

from iciia_exp.data.dataset import ImageDataset, existing_root, table_digest, wrong_folder
from iciia_exp.data.readers.files import few, open_image
from iciia_exp.data.readers.leaf import find_data, list_files, read_users
from iciia_exp.errors import ConfigError, UserError, check_int, first_line, nearest
from iciia_exp.tasks import MULTI_LABEL

__all__ = ["CelebA", "read_attributes"]

WHAT = (
    "CelebA as LEAF's preprocess.sh leaves it (https://github.com/TalwalkarLab/leaf, data/celeba; pictures and "
    "attributes come from http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html only, whose terms forbid passing them on)"
)

TREE = """data/train/<name>.json
data/test/<name>.json
data/raw/list_attr_celeba.txt
data/raw/img_align_celeba/<image>.jpg
(the JSON is made by ./preprocess.sh -s niid --sf 1.0 -k 0 -t user --tf 0.9, raw comes from
http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html; the folder data itself will do, too)"""

ATTRIBUTES = "raw/list_attr_celeba.txt"
IMAGES = "raw/img_align_celeba"


class CelebA(ImageDataset):
    """Face pictures with the attributes that apply; the person is the owner, LEAF's train and test are the splits.

    Args:
        root: LEAF's folder data/celeba, its folder data, or any folder with train, test and raw; see `TREE`.
        dropped: attributes that are left out; the published task leaves out two that tell a person, not an image.
        min_images: people with fewer images, train and test together, are left out.
    """

    name = "celeba"
    task = MULTI_LABEL
    cosmetic: ClassVar[frozenset[str]] = frozenset({"root"})

    def __init__(
        self, root: str | Path | None, dropped: Sequence[str] = ("Male", "Young"), min_images: int = 5
    ) -> None:
        self.root = existing_root(root, WHAT, TREE)
        #: the folder that holds train, test and raw
        self.data = find_data(self.root, TREE)
        if isinstance(dropped, str) or not all(isinstance(name, str) for name in dropped):
            raise ConfigError("dropped", dropped, "must be a list of attributes, such as [Male, Young], or []")
        self.dropped = tuple(dropped)
        self.min_images = check_int("min_images", min_images, 1)
        if not (self.data / ATTRIBUTES).is_file():
            raise wrong_folder(self.data, f"has no file {ATTRIBUTES}", TREE)
        if not (self.data / IMAGES).is_dir():
            raise wrong_folder(self.data, f"has no folder {IMAGES}", TREE)

    @property
    def class_names(self) -> Sequence[str]:
        """The attributes that are not dropped, in the order of list_attr_celeba.txt."""
        return [str(name) for name in self._attributes.columns]

    def load_table(self) -> pd.DataFrame:
        """Return the images in the order of LEAF's files, train first."""
        rows: list[tuple[str, str, str]] = []
        for split, path in list_files(self.data, TREE):
            for person, names in read_users(path, _pack).items():
                rows += [(name, split, str(person)) for name in names]
        images = pd.DataFrame(rows, columns=["image", "split", "owner"], dtype=object)
        images = images[images.groupby("owner")["image"].transform("size") >= self.min_images]
        if images.empty:
            problem = f"none of the {len({owner for _, _, owner in rows})} people has that many images"
            raise ConfigError("min_images", self.min_images, problem)
        if (twice := images["image"].duplicated()).any():
            problem = f"{twice.sum()} images are listed twice ({few(images['image'][twice])}); make the JSON again"
            raise UserError(f"{self.data}: {problem}")
        number = self._attributes.index.get_indexer(pd.Index(images["image"]))
        if (unknown := number < 0).any():
            problem = f"has no attributes for {unknown.sum()} images of LEAF's JSON ({few(images['image'][unknown])})"
            raise UserError(f"{self.data / ATTRIBUTES}: {problem}; both must be of the same CelebA")
        labels = [np.flatnonzero(row).tolist() for row in self._attributes.to_numpy()[number]]
        return pd.DataFrame(
            {
                "label": pd.Series(labels, dtype=object),
                "split": images["split"].to_numpy(),
                "owner": images["owner"].to_numpy(),
                "parent": None,
                "path": (IMAGES + "/" + images["image"]).to_numpy(),
            }
        )

    def __getitem__(self, index: int) -> Image.Image:
        """Return one image as RGB, in its own size."""
        return open_image(self.data / self.path(index))

    def fingerprint(self) -> list[str]:
        """Return a digest of the table, with every image's attributes, split and owner, and the attributes' names."""
        return [table_digest(self.table), *self.class_names]

    @cached_property
    def _attributes(self) -> pd.DataFrame:
        """One row per image of CelebA, one bool column per attribute in use."""
        table = read_attributes(self.data / ATTRIBUTES)
        for name in self.dropped:
            if name not in table:
                near = nearest(name, table.columns)
                hint = f"did you mean {near}?" if near else f"CelebA has {', '.join(table.columns)}"
                raise ConfigError("dropped", list(self.dropped), f"there is no attribute {name}; {hint}")
        table = table.drop(columns=list(self.dropped))
        if table.shape[1] < 2:
            raise ConfigError("dropped", list(self.dropped), "must leave at least 2 attributes")
        return table


def read_attributes(path: Path) -> pd.DataFrame:
    """Return CelebA's attributes: a row per image, by file name, and a bool column per attribute.

    The file's first line is the number of images, its second the names of the attributes; then come a file name and
    1 or -1 for each attribute.

    Raises:
        UserError: the file is not of that form, or cut off.
    """
    form = "expected CelebA's own file: a number of images, a line of names, then a file name and 1 or -1 for each name"
    try:
        with open(path, encoding="utf-8") as file:
            count, names = int(file.readline()), file.readline().split()
            table = pd.read_csv(file, sep=r"\s+", header=None, index_col=0, dtype={0: str})
    except ValueError as error:  # of int, of decoding, of pandas
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {form}") from error
    if table.shape[1] != len(names):
        raise UserError(f"{path}: has {len(names)} names of attributes, but {table.shape[1]} columns; {form}")
    if len(table) != count:
        raise UserError(
            f"{path}: says {count} images and has {len(table)}; it is cut off or put together; copy it again"
        )
    values = table.to_numpy()
    if len(wrong := np.flatnonzero(~np.isin(values, (-1, 1)).all(axis=1))):
        raise UserError(f"{path}: has values other than 1 and -1 (image {few(table.index[wrong])}); {form}")
    return pd.DataFrame(values == 1, index=table.index, columns=pd.Index(names))


def _pack(x: list[str], y: list[int]) -> list[str]:
    """Return a person's image files; LEAF's own label, smiling, is among the attributes."""
    if wrong := [name for name in x if not isinstance(name, str)]:
        raise ValueError(f"x must be names of image files, not {wrong[0]!r:.40}")
    return x
