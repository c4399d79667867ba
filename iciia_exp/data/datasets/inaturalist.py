"""iNaturalist 2019: with FedScale's mapping of images to the people who took them.

Sources: images https://github.com/visipedia/inat_comp/tree/master/2019 (``train_val2019.tar.gz``); mapping F. Lai et
al., "FedScale: Benchmarking Model and System Performance of Federated Learning at Scale", arXiv:2105.11367,
https://github.com/SymbioticLab/FedScale (benchmark/dataset/inaturalist). Published with ICIIA: 1,901 clients to train
and 394 to test, 193,210 images, 1,010 species.
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
from iciia_exp.data.readers.files import few, list_folders, list_images, open_image, read_csv
from iciia_exp.errors import UserError

__all__ = ["INaturalist"]

WHAT = (
    "iNaturalist 2019 (train_val2019.tar.gz, https://github.com/visipedia/inat_comp/tree/master/2019) with FedScale's "
    "clients (client_data_mapping, https://github.com/SymbioticLab/FedScale, benchmark/dataset/inaturalist)"
)

TREE = """train_val2019/<supercategory>/<category>/<image>.jpg
client_data_mapping/train.csv (columns client_id,sample_path,label_name,label_id)
client_data_mapping/test.csv
client_data_mapping/val.csv (need not be there)"""

IMAGES = "train_val2019"

# Where FedScale's archive may have been unpacked.
_MAPPINGS = ("client_data_mapping", "inaturalist/client_data_mapping")

# FedScale's files and what they are here; in this order.
_SPLITS = {"train.csv": "train", "val.csv": "val", "test.csv": "test"}


class INaturalist(ImageDataset):
    """Photographs of 1,010 species; the photographer is the owner, the supercategory (Plants, Birds, ...) the parent.

    An image's class is the folder that it lies in, as FedScale's own reader has it. Client numbers count within their
    file, so that a client of train.csv is never one of test.csv: an owner is, for example, ``train-17``.

    Args:
        root: folder with train_val2019 and client_data_mapping; see `TREE`.
    """

    name = "inaturalist"
    cosmetic: ClassVar[frozenset[str]] = frozenset({"root"})

    def __init__(self, root: str | Path | None) -> None:
        self.root = existing_root(root, WHAT, TREE)
        if not (self.root / IMAGES).is_dir():
            raise wrong_folder(self.root, f"has no folder {IMAGES}", TREE)
        found = [self.root / place for place in _MAPPINGS if (self.root / place).is_dir()]
        if not found:
            raise wrong_folder(self.root, f"has no folder {_MAPPINGS[0]}", TREE)
        self._mapping = found[0]
        for file, split in _SPLITS.items():
            if split != "val" and not (self._mapping / file).is_file():
                raise wrong_folder(self._mapping, f"has no file {file}", TREE)

    @property
    def class_names(self) -> Sequence[str]:
        """The category folders, such as ``Plants/400``, by number: iNaturalist's order of labels."""
        return [f"{above}/{category}" for category, above in self._above.items()]

    def load_table(self) -> pd.DataFrame:
        """Return the images of train.csv, val.csv and test.csv, in the order of these files."""
        label = {category: i for i, category in enumerate(self._above)}
        parts = []
        for file, split in _SPLITS.items():
            path = self._mapping / file
            if not path.is_file():
                continue
            mapping = read_csv(path)
            if lacking := [c for c in ("client_id", "sample_path") if c not in mapping]:
                problem = f"has no column {lacking[0]}, only {', '.join(mapping.columns)}"
                raise UserError(f"{path}: {problem}; expected client_id,sample_path,label_name,label_id")
            if len(empty := np.flatnonzero((mapping["client_id"] == "") | (mapping["sample_path"] == ""))):
                raise UserError(
                    f"{path}: client_id or sample_path is empty in {len(empty)} rows, first in {empty[0] + 2}"
                )
            categories, names = self._places(path, mapping["sample_path"])
            owner = f"{split}-" + mapping["client_id"]
            parts.append(pd.DataFrame({"category": categories, "name": names, "split": split, "owner": owner}))
        self.__dict__.pop("_category_of", None)  # large, and of no further use
        images = pd.concat(parts, ignore_index=True).astype(object)
        above = images["category"].map(self._above)
        paths = IMAGES + "/" + above + "/" + images["category"] + "/" + images["name"]
        if (twice := paths.duplicated()).any():
            raise UserError(f"{self._mapping}: {twice.sum()} images are listed twice ({few(paths[twice])})")
        labels = images["category"].map(label).to_numpy(dtype=np.int64)
        columns = {"label": labels, "split": images["split"], "owner": images["owner"], "parent": above, "path": paths}
        return pd.DataFrame(columns)

    def __getitem__(self, index: int) -> Image.Image:
        """Return one image as RGB, in its own size."""
        return open_image(self.root / self.path(index))

    def fingerprint(self) -> list[str]:
        """Return a digest of the table, which images there are, with class, split and owner, and the classes."""
        return [table_digest(self.table), *self.class_names]

    @cached_property
    def _above(self) -> dict[str, str]:
        """The supercategory of every category, by the category's number."""
        folder = self.root / IMAGES
        pairs = [(category, above) for above in list_folders(folder) for category in list_folders(folder / above)]
        if not pairs:
            raise wrong_folder(folder, "has no category folders", TREE)
        if strange := [f"{a}/{c}" for c, a in pairs if not c.isdecimal()]:
            raise wrong_folder(folder, f"has categories that are not numbers ({few(strange)})", TREE)
        categories = dict(sorted(pairs, key=lambda pair: int(pair[0])))
        if len(categories) < len(pairs):
            twice = [f"{a}/{c}" for c, a in pairs if categories[c] != a]
            raise wrong_folder(folder, f"has categories in two supercategories ({few(twice)})", TREE)
        return categories

    @cached_property
    def _category_of(self) -> dict[str, str]:
        """The category of every image on disk, by file name; only asked for where the mapping has no folders."""
        folder = self.root / IMAGES
        return {name: c for c, above in self._above.items() for name in list_images(folder / above / c)}

    def _places(self, path: Path, sample_paths: pd.Series) -> tuple[list[str], list[str]]:
        """Return category and file name of every image of a mapping, given as path (from any folder) or as name."""
        parts = [text.replace("\\", "/").rsplit("/", 2)[-2:] for text in sample_paths]
        names = [part[-1] for part in parts]
        categories = [part[0] if len(part) == 2 else self._category_of.get(part[0], "") for part in parts]
        if unknown := [i for i, category in enumerate(categories) if category not in self._above]:
            problem = f"names {len(unknown)} of {len(names)} images that are in no folder of {self.root / IMAGES}"
            raise UserError(f"{path}: {problem} ({few(sample_paths.iloc[unknown])}); unpack train_val2019.tar.gz there")
        return categories, names
