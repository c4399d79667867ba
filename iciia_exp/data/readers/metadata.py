"""Metadata of images: labels, splits, owners, parents and times from a user's CSV file.

All functions except `read_metadata` are pure functions of columns of text, with None for an empty cell.
"""

import difflib
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from iciia_exp.data.dataset import SPLITS
from iciia_exp.data.readers.files import few, read_csv
from iciia_exp.errors import ConfigError, UserError, check_choice, check_float, did_you_mean
from iciia_exp.seeding import generator

__all__ = ["COLUMNS", "SPLIT_NAMES", "check_columns", "check_shares", "image_table", "read_metadata"]

log = logging.getLogger(__name__)

#: Columns of a file.
COLUMNS = ("label", "split", "owner", "parent", "time")

_ALIASES = {"timestamp": "time"}
# texts that tables have where nothing is known
_MISSING = {"nan", "none", "null", "na", "n/a", "<na>", "unknown", "-", "?"}

#: Names of splits in columns and folders, in lower case.
SPLIT_NAMES = {
    "backbone": "backbone",
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "selection"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def _hint(name: str, choices: Collection[str], otherwise: str) -> str:
    return did_you_mean(name, choices, f"{otherwise} {', '.join(choices)}")


def check_columns(columns: Mapping[str, str] | None, known: Collection[str]) -> dict[str, str]:
    """Return the name in the file of every column of the configuration that has another; wrong ones raise."""
    for name, other in (columns or {}).items():
        check_choice("columns", name, tuple(known))
        if not isinstance(other, str) or not other.strip():
            raise ConfigError(f"columns.{name}", other, "must be the name of a column of the CSV file")
    return {name: other.strip() for name, other in (columns or {}).items() if other.strip() != name}


def read_metadata(path: Path, required: Collection[str] = ("label",), columns: Mapping[str, str] = {}) -> pd.DataFrame:
    """Read a CSV file with a header into columns of text, with None for an empty cell; NA and null are names.

    ``timestamp`` is read as ``time``. Other columns are left out, with a line; so is one without a name (the row
    numbers that pandas writes).

    Args:
        path: the file (`iciia_exp.data.readers.files.read_csv`).
        required: columns that must exist and have no empty cell; they may be others than `COLUMNS`.
        columns: names in the file, by ours, from `check_columns`.

    Raises:
        UserError: no such file, not a CSV file, missing columns or names much like one, empty cells of a required
            column.
    """
    raw = read_csv(path)
    known = dict.fromkeys((*required, *COLUMNS))
    header = ", ".join(repr(column) for column in raw.columns)
    for ours, theirs in columns.items():
        if theirs not in raw:
            raise ConfigError(f"columns.{ours}", theirs, f"is no column of {path}, which has {header}")
    ours_of = {theirs: ours for ours, theirs in columns.items()}
    table, other = {}, []
    for column in raw.columns:
        if not column or column.startswith("Unnamed: "):
            continue
        name = ours_of.get(column) or _ALIASES.get(column.lower(), column.lower())
        if name not in known or (name in columns and column not in ours_of):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            if near and near[0] not in table and near[0] not in raw:  # a slip: `onwer`, not `image` for `time`
                raise UserError(f"{path}: unknown column {column!r}; did you mean {near[0]}? Else rename or remove it")
            other.append(column)
            continue
        if name in table:
            raise UserError(f"{path}: two columns for {name}; keep one")
        table[name] = raw[column].astype(object).where(raw[column] != "", None)
    for name in required:
        if name not in table:
            hint = f"dataset.columns.{name}=NAME reads another"
            raise UserError(f"{path}: has no column {name!r}; the header is {header}; {hint}")
        if len(empty := np.flatnonzero(table[name].isna())):
            raise UserError(f"{path}: {name} is empty in {len(empty)} of {len(raw)} rows, first in row {empty[0] + 1}")
    if other:
        log.info("%s: leaving out the columns %s", path, few(other))
    if "owner" in table:
        missing = table["owner"].dropna()
        missing = missing[missing.str.lower().isin(_MISSING)]
        if len(missing):
            problem = f"{len(missing):,} images have the owner {missing.iloc[0]!r}, which is one client"
            log.warning("%s: %s; leave the cell empty where the owner is unknown", path, problem)
    return pd.DataFrame(table, dtype=object)


def number_labels(names: pd.Series) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels 0..K-1 (int64), and the names of the classes, sorted; by value if all are whole numbers."""
    unique = pd.unique(names)
    numbers = all(re.fullmatch(r"[+-]?\d+", name) for name in unique)
    classes = sorted(unique, key=lambda name: (int(name), name) if numbers else name)
    label_of = {name: label for label, name in enumerate(classes)}
    return np.array([label_of[name] for name in names], dtype=np.int64), tuple(map(str, classes))


def split_names(splits: pd.Series, source: Path | str) -> np.ndarray:
    """Return the names in `SPLITS` of other names, in any case: ``valid``, ``validation`` and ``dev`` are val.

    An empty cell or an unknown name raises `UserError` for the file ``source``.
    """
    for name in pd.unique(splits):
        if name is None:
            row = int(splits.isna().to_numpy().argmax()) + 1
            raise UserError(f"{source}: split is empty in row {row}; fill it in, or leave the whole column out")
        if name.lower() not in SPLIT_NAMES:
            raise UserError(f"{source}: unknown split {name!r}; {_hint(name.lower(), SPLIT_NAMES, 'must be one of')}")
    return splits.str.lower().map(SPLIT_NAMES).to_numpy(dtype=object)


def parse_times(times: pd.Series, source: Path | str) -> np.ndarray:
    """Return seconds (float64, NaN for an empty cell) from a column of numbers or of ISO 8601 dates.

    Numbers are seconds; dates become seconds since 1970 in UTC, which is also the zone of dates without a zone. Other
    cells, and a mixture of both, raise `UserError` for the file ``source``.
    """
    given, numbers = times.notna(), pd.to_numeric(times, errors="coerce").astype(np.float64)
    if np.isfinite(numbers[given]).all():
        return numbers.to_numpy()
    dates = pd.to_datetime(times, format="ISO8601", utc=True, errors="coerce")
    if (wrong := given & (dates.isna() | np.isfinite(numbers))).any():
        row = int(wrong.to_numpy().argmax())
        problem = "time must be numbers (seconds) throughout, or ISO dates (2019-05-31T16:20:00) throughout"
        raise UserError(f"{source}: {problem}; row {row + 1} has {times.iloc[row]!r}")
    microseconds = dates.astype("datetime64[us, UTC]").to_numpy(dtype="datetime64[us]")  # also of the year 9999
    return np.where(given, microseconds.astype(np.int64) / 1e6, np.nan)


def check_shares(shares: Mapping[str, float], key: str = "shares") -> dict[str, float]:
    """Return the shares of the splits above 0, in the order of `SPLITS`; wrong shares raise `ConfigError`."""
    for name in shares:
        check_choice(f"{key}.{name}", name, SPLITS)
    checked = {s: check_float(f"{key}.{s}", shares[s], 0.0, 1.0) for s in SPLITS if s in shares}
    checked = {s: share for s, share in checked.items() if share}
    if lacking := [s for s in ("train", "test") if s not in checked]:
        raise ConfigError(key, dict(shares), f"gives nothing to {' and '.join(lacking)}")
    if abs(sum(checked.values()) - 1.0) > 1e-6:
        raise ConfigError(key, dict(shares), f"must add up to 1, not {sum(checked.values()):g}")
    return {s: share / sum(checked.values()) for s, share in checked.items()}


def deal_splits(table: pd.DataFrame, shares: Mapping[str, float], seed: int) -> np.ndarray:
    """Draw a split for every image.

    If images have owners (column ``owner``), ``shares`` are shares of the owners; all images of an owner are in one
    split, an image without an owner counts as one, and every split has an owner if there are enough. Otherwise they are
    shares of the images of every class (column ``label``), up to one image; rounding errors are made up for in the next
    class.
    """
    rng = generator("splits", seed)
    names = np.array(list(shares), dtype=object)
    share_s = np.array([shares[s] for s in names])
    behind_s = np.zeros(len(names))  # images that rounding has taken from a split so far
    if "owner" in table and table["owner"].notna().any():
        groups_M = pd.factorize(table["owner"])[0]
        alone = groups_M < 0
        groups_M[alone] = groups_M.max() + 1 + np.arange(alone.sum())
        split_of_group = _cut(rng, groups_M.max() + 1, share_s, behind_s, least=1)
        return names[split_of_group[groups_M]]
    split_M = np.zeros(len(table), dtype=np.int64)
    for images in table.groupby("label").indices.values():
        split_M[images] = _cut(rng, len(images), share_s, behind_s)
    return names[split_M]


def _cut(
    rng: np.random.Generator, number: int, share_s: np.ndarray, behind_s: np.ndarray, least: int = 0
) -> np.ndarray:
    """Return ``number`` splits in random order, each at least ``least`` times if possible; updates ``behind_s``."""
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
    """Return the table of a dataset, and the names of its classes.

    Args:
        metadata: columns of text from `read_metadata`, including ``label``; columns outside `COLUMNS` are kept.
        shares, seed: shares of the splits, from `check_shares`, and their seed, used without a column ``split``.
        source: the file, for errors.

    Raises `UserError`: no rows; a split or a time that cannot be read; no images in ``train`` or ``test``.
    """
    if metadata.empty:
        raise UserError(f"{source}: has no rows")
    label, classes = number_labels(metadata["label"])
    table = pd.DataFrame({"label": label, "split": None, "owner": None, "parent": None})
    for name in ("owner", "parent", *(name for name in metadata if name not in COLUMNS)):
        if name in metadata:
            table[name] = metadata[name].to_numpy(dtype=object)
    if "time" in metadata:
        table["time"] = parse_times(metadata["time"], source)
    given = "split" in metadata
    table["split"] = split_names(metadata["split"], source) if given else deal_splits(table, shares, seed)
    if lacking := [s for s in ("train", "test") if s not in set(table["split"])]:
        problem = "too few images or owners"
        if given:
            problem = f"the column split has only {', '.join(sorted(set(metadata['split'])))}"
            if lacking == ["test"]:
                problem += "; val is for choosing epochs and settings, images for reported numbers are test"
        raise UserError(f"{source}: no {' and no '.join(lacking)} images: {problem}")
    return table, classes
