"""VTAB-1K: 19 classification tasks with 800 train and 200 val images each; or any datasets in the same layout.

Source: X. Zhai et al., "A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark",
arXiv 1910.04867; the lists of images that the literature on parameter-efficient tuning uses.

Several datasets lie side by side, each a task with classes of its own.
"""

import re
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from iciia_exp.data.dataset import ImageFiles, existing_root, wrong_folder
from iciia_exp.data.readers.files import few, list_folders
from iciia_exp.errors import UserError, first_line

__all__ = ["GROUPS", "Vtab"]

#: Group of each task, by the name of its folder in the usual archive.
GROUPS = {
    **dict.fromkeys(
        ("caltech101", "cifar", "dtd", "oxford_flowers102", "oxford_iiit_pet", "sun397", "svhn"), "Natural"
    ),
    **dict.fromkeys(("diabetic_retinopathy", "eurosat", "patch_camelyon", "resisc45"), "Specialized"),
    **dict.fromkeys(
        ("clevr_count", "clevr_dist", "dmlab", "dsprites_loc", "dsprites_ori", "kitti", "smallnorb_azi"), "Structured"
    ),
    "smallnorb_ele": "Structured",
}

TREE = """\
<task>/train800.txt   lines of a path within <task> and the number of a class: images/train/000001.png 12
<task>/val200.txt
<task>/test.txt
<task>/images/...
for any number of tasks; the names of VTAB-1K's tasks are cifar, dtd, svhn ..."""

#: Lists of images by split; other numbers of images may be in the names.
_LISTS = {"train": r"train\d*\.txt", "val": r"val\d*\.txt", "test": r"test\d*\.txt"}


class Vtab(ImageFiles):
    """Tasks side by side, in the layout of `TREE`. The parent of a class is its task.

    Args:
        root: folder of the tasks.
    """

    name = "vtab"
    cosmetic = frozenset({"root"})

    def __init__(self, root: str | Path | None) -> None:
        self.root = existing_root(root, "VTAB-1K, or of other tasks", TREE)

    @cached_property
    def _lists(self) -> dict[str, dict[str, Path]]:
        """The lists of every task, by split."""
        found = {}
        for task in list_folders(self.root):
            files = sorted(p.name for p in (self.root / task).iterdir() if p.is_file())
            lists = {
                split: [name for name in files if re.fullmatch(pattern, name)] for split, pattern in _LISTS.items()
            }
            if not lists["train"] and not lists["test"]:
                continue
            for split, names in lists.items():
                if len(names) != 1:
                    problem = f"has {'no list' if not names else 'several lists: ' + few(names)}"
                    raise wrong_folder(self.root / task, f"{problem} of its {split} images", TREE)
            found[task] = {split: self.root / task / names[0] for split, names in lists.items()}
        if not found:
            raise wrong_folder(self.root, "has no folder with lists of images", TREE)
        return found

    @cached_property
    def _images(self) -> pd.DataFrame:
        """Task, split, path and number of the class, in the order of the lists."""
        rows = []
        for task, lists in self._lists.items():
            for split, file in lists.items():
                try:
                    lines = file.read_text(encoding="utf-8").splitlines()
                except (OSError, UnicodeDecodeError) as error:
                    raise UserError(f"{file}: cannot be read ({first_line(error)})") from error
                for number, line in enumerate(lines, 1):
                    path, _, label = line.strip().rpartition(" ")
                    if line.strip() and not (path and re.fullmatch(r"\d{1,6}", label)):
                        raise UserError(f"{file}, line {number}: expected a path and the number of a class: {line!r}")
                    if path:
                        rows.append((task, split, f"{task}/{path}", int(label)))
        return pd.DataFrame(rows, columns=["task", "split", "path", "number"])

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Task and number of the class, ``dtd/07``."""
        return tuple(sorted(set(self._names)))

    @cached_property
    def _names(self) -> list[str]:
        """The class of every image."""
        images = self._images
        width = len(str(images["number"].max()))
        return [f"{task}/{number:0{width}d}" for task, number in zip(images["task"], images["number"], strict=True)]

    def load_table(self) -> pd.DataFrame:
        """Return label, split, owner, parent, group and path, by task, in the order of the lists."""
        images, number = self._images, {name: label for label, name in enumerate(self.class_names)}
        if twice := images["path"][images["path"].duplicated()].tolist():
            raise UserError(f"{self.root}: lists name an image twice ({few(twice)}); train and val must be apart")
        labels = np.array([number[name] for name in self._names], dtype=np.int64)
        table = pd.DataFrame({"label": labels, "split": images["split"], "owner": None, "parent": images["task"]})
        return table.assign(group=images["task"].map(GROUPS), path=images["path"])
