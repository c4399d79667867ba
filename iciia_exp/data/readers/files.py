"""Files: finding and opening images, and reading the tables beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from PIL import Image

from iciia_exp.errors import ConfigError, UserError, first_line

__all__ = ["EXTENSIONS", "existing_file", "few", "list_folders", "list_images", "open_image", "read_csv"]

#: Of image files, in any case.
EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def list_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def list_images(folder: Path) -> list[str]:
    """Return the image files in a folder and the folders below, sorted, relative to it, with ``/``.

    Files are known by their extension (`EXTENSIONS`); hidden files are left out. Nothing is asked about a file beyond
    its name: on a network disk, a million questions take an hour.
    """
    found: list[str] = []
    waiting = [(str(folder), "")]
    while waiting:
        path, prefix = waiting.pop()
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if name.lower().endswith(EXTENSIONS):
                    found.append(prefix + name)
                elif entry.is_dir():
                    waiting.append((entry.path, f"{prefix}{name}/"))
    found.sort()
    return found


def open_image(path: Path) -> Image.Image:
    """Return an image file's exact pixels as RGB; raises what Pillow raises where it is missing or damaged."""
    with Image.open(path) as image:
        return image.convert("RGB")


def read_csv(path: Path) -> pd.DataFrame:
    """Return a CSV file as text, without blanks around it; raises `UserError` where it is no such file."""
    try:
        table = pd.read_csv(path, dtype=object, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
    except ValueError as error:
        raise UserError(f"{path}: is not a CSV file ({first_line(error)})") from error
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes what is too much for names of rows
        raise UserError(
            f"{path}: is not a CSV file (rows have more cells than the header; put texts with commas in quotes)"
        )
    table.columns = table.columns.str.strip()
    for column in table:
        table[column] = table[column].fillna("").str.strip()
    return table


def existing_file(key: str, path: str | Path, what: str) -> Path:
    """Return the path of a file that a constructor's argument ``key`` names, or raise an error that says ``what``."""
    file = Path(path).expanduser()
    if not file.is_file():
        problem = "is not a file" if file.exists() else "there is no such file"
        raise ConfigError(key, path, f"{problem}; give {what}")
    return file


def few(names: Iterable[object], show: int = 3) -> str:
    """Return the first names of many, for a message.

    >>> few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    texts = [str(name) for name in names]
    more = len(texts) - show
    return ", ".join(texts[:show]) + (f" and {more} more" if more > 0 else "")
