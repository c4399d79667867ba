"""CelebA: faces of celebrities with yes-or-no attributes, split by LEAF.

Sources: Z. Liu et al., "Deep Learning Face Attributes in the Wild", arXiv:1411.7766,
http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html; S. Caldas et al., "LEAF: A Benchmark for Federated Settings",
arXiv:1812.01097, https://github.com/TalwalkarLab/leaf (data/celeba). LEAF's own task is smiling or not; here the task
is 38 attributes at once, as published with ICIIA (ACML 2024, PMLR 260:223-238): 9,343 people with at least 5 images,
200,288 images, 8,408 people to train and 935 to test. LEAF itself leaves out people with fewer than 5 images; its
option ``-k 5`` leaves out those with exactly 5, too.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from iciia_exp.data.dataset import ImageFiles, check_layout, existing_root
from iciia_exp.data.readers.files import check_distinct, few
from iciia_exp.data.readers.leaf import find_data, list_files, read_users
from iciia_exp.errors import ConfigError, UserError, check_choice, check_int, first_line
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
http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html; the folder data itself also works)"""

ATTRIBUTES = "raw/list_attr_celeba.txt"
IMAGES = "raw/img_align_celeba"


class CelebA(ImageFiles):
    """Images of faces with binary attributes; the owner is the person, the splits are LEAF's train and test.

    Args:
        root: LEAF's folder data/celeba, its folder data, or any folder with train, test and raw; see `TREE`.
        dropped: attributes that are left out; the published task leaves out two that describe a person, not an image.
        min_images: people with fewer images, train and test together, are left out.
    """

    name = "celeba"
    task = MULTI_LABEL
    cosmetic: ClassVar[frozenset[str]] = frozenset({"root"})

    def __init__(
        self, root: str | Path | None, dropped: Sequence[str] = ("Male", "Young"), min_images: int = 5
    ) -> None:
        #: the folder with train, test and raw
        self.root = find_data(existing_root(root, WHAT, TREE), TREE)
        if isinstance(dropped, str) or not all(isinstance(name, str) for name in dropped):
            raise ConfigError("dropped", dropped, "must be a list of attributes, such as [Male, Young], or []")
        self.dropped = tuple(dropped)
        self.min_images = check_int("min_images", min_images, 1)
        check_layout(self.root, TREE, ATTRIBUTES, f"{IMAGES}/")

    @property
    def class_names(self) -> Sequence[str]:
        """The attributes that are not dropped, in the order of list_attr_celeba.txt."""
        return [str(name) for name in self._attributes.columns]

    def load_table(self) -> pd.DataFrame:
        """Return the images in the order of LEAF's files, train first."""
        rows: list[tuple[str, str, str]] = []
        for split, path in list_files(self.root, TREE):
            for person, names in read_users(path, _pack).items():
                rows += [(name, split, str(person)) for name in names]
        images = pd.DataFrame(rows, columns=["image", "split", "owner"], dtype=object)
        images = images[images.groupby("owner")["image"].transform("size") >= self.min_images]
        if images.empty:
            problem = f"none of the {len({owner for _, _, owner in rows})} people has that many images"
            raise ConfigError("min_images", self.min_images, problem)
        check_distinct(self.root, images["image"], "images", "; make the JSON again")
        number = self._attributes.index.get_indexer(pd.Index(images["image"]))
        if (unknown := number < 0).any():
            problem = f"has no attributes for {unknown.sum()} images of LEAF's JSON ({few(images['image'][unknown])})"
            raise UserError(f"{self.root / ATTRIBUTES}: {problem}; both must be of the same CelebA")
        labels = [np.flatnonzero(row).tolist() for row in self._attributes.to_numpy()[number]]
        images = images.assign(label=pd.Series(labels, index=images.index, dtype=object), parent=None)
        return images.assign(path=IMAGES + "/" + images["image"])[["label", "split", "owner", "parent", "path"]]

    @cached_property
    def _attributes(self) -> pd.DataFrame:
        """One row per image, one bool column per attribute in use."""
        table = read_attributes(self.root / ATTRIBUTES)
        for name in self.dropped:
            check_choice("dropped", name, list(table.columns))
        table = table.drop(columns=list(self.dropped))
        if table.shape[1] < 2:
            raise ConfigError("dropped", list(self.dropped), "must leave at least 2 attributes")
        return table


def read_attributes(path: Path) -> pd.DataFrame:
    """Return CelebA's attributes: a row per image, by file name, and a bool column per attribute.

    The first line of the file is the number of images, the second the names of the attributes; every other line has a
    file name and 1 or -1 for each attribute. `UserError`: the file has another form or is cut off.
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
        problem = f"says {count} images and has {len(table)}; it is cut off or put together; copy it again"
        raise UserError(f"{path}: {problem}")
    values = table.to_numpy()
    if len(wrong := np.flatnonzero(~np.isin(values, (-1, 1)).all(axis=1))):
        raise UserError(f"{path}: has values other than 1 and -1 (image {few(table.index[wrong])}); {form}")
    return pd.DataFrame(values == 1, index=table.index, columns=pd.Index(names))


def _pack(x: list[str], y: list[int]) -> list[str]:
    """Return a person's image files; LEAF's label, smiling, is one of the attributes."""
    if wrong := [name for name in x if not isinstance(name, str)]:
        raise ValueError(f"x must be names of image files, not {wrong[0]!r:.40}")
    return x
