"""Omniglot: handwritten characters of 50 alphabets, every character drawn once by each of 20 people.

Source: B. M. Lake, R. Salakhutdinov, J. B. Tenenbaum, "Human-level concept learning through probabilistic program
induction", Science 350:1332-1338, 2015; https://github.com/brendenlake/omniglot, folder ``python``.

A client is a writer. The writers of each alphabet are assigned to splits, so every character is in every split and
every writer in one.
"""

import io
import os
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from iciia_exp.data.content import Content
from iciia_exp.data.dataset import SPLITS, ImageDataset, wrong_folder
from iciia_exp.data.datasets.torchvision_sets import download_root, downloading
from iciia_exp.data.readers.files import list_images
from iciia_exp.data.readers.images import open_image, open_stream
from iciia_exp.digest import digest
from iciia_exp.errors import ConfigError, UserError, check_choice, check_int, first_line
from iciia_exp.seeding import generator

__all__ = ["Omniglot"]

#: Writers of an alphabet.
DRAWERS = 20

# Folder of each part. The small sets are overlapping parts of `background`.
_FOLDERS = {
    "background": "images_background",
    "evaluation": "images_evaluation",
    "small1": "images_background_small1",
    "small2": "images_background_small2",
}
_LARGEST = 1 << 16  # bytes of an image in a zip file
_DOWNLOADS = ("background", "evaluation")
_WHAT = "Omniglot (folder python of https://github.com/brendenlake/omniglot)"
_TREE = """\
<root>/images_background.zip, or unpacked:
<root>/images_background/<alphabet>/<character>/<id>_<drawer>.png
and the same for images_evaluation, images_background_small1 or images_background_small2;
a folder omniglot-py between, and zip files named omniglot_images_..., are also found;
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


def _crc(path: Path) -> bytes:
    """Return the CRC-32 of a file, 8 bytes; empty if it cannot be read."""
    try:
        return zlib.crc32(path.read_bytes()).to_bytes(8, "little")
    except OSError:
        return b""


class Omniglot(ImageDataset):
    """Characters of 105x105 pixels, dark on white. The class is the alphabet and character, the parent the alphabet.

    The owner is the alphabet and drawer: drawers of two alphabets with the same number are different people.

    Args:
        root: folder with the zip files (read without unpacking) or their content.
        download: let torchvision download what is missing of ``background`` and ``evaluation`` when the dataset is
            first read.
        subset: ``all``: every part that is found; or one or several of background, evaluation, small1 and small2. An
            image in several parts counts once.
        drawers: how many of the 20 drawers of an alphabet are in each split; ``backbone`` and ``val`` may be 0.
        seed: seed of the assignment of drawers to splits, separate for each alphabet.
    """

    name = "omniglot"
    cosmetic = frozenset({"root", "download", "subset"})  # `fingerprint` lists the images
    open_files = frozenset({"_zips"})

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
            problem = f"must give a number of drawers for each of {', '.join(SPLITS)}"
            raise ConfigError("drawers", dict(drawers), problem)
        least = {"backbone": 0, "train": 1, "val": 0, "test": 1}
        self.drawers = {s: check_int(f"drawers.{s}", drawers[s], least[s], DRAWERS) for s in SPLITS}
        if (total := sum(self.drawers.values())) != DRAWERS:
            raise ConfigError("drawers", self.drawers, f"must add up to the {DRAWERS} of an alphabet, not to {total}")
        self.download = download
        self.root = download_root(root, download, _WHAT, _TREE)
        if download and not set(self.subset) & {"all", *_DOWNLOADS}:
            raise ConfigError("download", True, "only background and evaluation can be downloaded; add one to subset")

    def _find(self, part: str) -> Path | None:
        """Return the zip file of a part, or its folder, which may be unpacked incompletely."""
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
            if found is None or (found.suffix == ".zip" and not zipfile.is_zipfile(found)):
                source(str(self.root), background=part == "background", download=True)

    @cached_property
    def _parts(self) -> list[Path]:
        wanted = list(_FOLDERS) if self.subset == ["all"] else self.subset
        for part in _DOWNLOADS:
            if self.download and part in wanted:
                self._download(part)
        found = {part: path for part in wanted if (path := self._find(part)) is not None}
        missing = [f"{part} ({_FOLDERS[part]})" for part in wanted if part not in found]
        if not found or (missing and self.subset != ["all"]):
            what = "Omniglot" if self.subset == ["all"] else missing[0]
            raise wrong_folder(self.root, f"{what} is not there", _TREE)
        return list(found.values())

    @staticmethod
    def _list(part: Path) -> list[str]:
        if part.is_dir():
            return list_images(part)
        try:
            with zipfile.ZipFile(part) as archive:
                return archive.namelist()
        except zipfile.BadZipFile as error:
            raise UserError(f"{part}: cannot be read ({first_line(error)}); delete it and copy it again") from error

    @cached_property
    def _images(self) -> list[_Image]:
        """Every image once, ordered by alphabet, character and file name."""
        images: dict[tuple[str, ...], _Image] = {}
        for part in self._parts:
            for path in self._list(part):
                match = _IMAGE.fullmatch("/".join(path.split("/")[-3:]))
                if match is None or path.startswith("__MACOSX/"):
                    continue
                alphabet, character, file, drawer = match.groups()
                if not 1 <= int(drawer) <= DRAWERS:
                    raise wrong_folder(part, f"{path}: the number of its drawer is not 1 to {DRAWERS}", _TREE)
                image = _Image(alphabet, character, file, int(drawer), part, path)
                images.setdefault(image[:3], image)
        if not images:
            raise wrong_folder(self.root, f"{', '.join(part.name for part in self._parts)} has no images", _TREE)
        return [images[key] for key in sorted(images)]

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Alphabet and character, ``Greek/character01``."""
        return tuple(sorted({image.name for image in self._images}))

    def fingerprint(self) -> str:
        """Return a digest of the names of the images."""
        return digest([[image.name, image.file] for image in self._images])

    def content(self, kept: Content) -> str:
        """Return a digest of the images' bytes by their CRC-32, which a zip file lists: the same for its content."""
        check: dict[_Image, int] = {}
        for part in self._parts:
            images = [image for image in self._images if image.part == part]
            if part.is_dir():
                found = kept.each(part, [image.path for image in images], _crc, "CRC-32").tolist()
            else:
                with zipfile.ZipFile(part) as archive:
                    found = [archive.getinfo(image.path).CRC for image in images]
            check |= dict(zip(images, found, strict=True))
        return digest([check[image] for image in self._images])

    @property
    def has_backbone_images(self) -> bool:
        """Whether drawers are reserved for the backbone."""
        return self.drawers["backbone"] > 0

    def load_table(self) -> pd.DataFrame:
        """Return label, split, owner, parent and path, ordered by class and file name."""
        number = {name: label for label, name in enumerate(self.class_names)}
        of_drawer = np.repeat(np.array(list(self.drawers), dtype=object), list(self.drawers.values()))
        alphabets = {image.alphabet for image in self._images}
        splits = {name: generator("omniglot", self.seed, name).permutation(of_drawer) for name in alphabets}
        rows = [
            {
                "label": number[image.name],
                "split": splits[image.alphabet][image.drawer - 1],
                "owner": f"{image.alphabet}/drawer{image.drawer:02d}",
                "parent": image.alphabet,
                "path": (image.part.relative_to(self.root) / image.path).as_posix(),
            }
            for image in self._images
        ]
        return pd.DataFrame(rows)

    def __getitem__(self, index: int) -> Image.Image:
        """Return one image of 105x105 pixels, grey (L): ink 0, paper 255."""
        image = self._images[index]
        if image.part.is_dir():
            with open_image(image.part / image.path) as picture:
                return picture.convert("L")
        packed = self._open(image.part)
        if (size := packed.getinfo(image.path).file_size) > _LARGEST:
            raise ValueError(f"would be unpacked to {size:,} bytes, an image of Omniglot has some hundred")
        return open_stream(io.BytesIO(packed.read(image.path))).convert("L")

    def _open(self, part: Path) -> zipfile.ZipFile:
        """Return the zip file, opened by this process: processes cannot share the position in a file."""
        zips: dict[tuple[int, Path], zipfile.ZipFile] = self.__dict__.setdefault("_zips", {})
        key = (os.getpid(), part)
        if key not in zips:
            zips[key] = zipfile.ZipFile(part)
        return zips[key]
