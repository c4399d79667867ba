"""ImageNet-1K (ILSVRC 2012), all classes or some of them.

In the paper's experiment, methods are trained on the train images and tested on the validation images, and the clients
are made from parent categories (ICIIA, ACML 2024, PMLR 260:223-238, section 4).
"""

import logging
import re
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from iciia_exp.data.dataset import ImageFiles, check_layout, existing_root, table_digest, wrong_folder
from iciia_exp.data.readers.files import few, list_folders, list_images, read_csv
from iciia_exp.data.readers.parents import IMAGENET_PARENTS, parents_file, read_parents
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

# Folders of train and val under the root; the second is that of Kaggle's archive.
_PLACES = ("", "ILSVRC/Data/CLS-LOC")

_DEVKIT = "ILSVRC2012_devkit_t12/data"


class ImageNet(ImageFiles):
    """ImageNet's train images (split ``train``) and validation images (split ``test``).

    The classes are the folders of train, sorted by wnid; for all 1,000 classes this is the order of pre-trained heads.

    Args:
        root: folder with train and val; see `TREE`. The images of val are in class folders, or in one folder with one
            of the annotation files that are distributed with them.
        parents: CSV table of parent categories by class (`iciia_exp.data.readers.parents`); None: the package's table,
            made from WordNet.
    """

    name = "imagenet"
    cosmetic: ClassVar[frozenset[str]] = frozenset({"root", "parents"})  # their content is in the table

    def __init__(self, root: str | Path | None, parents: str | Path | None = None) -> None:
        self._given = existing_root(root, WHAT, TREE)
        places = (self._given / place for place in _PLACES)
        #: the folder with train and val
        self.root = next((place for place in places if (place / "train").is_dir()), self._given)
        check_layout(self.root, TREE, "train/", "val/")
        self.parents = parents_file(parents)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The wnids of the K classes: the folders of train."""
        folder = self.root / "train"
        names = list_folders(folder)
        if not names:
            hint = " (unpack the .tar archives, each into a folder of its name)" if any(folder.glob("n*.tar")) else ""
            raise wrong_folder(folder, f"has no class folders{hint}", TREE)
        if strange := [n for n in names if not re.fullmatch(r"n\d{8}", n)]:
            hint = "for classes of other names use dataset=folder"
            raise wrong_folder(folder, f"has folders that are not wnids ({few(strange)}); {hint}", TREE)
        return tuple(names)

    def load_table(self) -> pd.DataFrame:
        """Return the train images by class and name, then the validation images likewise."""
        number = {wnid: i for i, wnid in enumerate(self.class_names)}
        train = {wnid: list_images(self.root / "train" / wnid) for wnid in self.class_names}
        if empty := [wnid for wnid, images in train.items() if not images]:
            raise wrong_folder(self.root / "train", f"has class folders without images ({few(empty)})", TREE)
        val, wnids = self._validation()
        if strange := sorted(set(wnids) - set(number)):
            problem = f"has images of {len(strange)} classes that train lacks ({few(strange)})"
            raise wrong_folder(self.root / "val", problem, TREE)
        rows = [(number[wnid], "train", f"train/{wnid}/{image}") for wnid, images in train.items() for image in images]
        # the order of the validation images does not depend on their layout
        order = sorted((number[w], v.rsplit("/", 1)[-1], v) for w, v in zip(wnids, val, strict=True))
        rows += [(label, "test", path) for label, _, path in order]
        table = pd.DataFrame(rows, columns=["label", "split", "path"], dtype=object)
        table["label"] = table["label"].astype(np.int64)
        parents = np.array(self._parents(), dtype=object)[table["label"]]
        return table.assign(owner=None, parent=parents)[["label", "split", "owner", "parent", "path"]]

    def fingerprint(self) -> str:
        """Return a digest of the table (paths, labels, splits, parents)."""
        return table_digest(self.table)

    def _parents(self) -> list[str | None]:
        if self.parents is not None:
            return read_parents(self.parents, self.class_names)
        parents = read_parents(IMAGENET_PARENTS, self.class_names, partial=True)
        if unknown := [c for c, parent in zip(self.class_names, parents, strict=True) if parent is None]:
            log.warning("%d classes are not of ImageNet-1K and have no parent (%s)", len(unknown), few(unknown))
        return parents

    def shown_names(self) -> list[str]:
        """Return the classes' names in WordNet, if they are classes of ImageNet."""
        from timm.data import ImageNetInfo  # late: it imports torch

        wordnet = ImageNetInfo("imagenet-22k")
        names = set(wordnet.label_names())
        return [wordnet.label_name_to_description(w) if w in names else w for w in self.class_names]

    def _validation(self) -> tuple[list[str], list[str]]:
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
        """Return the annotation file of validation images in one folder, and wnids by name without extension."""
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
    """Read Kaggle's annotation: a row per image, with the wnid before each box."""
    table = read_csv(file, ("ImageId", "PredictionString"))
    return dict(zip(table["ImageId"], table["PredictionString"].str.split(n=1).str[0], strict=True))


def _read_devkit(file: Path) -> dict[str, str]:
    """Read the devkit's annotation: line i has the class number of image i, and meta.mat the wnid of every class."""
    meta = file.with_name("meta.mat")
    if not meta.is_file():
        raise UserError(f"{meta}: there is no such file; copy it from the devkit's folder data, for the class names")
    from scipy.io import loadmat

    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        wnid_of = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist(), strict=True))
        numbers = [int(line) for line in file.read_text(encoding="utf-8").split()]
        return {f"ILSVRC2012_val_{i:08d}": str(wnid_of[number]) for i, number in enumerate(numbers, 1)}
    except (KeyError, ValueError, IndexError, NotImplementedError) as error:  # the last: SciPy, of MATLAB 7.3 files
        raise UserError(f"{file}: does not fit {meta} ({error}); copy both from the same devkit") from error


def _read_tiny(file: Path) -> dict[str, str]:
    """Read Tiny ImageNet's annotation: lines of file name, wnid and box, separated by tabs."""
    lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line]
    if any(len(line) < 2 for line in lines):
        raise UserError(f"{file}: expected lines of file name, tab, wnid")
    return {name.rsplit(".", 1)[0]: wnid for name, wnid, *_ in lines}
