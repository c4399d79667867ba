"""ImageNet-1K (ILSVRC 2012): the whole set or some of its classes, as it lies on disk.

The paper's ImageNet experiment: train images train methods, validation images are the reported test, and parent
categories make clients (ICIIA, ACML 2024, PMLR 260:223-238, section 4). The validation images may lie in class
folders, or flat as they are distributed, with one of the annotations that come with them.
"""

from __future__ import annotations

import logging
import re
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
from PIL import Image

from iciia_exp.data.dataset import ImageDataset, existing_root, table_digest, wrong_folder
from iciia_exp.data.readers.files import existing_file, few, list_folders, list_images, open_image, read_csv
from iciia_exp.data.readers.parents import IMAGENET_PARENTS, PARENTS_FORM, read_parents
from iciia_exp.errors import UserError

__all__ = ["ImageNet"]

log = logging.getLogger(__name__)

WHAT = (
    "ImageNet-1K (ILSVRC 2012, https://image-net.org/download.php after registration: its licence forbids passing it "
    "on) or a subset of its classes"
)

TREE = """train/<wnid>/<image>.JPEG
val/<wnid>/<image>.JPEG
or, instead of class folders in val,
val/ILSVRC2012_val_<number>.JPEG
and LOC_val_solution.csv, or the devkit's ILSVRC2012_validation_ground_truth.txt and meta.mat, in val or beside it
(both also under ILSVRC/Data/CLS-LOC)"""

# Where train and val may lie under the root: there, or as Kaggle's archive unpacks.
_PLACES = ("", "ILSVRC/Data/CLS-LOC")

_DEVKIT = "ILSVRC2012_devkit_t12/data"


class ImageNet(ImageDataset):
    """ImageNet's train images (split ``train``) and validation images (split ``test``).

    Classes are the folders of train, by wnid in sorted order, which for all 1,000 is the order of pre-trained heads.

    Args:
        root: folder with train and val; see `TREE`.
        parents: CSV table of parent categories by class (`iciia_exp.data.readers.parents`); None is the package's own,
            made from WordNet.
    """

    name = "imagenet"
    cosmetic: ClassVar[frozenset[str]] = frozenset({"root", "parents"})  # the table holds what they say

    def __init__(self, root: str | Path | None, parents: str | Path | None = None) -> None:
        given = existing_root(root, WHAT, TREE)
        self._given = given
        #: the folder that holds train and val; paths are relative to it
        self.root = next((p for place in _PLACES if ((p := given / place) / "train").is_dir()), given)
        for part in ("train", "val"):
            if not (self.root / part).is_dir():
                raise wrong_folder(self.root, f"has no folder {part}", TREE)
        self.parents = None if parents is None else existing_file("parents", parents, PARENTS_FORM)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The wnids of the K classes: the folders of train."""
        folder = self.root / "train"
        names = list_folders(folder)
        if not names:
            packed = (
                " (unpack the .tar archives, each into a folder of its name)" if list(folder.glob("n*.tar")) else ""
            )
            raise wrong_folder(folder, f"has no class folders{packed}", TREE)
        if strange := [n for n in names if not re.fullmatch(r"n\d{8}", n)]:
            hint = "for classes of other names use dataset=folder"
            raise wrong_folder(folder, f"has folders that are not wnids ({few(strange)}); {hint}", TREE)
        return tuple(names)

    def load_table(self) -> pd.DataFrame:
        """Return the train images by class and name, then the validation images likewise."""
        number = {wnid: i for i, wnid in enumerate(self.class_names)}
        train = [list_images(self.root / "train" / wnid) for wnid in self.class_names]
        if empty := [w for w, images in zip(self.class_names, train, strict=True) if not images]:
            raise wrong_folder(self.root / "train", f"has class folders without images ({few(empty)})", TREE)
        val, wnids = self._validation()
        if strange := sorted(set(wnids) - set(number)):
            problem = f"has images of {len(strange)} classes that train lacks ({few(strange)})"
            raise wrong_folder(self.root / "val", problem, TREE)
        # one order of the images, however the validation images are laid out
        order = sorted((number[w], v.rsplit("/", 1)[-1], v) for w, v in zip(wnids, val, strict=True))
        val_labels = [label for label, _, _ in order]
        parents = np.array(self._parents(), dtype=object)
        counts = [len(images) for images in train]
        labels = np.concatenate([np.repeat(np.arange(len(train)), counts), val_labels])
        paths = chain(
            (f"train/{w}/{i}" for w, images in zip(number, train, strict=True) for i in images),
            (v for _, _, v in order),
        )
        return pd.DataFrame(
            {
                "label": labels,
                "split": np.repeat(np.array(["train", "test"], dtype=object), [sum(counts), len(val)]),
                "owner": None,
                "parent": parents[labels],
                "path": list(paths),
            }
        )

    def __getitem__(self, index: int) -> Image.Image:
        """Return one image as RGB, in its own size."""
        return open_image(self.root / self.path(index))

    def fingerprint(self) -> str:
        """Return a digest of the table: which files there are, with label, split and parent."""
        return table_digest(self.table)

    def _parents(self) -> list[str | None]:
        if self.parents is not None:
            return read_parents(self.parents, self.class_names)
        parents = read_parents(IMAGENET_PARENTS, self.class_names, partial=True)
        if unknown := [c for c, parent in zip(self.class_names, parents, strict=True) if parent is None]:
            log.warning("%d classes are not of ImageNet-1K and have no parent (%s)", len(unknown), few(unknown))
        return parents

    def shown_names(self) -> list[str]:
        """Return the classes' names in WordNet, where they are of ImageNet."""
        from timm.data import ImageNetInfo  # late: it imports torch

        known = ImageNetInfo("imagenet-22k")
        names = set(known.label_names())
        return [known.label_name_to_description(w) if w in names else w for w in self.class_names]

    def _validation(self) -> tuple[list[str], list[str]]:
        """Return the validation images' paths and wnids."""
        images = list_images(self.root / "val")
        folders = list_folders(self.root / "val")
        if folders not in ([], ["images"]):  # Tiny ImageNet keeps its images in val/images
            if loose := [i for i in images if "/" not in i]:
                raise wrong_folder(self.root / "val", f"has images outside its class folders ({few(loose)})", TREE)
            wnids = [i.split("/", 1)[0] for i in images]
            if empty := sorted(set(folders) - set(wnids)):
                raise wrong_folder(self.root / "val", f"has class folders without images ({few(empty)})", TREE)
            return [f"val/{i}" for i in images], wnids
        if not images:
            raise wrong_folder(self.root / "val", "has no images", TREE)
        file, wnid_of = self._annotation()
        names = [i.rsplit("/", 1)[-1].rsplit(".", 1)[0] for i in images]
        if unknown := [n for n in names if n not in wnid_of]:
            raise UserError(f"{file}: has no class for {len(unknown)} images of {self.root / 'val'} ({few(unknown)})")
        return [f"val/{i}" for i in images], [wnid_of[n] for n in names]

    def _annotation(self) -> tuple[Path, dict[str, str]]:
        """Return the file that gives flat validation images their class, and wnids by name without extension."""
        folders = [self.root / "val", self.root, self._given]
        folders += [f / _DEVKIT for f in folders]
        readers = {
            "LOC_val_solution.csv": _read_solution,
            "ILSVRC2012_validation_ground_truth.txt": _read_devkit,
            "val_annotations.txt": _read_tiny,
        }
        for name, reader in readers.items():
            for folder in folders:
                if (file := folder / name).is_file():
                    return file, reader(file)
        raise wrong_folder(self.root / "val", "has neither class folders nor an annotation of its images", TREE)


def _read_solution(file: Path) -> dict[str, str]:
    """Read Kaggle's annotation: a row per image, with its boxes, each with the wnid in front."""
    table = read_csv(file)
    if lacking := [c for c in ("ImageId", "PredictionString") if c not in table]:
        raise UserError(f"{file}: lacks the column {lacking[0]}; expected ImageId,PredictionString")
    return dict(zip(table["ImageId"], table["PredictionString"].str.split(n=1).str[0], strict=True))


def _read_devkit(file: Path) -> dict[str, str]:
    """Read the devkit's annotation: line i holds the class number of image i, whose wnid is in meta.mat."""
    meta = file.with_name("meta.mat")
    if not meta.is_file():
        raise UserError(f"{meta}: there is no such file; copy it from the devkit's folder data, it tells the classes")
    from scipy.io import loadmat

    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        wnid_of = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist(), strict=True))
        numbers = [int(line) for line in file.read_text(encoding="utf-8").split()]
        return {f"ILSVRC2012_val_{i:08d}": str(wnid_of[number]) for i, number in enumerate(numbers, 1)}
    except (KeyError, ValueError, IndexError, NotImplementedError) as error:
        raise UserError(f"{file}: does not fit {meta} ({error}); copy both from the same devkit") from error


def _read_tiny(file: Path) -> dict[str, str]:
    """Read Tiny ImageNet's annotation: lines of file name, wnid and box, parted by tabs."""
    lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line]
    if any(len(line) < 2 for line in lines):
        raise UserError(f"{file}: expected lines of file name, tab, wnid")
    return {name.rsplit(".", 1)[0]: wnid for name, wnid, *_ in lines}
