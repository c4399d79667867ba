"""Metadata: labels, splits, owners, parents and times from a user's CSV file; splits where it gives none.

All but `read_metadata` are pure functions of columns of text, in which an empty cell is None.
"""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from iciia_exp.data.dataset import SPLITS
from iciia_exp.errors import ConfigError, UserError, check_float, first_line, nearest
from iciia_exp.seeding import generator

__all__ = [
    "COLUMNS",
    "check_shares",
    "deal_splits",
    "image_table",
    "number_labels",
    "parse_times",
    "read_metadata",
    "split_names",
]

#: Columns that a file may have.
COLUMNS = ("label", "split", "owner", "parent", "time")

_ALIASES = {"timestamp": "time"}
_SPLITS = {
    "backbone": "backbone",
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "selection"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_INTEGER = re.compile(r"[+-]?\d+")


def read_metadata(path: Path, required: Collection[str] = ("label",), extra: Collection[str] = ()) -> pd.DataFrame:
    """Read a CSV file with a header into columns of text; an empty cell is None.

    ``timestamp`` is read as ``time``; a column without a name (the row numbers that pandas writes) is left out. Nothing
    counts as missing but an empty cell: NA and null are names.

    Args:
        path: the file, comma-separated, UTF-8.
        required: columns without which there is no dataset; no cell of theirs may be empty.
        extra: columns allowed beside `COLUMNS`.

    Raises:
        UserError: no such file, not a CSV file, unknown or missing columns, empty cells of a required column.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            raw = pd.read_csv(
                path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True, index_col=False
            )
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; it must be a CSV file with one row per image") from error
    except (OSError, ValueError, csv.Error, pd.errors.ParserWarning) as error:
        raise UserError(f"{path}: cannot be read as a comma-separated UTF-8 file ({first_line(error)})") from error
    known = dict.fromkeys((*required, *extra, *COLUMNS))
    table = {}
    for column in raw.columns:
        text = str(column).strip()
        name = _ALIASES.get(text.lower(), text.lower())
        if not text or text.startswith("Unnamed: "):
            continue
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near}?" if near else f"rename or remove it; known: {', '.join(known)}"
            raise UserError(f"{path}: unknown column {text!r}; {hint}")
        if name in table:
            raise UserError(f"{path}: two columns for {name}; keep one")
        cells = raw[column].fillna("").str.strip().to_numpy(dtype=object)
        table[name] = cells
        table[name][cells == ""] = None
    for name in required:
        if name not in table:
            raise UserError(f"{path}: has no column {name!r}; the header is {', '.join(map(repr, raw.columns))}")
        if len(empty := np.flatnonzero(table[name] == None)):  # noqa: E711 element by element
            raise UserError(f"{path}: {name} is empty in {len(empty)} of {len(raw)} rows, first in row {empty[0] + 1}")
    return pd.DataFrame(table, dtype=object)


def number_labels(names: pd.Series) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels 0..K-1 (int64) and the names of the classes in their order.

    Classes are sorted by name; where all names are whole numbers, by number, so that 0..K-1 keep their own.

    >>> number_labels(pd.Series(["10", "2", "10"]))
    (array([1, 0, 1]), ('2', '10'))
    """
    texts = names.to_numpy(dtype=object)
    unique = pd.unique(texts)
    if all(_INTEGER.fullmatch(name) for name in unique):
        order = sorted({int(name) for name in unique})
        rank = {number: i for i, number in enumerate(order)}
        label = {name: rank[int(name)] for name in unique}  # 1 and 01 are one class
        classes = tuple(map(str, order))
    else:
        classes = tuple(sorted(unique))
        label = {name: i for i, name in enumerate(classes)}
    return np.array([label[name] for name in texts], dtype=np.int64), classes


def split_names(splits: pd.Series, source: Path | str) -> np.ndarray:
    """Return the names in `SPLITS` for what people call them: ``valid``, ``validation`` and ``dev`` are val.

    Args:
        splits: text, any case.
        source: what the error names, the file.

    Raises:
        UserError: an empty cell or an unknown name.
    """
    names = {}
    for name in pd.unique(splits.to_numpy(dtype=object)):
        if name is None:
            row = int(splits.isna().to_numpy().argmax()) + 1
            raise UserError(f"{source}: split is empty in row {row}; fill it in, or leave the whole column out")
        found = _SPLITS.get(name.lower())
        if found is None:
            near = nearest(name.lower(), _SPLITS)
            hint = f"did you mean {near}?" if near else f"must be one of {', '.join(_SPLITS)}"
            raise UserError(f"{source}: unknown split {name!r}; {hint}")
        names[name] = found
    return np.array([names[name] for name in splits], dtype=object)


def parse_times(times: pd.Series, source: Path | str) -> np.ndarray:
    """Return seconds (float64, NaN for an empty cell) from a column of numbers or of ISO 8601 dates.

    Numbers are seconds already; dates become seconds since 1970 in UTC, which they are taken for where they name no
    zone.

    Args:
        times: text or None.
        source: what the error names, the file.

    Raises:
        UserError: cells that are neither, or a mixture of both.
    """
    given = times.notna().to_numpy()
    seconds = np.full(len(times), np.nan)
    texts = times[given]
    if len(texts) == 0:
        return seconds
    numbers = pd.to_numeric(texts, errors="coerce").to_numpy(dtype=np.float64)
    if np.isfinite(numbers).all():
        seconds[given] = numbers
        return seconds
    dates = pd.to_datetime(texts, format="ISO8601", utc=True, errors="coerce")
    wrong = dates.isna().to_numpy() | np.isfinite(numbers)
    if wrong.any():
        row = int(np.flatnonzero(given)[wrong.argmax()])
        problem = "time must be numbers (seconds) throughout, or ISO dates (2019-05-31T16:20:00) throughout"
        raise UserError(f"{source}: {problem}; row {row + 1} has {times.iloc[row]!r}")
    seconds[given] = (dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    return seconds


def check_shares(shares: Mapping[str, float], key: str = "shares") -> dict[str, float]:
    """Return the shares of the splits that have one, in the order of `SPLITS`; raises `ConfigError`."""
    for name in shares:
        if name not in SPLITS:
            near = nearest(str(name), SPLITS)
            hint = f"did you mean {near}?" if near else f"must be one of {', '.join(SPLITS)}"
            raise ConfigError(f"{key}.{name}", shares[name], f"no such split; {hint}")
    checked = {s: check_float(f"{key}.{s}", shares[s], 0.0, 1.0) for s in SPLITS if s in shares}
    checked = {s: share for s, share in checked.items() if share}
    if lacking := [s for s in ("train", "test") if s not in checked]:
        raise ConfigError(key, dict(shares), f"gives nothing to {' and '.join(lacking)}")
    if abs(sum(checked.values()) - 1.0) > 1e-6:
        raise ConfigError(key, dict(shares), f"must add up to 1, not {sum(checked.values()):g}")
    return {s: share / sum(checked.values()) for s, share in checked.items()}


def deal_splits(table: pd.DataFrame, shares: Mapping[str, float], seed: int) -> np.ndarray:
    """Return a split for every image.

    Where images have owners, shares are shares of the owners, and no owner is in two splits (an image without an owner
    is one of its own); every split has an owner, if there are enough. Elsewhere they are shares of the images of every
    class, up to one image; what rounding takes from a split in one class it gets back in the next.

    Args:
        table: ``label``, and ``owner`` (text or None) if there are any.
        shares: as `check_shares` returns them.
        seed: seed of the deal.
    """
    rng = generator("splits", seed)
    names = np.array(list(shares), dtype=object)
    share_s = np.array([shares[s] for s in names])
    split_M = np.zeros(len(table), dtype=np.int64)
    behind_s = np.zeros(len(names))  # images due to a split so far and not dealt to it
    if "owner" in table and table["owner"].notna().any():
        groups_M = pd.factorize(table["owner"])[0]
        alone = groups_M < 0
        groups_M[alone] = groups_M.max() + 1 + np.arange(alone.sum())
        split_of_group = _cut(rng, groups_M.max() + 1, share_s, behind_s, least=1)
        return names[split_of_group[groups_M]]
    labels_M = table["label"].to_numpy()
    for label in np.unique(labels_M):
        own = np.flatnonzero(labels_M == label)
        split_M[own] = _cut(rng, len(own), share_s, behind_s)
    return names[split_M]


def _cut(
    rng: np.random.Generator, number: int, share_s: np.ndarray, behind_s: np.ndarray, least: int = 0
) -> np.ndarray:
    """Return ``number`` splits in random order; ``behind_s``, what earlier roundings left, is brought up to date.

    Every split comes ``least`` times or more, if there are enough.
    """
    behind_s += number * share_s
    counts_s = np.floor(number * share_s + 1e-9).astype(np.int64)
    behind_s -= counts_s
    for _ in range(number - counts_s.sum()):
        furthest = int(behind_s.argmax())
        counts_s[furthest] += 1
        behind_s[furthest] -= 1
    if number >= least * len(counts_s):
        while counts_s.min() < least:
            counts_s[counts_s.argmax()] -= 1
            counts_s[counts_s.argmin()] += 1
    return rng.permutation(np.repeat(np.arange(len(share_s)), counts_s))


def image_table(
    metadata: pd.DataFrame, shares: Mapping[str, float], seed: int, source: Path | str
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Return the table of a dataset and the names of its classes.

    Args:
        metadata: columns of text as `read_metadata` gives them, ``label`` among them; others than
            `COLUMNS` are kept.
        shares: of the splits, where there is no column ``split``; as `check_shares` returns them.
        seed: seed of those splits.
        source: what errors name, the file.

    Raises:
        UserError: no rows; a split or a time that cannot be read; no images in ``train`` or ``test``.
    """
    if metadata.empty:
        raise UserError(f"{source}: has no rows")
    label, classes = number_labels(metadata["label"])
    none = np.full(len(metadata), None, dtype=object)
    table = pd.DataFrame({"label": label})
    given = "split" in metadata
    columns = {
        name: metadata[name].to_numpy(dtype=object) if name in metadata else none for name in ("owner", "parent")
    }
    if given:
        table["split"] = split_names(metadata["split"], source)
    else:
        table["split"] = deal_splits(table.assign(owner=columns["owner"]), shares, seed)
    for name, values in columns.items():
        table[name] = pd.Series(values, dtype=object)
    if "time" in metadata:
        table["time"] = parse_times(metadata["time"], source)
    for name in map(str, metadata):
        if name not in COLUMNS:
            table[name] = metadata[name].to_numpy(dtype=object)
    present = set(table["split"])
    if lacking := [s for s in ("train", "test") if s not in present]:
        found = (
            f"the column split has only {', '.join(sorted(set(metadata['split'])))}"
            if given
            else "too few images or owners"
        )
        val = (
            "; val is for choosing epochs and settings, images for reported numbers are test"
            if given and lacking == ["test"]
            else ""
        )
        raise UserError(f"{source}: no {' and no '.join(lacking)} images: {found}{val}")
    return table, classes
