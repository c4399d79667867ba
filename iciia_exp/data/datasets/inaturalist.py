"""iNaturalist 2019: with FedScale's mapping of images to the people who took them.

Sources: images https://github.com/visipedia/inat_comp/tree/master/2019 (``train_val2019.tar.gz``); mapping F. Lai et
al., "FedScale: Benchmarking Model and System Performance of Federated Learning at Scale", arXiv:2105.11367,
https://github.com/SymbioticLab/FedScale (benchmark/dataset/inaturalist). Published with ICIIA: 1,901 clients to train
and 394 to test, 193,210 images, 1,010 species.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from iciia_exp.data.dataset import ImageFiles, check_layout, existing_root, wrong_folder
from iciia_exp.data.readers.files import check_distinct, few, list_folders, list_images, read_csv
from iciia_exp.errors import UserError

__all__ = ["INaturalist"]

WHAT = (
    "iNaturalist 2019 (train_val2019.tar.gz, https://github.com/visipedia/inat_comp/tree/master/2019) with FedScale's "
    "clients (client_data_mapping, https://github.com/SymbioticLab/FedScale, benchmark/dataset/inaturalist)"
)

TREE = """train_val2019/<supercategory>/<category>/<image>.jpg
client_data_mapping/train.csv (columns client_id,sample_path,label_name,label_id)
client_data_mapping/test.csv
client_data_mapping/val.csv (optional)"""

IMAGES = "train_val2019"

# Places of the unpacked archive of FedScale.
_MAPPINGS = ("client_data_mapping", "inaturalist/client_data_mapping")

# FedScale's files, in this order, and their splits.
_SPLITS = {"train.csv": "train", "val.csv": "val", "test.csv": "test"}


class INaturalist(ImageFiles):
    """Photographs of 1,010 species; the owner is the photographer, the parent the supercategory (Plants, Birds, ...).

    The class of an image is its folder, as in FedScale's reader. Client numbers are unique within their file only, so
    an owner is, for example, ``train-17``.

    Args:
        root: folder with train_val2019 and client_data_mapping; see `TREE`.
    """

    name = "inaturalist"
    cosmetic: ClassVar[frozenset[str]] = frozenset({"root"})

    def __init__(self, root: str | Path | None) -> None:
        self.root = existing_root(root, WHAT, TREE)
        check_layout(self.root, TREE, f"{IMAGES}/")
        place = next((place for place in _MAPPINGS if (self.root / place).is_dir()), _MAPPINGS[0])
        check_layout(self.root, TREE, f"{place}/")
        self._mapping = self.root / place
        check_layout(self._mapping, TREE, "train.csv", "test.csv")

    @property
    def class_names(self) -> Sequence[str]:
        """The category folders, such as ``Plants/400``, by number: iNaturalist's order of labels."""
        return [f"{above}/{category}" for category, above in self._above.items()]

    def load_table(self) -> pd.DataFrame:
        """Return the images of train.csv, val.csv and test.csv, in the order of these files."""
        parts = []
        for file, split in _SPLITS.items():
            path = self._mapping / file
            if not path.is_file():
                continue
            mapping = read_csv(path, ("client_id", "sample_path"))
            if len(empty := np.flatnonzero((mapping["client_id"] == "") | (mapping["sample_path"] == ""))):
                problem = f"client_id or sample_path is empty in {len(empty)} rows, first in {empty[0] + 2}"
                raise UserError(f"{path}: {problem}")
            categories, names = self._places(path, mapping["sample_path"])
            owner = f"{split}-" + mapping["client_id"]
            parts.append(pd.DataFrame({"category": categories, "name": names, "split": split, "owner": owner}))
        self.__dict__.pop("_category_of", None)  # large, and not used again
        images = pd.concat(parts, ignore_index=True).astype(object)
        above = images["category"].map(self._above)
        paths = IMAGES + "/" + above + "/" + images["category"] + "/" + images["name"]
        check_distinct(self._mapping, paths, "images")
        labels = pd.Index(list(self._above)).get_indexer(pd.Index(images["category"])).astype(np.int64)
        columns = {"label": labels, "split": images["split"], "owner": images["owner"], "parent": above, "path": paths}
        return pd.DataFrame(columns)

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
        """The category of every image on disk, by file name; used if the mapping has no folders."""
        folder = self.root / IMAGES
        return {name: c for c, above in self._above.items() for name in list_images(folder / above / c)}

    def _places(self, path: Path, sample_paths: pd.Series) -> tuple[list[str], list[str]]:
        """Return the categories and file names of a mapping's images, given as paths (from any folder) or as names."""
        parts = [text.replace("\\", "/").rsplit("/", 2)[-2:] for text in sample_paths]
        names = [part[-1] for part in parts]
        categories = [part[0] if len(part) == 2 else self._category_of.get(part[0], "") for part in parts]
        if unknown := [i for i, category in enumerate(categories) if category not in self._above]:
            problem = f"names {len(unknown)} of {len(names)} images that are in no folder of {self.root / IMAGES}"
            raise UserError(f"{path}: {problem} ({few(sample_paths.iloc[unknown])}); unpack train_val2019.tar.gz there")
        return categories, names
