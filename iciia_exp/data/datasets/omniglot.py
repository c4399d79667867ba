"""Omniglot: handwritten characters of 50 alphabets, every character drawn once by each of 20 people.

Source: B. M. Lake, R. Salakhutdinov, J. B. Tenenbaum, "Human-level concept learning through probabilistic program
induction", Science 350:1332-1338, 2015; https://github.com/brendenlake/omniglot, folder ``python``.

A client is a writer: the people who drew an alphabet are dealt to splits, so every character is in every split and no
writer in two.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from iciia_exp.data.dataset import SPLITS, ImageDataset, wrong_folder
from iciia_exp.data.datasets.torchvision_sets import download_root, downloading
from iciia_exp.data.readers.files import list_images
from iciia_exp.digest import digest
from iciia_exp.errors import ConfigError, UserError, check_choice, check_int, first_line
from iciia_exp.seeding import generator

__all__ = ["Omniglot"]

#: People who drew an alphabet.
DRAWERS = 20

# Folder of each part, in its zip file too. The small sets are parts of `background` and overlap.
_FOLDERS = {
    "background": "images_background",
    "evaluation": "images_evaluation",
    "small1": "images_background_small1",
    "small2": "images_background_small2",
}
_DOWNLOADS = ("background", "evaluation")
_WHAT = "Omniglot (folder python of https://github.com/brendenlake/omniglot)"
_TREE = """\
<root>/images_background.zip, or unpacked:
<root>/images_background/<alphabet>/<character>/<id>_<drawer>.png
and the same for images_evaluation, images_background_small1 or images_background_small2;
a folder omniglot-py between, and zip files called omniglot_images_..., are found too;
or set dataset.download=true"""
_IMAGE = re.compile(r"([^/]+)/([^/]+)/(\d+_(\d+)\.png)")


class _Image(NamedTuple):
    alphabet: str
    character: str
    file: str
    drawer: int
    part: Path  # the zip file or folder
    path: str  # within the part

    @property
    def name(self) -> str:
        """Name of the class."""
        return f"{self.alphabet}/{self.character}"


class Omniglot(ImageDataset):
    """Characters of 105x105 pixels, dark ink on white. Class: alphabet and character. Owner: alphabet and drawer.

    The same number of a drawer in two alphabets is not the same person. The parent category is the alphabet.

    Args:
        root: folder with the zip files (read as they are) or their content.
        download: let torchvision download what is missing of ``background`` and ``evaluation`` when the dataset is
            first read.
        subset: ``all``: every part that is found; or one or several of background, evaluation, small1 and small2. An
            image that is in several parts counts once.
        drawers: how many of the 20 people who drew an alphabet are in each split; 0 leaves ``backbone`` or
            ``val`` empty.
        seed: seed of that deal, which is made for every alphabet by itself.
    """

    name = "omniglot"
    cosmetic = frozenset({"root", "download", "subset"})  # `fingerprint` lists the images

    def __init__(
        self,
        root: str | Path | None,
        drawers: Mapping[str, int],
        download: bool = False,
        subset: str | Sequence[str] = "all",
        seed: int = 0,
    ) -> None:
        given = [subset] if isinstance(subset, str) else list(subset)
        self.subset = [check_choice("subset", name, ("all", *_FOLDERS)) for name in given]
        if not self.subset or ("all" in self.subset and len(self.subset) > 1):
            raise ConfigError("subset", subset, f"must be all, or one or several of {', '.join(_FOLDERS)}")
        self.seed = check_int("seed", seed, 0)
        if set(drawers) != set(SPLITS):
            raise ConfigError(
                "drawers", dict(drawers), f"must give a number of drawers for each of {', '.join(SPLITS)}"
            )
        least = {"backbone": 0, "train": 1, "val": 0, "test": 1}
        self.drawers = {s: check_int(f"drawers.{s}", drawers[s], least[s], DRAWERS) for s in SPLITS}
        if (total := sum(self.drawers.values())) != DRAWERS:
            raise ConfigError("drawers", self.drawers, f"must add up to the {DRAWERS} of an alphabet, not to {total}")
        self.download = download
        self.root = download_root(root, download, _WHAT, _TREE)
        if download and not set(self.subset) & {"all", *_DOWNLOADS}:
            raise ConfigError("download", True, "only background and evaluation can be downloaded; add one to subset")

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files out."""
        return {k: v for k, v in self.__dict__.items() if k != "_zips"}

    # ---- files

    def _find(self, part: str) -> Path | None:
        """Return the zip file or the folder of a part; a zip file first, for a folder may be half unpacked."""
        folder = _FOLDERS[part]
        names = (f"{folder}.zip", f"omniglot_{folder}.zip", folder)
        places = [place / name for name in names for place in (self.root, self.root / "omniglot-py")]
        return next((place for place in places if place.exists()), None)

    def _download(self, part: str) -> None:
        from torchvision import datasets

        source, file = datasets.Omniglot, f"{_FOLDERS[part]}.zip"
        bring = {f"{source.download_url_prefix}/{file}": self.root / "omniglot-py" / file}
        with downloading(_WHAT, self.root, bring):
            found = self._find(part)
            if found is None or (found.suffix == ".zip" and not zipfile.is_zipfile(found)):  # broken off, say
                source(str(self.root), background=part == "background", download=True)

    @cached_property
    def _parts(self) -> list[Path]:
        """The zip files and folders that are used."""
        wanted = list(_FOLDERS) if self.subset == ["all"] else self.subset
        if self.download:
            for part in wanted:
                if part in _DOWNLOADS:
                    self._download(part)
        found = {part: self._find(part) for part in wanted}
        missing = [part for part, path in found.items() if path is None]
        if missing and (self.subset != ["all"] or len(missing) == len(wanted)):
            what = f"{missing[0]} ({_FOLDERS[missing[0]]})" if self.subset != ["all"] else "Omniglot"
            raise wrong_folder(self.root, f"{what} is not there", _TREE)
        return [path for path in found.values() if path is not None]

    @staticmethod
    def _list(part: Path) -> list[str]:
        """Return the paths of the files in a part."""
        if part.is_dir():
            return list_images(part)
        try:
            with zipfile.ZipFile(part) as archive:
                return archive.namelist()
        except zipfile.BadZipFile as error:
            raise UserError(f"{part}: cannot be read ({first_line(error)}); delete it and bring it again") from error

    @cached_property
    def _images(self) -> list[_Image]:
        """Every image once, ordered by alphabet, character and file name."""
        images: dict[tuple[str, str, str], _Image] = {}
        for part in self._parts:
            for path in self._list(part):
                match = _IMAGE.fullmatch("/".join(path.split("/")[-3:]))
                if match is None or path.startswith("__MACOSX/"):
                    continue
                alphabet, character, file, drawer = match.groups()
                if not 1 <= int(drawer) <= DRAWERS:
                    raise wrong_folder(part, f"{path}: the number of its drawer is not 1 to {DRAWERS}", _TREE)
                image = _Image(alphabet, character, file, int(drawer), part, path)
                images.setdefault((alphabet, character, file), image)
        if not images:
            raise wrong_folder(self.root, f"{', '.join(part.name for part in self._parts)} has no images", _TREE)
        return [images[key] for key in sorted(images)]

    # ---- the dataset

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Alphabet and character, ``Greek/character01``."""
        return tuple(sorted({image.name for image in self._images}))

    def fingerprint(self) -> str:
        """Return a digest of the images' names: what a name stands for is fixed."""
        return digest([[image.name, image.file] for image in self._images])

    @property
    def has_backbone_images(self) -> bool:
        """Whether drawers are set aside for the backbone."""
        return self.drawers["backbone"] > 0

    def load_table(self) -> pd.DataFrame:
        """Return label, split, owner, parent and path, ordered by class and file name."""
        images = self._images
        number = {name: label for label, name in enumerate(self.class_names)}
        of_drawer = np.repeat(np.array(list(self.drawers), dtype=object), list(self.drawers.values()))
        alphabets = {image.alphabet for image in images}
        deals = {name: generator("omniglot", self.seed, name).permutation(of_drawer) for name in alphabets}
        return pd.DataFrame(
            {
                "label": [number[image.name] for image in images],
                "split": [deals[image.alphabet][image.drawer - 1] for image in images],
                "owner": [f"{image.alphabet}/drawer{image.drawer:02d}" for image in images],
                "parent": [image.alphabet for image in images],
                "path": [(image.part.relative_to(self.root) / image.path).as_posix() for image in images],
            }
        )

    def __getitem__(self, index: int) -> Image.Image:
        """Return one image of 105x105 pixels, grey (L): ink 0, paper 255."""
        image = self._images[index]
        if image.part.is_dir():
            return Image.open(image.part / image.path).convert("L")
        return Image.open(io.BytesIO(self._open(image.part).read(image.path))).convert("L")

    def _open(self, part: Path) -> zipfile.ZipFile:
        """Return the zip file, opened by this process: a handle shared after a fork would share its position."""
        zips: dict[tuple[int, Path], zipfile.ZipFile] = self.__dict__.setdefault("_zips", {})
        key = (os.getpid(), part)
        if key not in zips:
            zips[key] = zipfile.ZipFile(part)
        return zips[key]
