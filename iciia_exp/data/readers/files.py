"""File readers: folders of files, and CSV tables."""

import codecs
import csv
import io
import logging
import os
import re
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from iciia_exp.errors import ConfigError, UserError, first_line, printable

__all__ = [
    *("check_distinct", "existing_file", "few", "list_files", "list_folders", "list_images", "read_csv", "read_text"),
]

log = logging.getLogger(__name__)

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SEPARATORS = (",", ";", "\t", "|")

_PATIENCE = 10.0  # seconds between two lines of a long listing

#: Extensions of the image files of published datasets, in lower case.
EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def list_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden folders and those of macOS's archives."""
    return sorted(entry.name for entry in _entries(folder) if not _hidden(entry.name) and entry.is_dir())


def list_images(folder: Path) -> list[str]:
    """Return the image files (`EXTENSIONS`) in a folder and the folders below, as `list_files`."""
    return list_files(folder, EXTENSIONS)[0]


def list_files(folder: Path, extensions: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return the files in a folder and the folders below that have one of some extensions, and the others.

    Both are sorted, relative to ``folder``, with ``/``. Hidden files and folders are left out, and so are links to a
    folder above. No file is asked for more than its name: on a network disk, a million requests take an hour. Raises a
    `UserError` for a folder that cannot be read, and for a name that is not UTF-8.
    """
    found: list[str] = []
    others: list[str] = []
    waiting: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(str(folder), "", frozenset(_identity(folder)))]
    said = time.monotonic()
    while waiting:
        if time.monotonic() - said > _PATIENCE:
            said = time.monotonic()
            log.info("%s: %s files listed so far", folder, f"{len(found) + len(others):,}")
        path, prefix, above = waiting.pop()
        for entry in _entries(path):
            name = entry.name
            if _hidden(name):
                continue
            if name.lower().endswith(extensions):
                # a link counts as a file, to whatever it leads
                if not entry.is_dir(follow_symlinks=False):
                    found.append(prefix + name)
                    continue
            elif not entry.is_dir():
                others.append(prefix + name)
                continue
            here = _identity(entry.path)
            if here.isdisjoint(above):
                waiting.append((entry.path, f"{prefix}{name}/", above | here))
    for name in (*found, *others):
        if not name.isascii() and (wrong := name.encode("utf-8", "backslashreplace").decode()) != name:
            raise UserError(f"{folder}: the name of {wrong} is not UTF-8; rename it")
    return sorted(found), sorted(others)


def _identity(folder: Path | str) -> set[tuple[int, int]]:
    """Return what identifies a folder by whatever path; empty if it cannot be asked."""
    try:
        status = os.stat(folder)
    except OSError:
        return set()
    return {(status.st_dev, status.st_ino)}


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error


def read_csv(path: Path, required: Sequence[str] = ()) -> pd.DataFrame:
    """Return a CSV file with a header as stripped text; missing cells are empty.

    Cells are separated by commas, semicolons, tabs or bars. The text is UTF-8 or UTF-16; other bytes are read as
    Windows-1252, with a warning. A file that is missing, not a CSV file, or without a required column raises
    `UserError`.
    """
    text, options = read_text(path), {"dtype": object, "keep_default_na": False, "index_col": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            options["sep"] = _separator(text)
            table = pd.read_csv(io.StringIO(text), skipinitialspace=True, **options)  # type: ignore[call-overload]
    except (ValueError, csv.Error, pd.errors.ParserWarning) as error:
        problem = first_line(error)
        if isinstance(error, pd.errors.ParserWarning):
            problem = "rows have more cells than the header; put texts with the separator in quotes"
        raise UserError(f"{path}: cannot be read as a CSV file ({problem})") from error
    table.columns = table.columns.str.strip()
    if lacking := [column for column in required if column not in table]:
        header = ", ".join(printable(column, lines=False) for column in table.columns)
        raise UserError(f"{path}: has no column {lacking[0]}, only {header}; expected {','.join(required)}")
    if not len(table):
        raise UserError(f"{path}: has a header and no rows")
    table = table.fillna("").apply(lambda column: column.str.strip())
    if len(table.columns) > 1 and len(again := np.flatnonzero((table == table.columns).all(axis=1))):
        raise UserError(f"{path}: row {again[0] + 1} repeats the header; remove it")
    return table


def read_text(path: Path) -> str:
    """Return the text of a file of prompts or of a table; encodings and errors as of `read_csv`."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; it must be a CSV file with a header") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if b"\0" in content and not content.startswith(_UTF16):
        raise UserError(f"{path}: cannot be read as a CSV file (it is no text); save it as CSV, in UTF-8")
    try:
        return content.decode("utf-16" if content.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError:
        log.warning("%s: is not UTF-8; reading it as Windows-1252", path)
        return content.decode("cp1252", "replace")


def _separator(text: str) -> str:
    """Return the separator that cuts the header, quoted texts left out, into most columns; the comma in a tie."""
    header = re.sub(r'"[^"]*"', "", text.lstrip().partition("\n")[0])
    return max(_SEPARATORS, key=header.count)


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
    texts = [printable(name, lines=False) for name in names]
    more = len(texts) - show
    return ", ".join(texts[:show]) + (f" and {more} more" if more > 0 else "")
