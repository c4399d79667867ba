"""File readers: folders of images, images, and CSV tables."""

import csv
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from iciia_exp.errors import ConfigError, UserError, first_line

__all__ = ["check_distinct", "existing_file", "few", "list_folders", "list_images", "open_image", "read_csv"]

#: Extensions of image files, in lower case.
EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def list_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden folders."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def list_images(folder: Path) -> list[str]:
    """Return the image files in a folder and the folders below, sorted, relative to it, with ``/``.

    Files are recognized by their extension (`EXTENSIONS`); hidden files are left out. No file is asked for more than
    its name: on a network disk, a million requests take an hour.
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
    """Return an image file as RGB; Pillow raises an error for a missing or damaged file."""
    with Image.open(path) as image:
        return image.convert("RGB")


def read_csv(path: Path, required: Sequence[str] = ()) -> pd.DataFrame:
    """Return a CSV file with a header as stripped text; missing cells are empty.

    A file that is missing, not a CSV file, or without a required column raises `UserError`.
    """
    options: dict[str, Any] = {"dtype": object, "keep_default_na": False, "encoding": "utf-8-sig", "index_col": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(path, skipinitialspace=True, **options)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; it must be a CSV file with a header") from error
    except (OSError, ValueError, csv.Error, pd.errors.ParserWarning) as error:
        problem = first_line(error)
        if isinstance(error, pd.errors.ParserWarning):
            problem = "rows have more cells than the header; put texts with commas in quotes"
        raise UserError(f"{path}: cannot be read as a comma-separated UTF-8 file ({problem})") from error
    table.columns = table.columns.str.strip()
    if lacking := [column for column in required if column not in table]:
        header = ", ".join(table.columns)
        raise UserError(f"{path}: has no column {lacking[0]}, only {header}; expected {','.join(required)}")
    return table.fillna("").apply(lambda column: column.str.strip())


def check_distinct(source: Path, values: pd.Series, what: str, hint: str = "") -> None:
    """Raise `UserError` if a value occurs more than once."""
    if (repeated := values.duplicated()).any():
        raise UserError(f"{source}: {repeated.sum()} {what} are listed twice ({few(values[repeated])}){hint}")


def existing_file(key: str, path: str | Path, what: str) -> Path:
    """Return the path of an existing file; an error names the argument ``key`` and says ``what`` the file must be."""
    file = Path(path).expanduser()
    if not file.is_file():
        problem = "is not a file" if file.exists() else "there is no such file"
        raise ConfigError(key, path, f"{problem}; give {what}")
    return file


def few(names: Iterable[object], show: int = 3) -> str:
    """Return the first names of a list, for a message.

    >>> few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    texts = [str(name) for name in names]
    more = len(texts) - show
    return ", ".join(texts[:show]) + (f" and {more} more" if more > 0 else "")
