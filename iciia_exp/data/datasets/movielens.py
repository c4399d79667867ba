"""MovieLens: ratings of films by users, with each user's earlier ratings as history.

Source: F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context" (ACM TiiS 5(4), 2015),
https://grouplens.org/datasets/movielens. Labels, histories and the global split are those of MPDA's released code
(KDD 2022, 2180-2190).

Legend: M ratings, U users, I films, L slots of a history.
"""

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd

from iciia_exp.data.content import Content
from iciia_exp.data.dataset import ImageDataset, existing_root, table_digest, wrong_folder
from iciia_exp.data.readers.files import few, read_csv
from iciia_exp.errors import ConfigError, UserError, check_choice, check_float, check_int, first_line
from iciia_exp.tasks import CLICK

__all__ = ["MovieLens"]

log = logging.getLogger(__name__)

_WHAT = "MovieLens as GroupLens distributes it, unpacked"
_TREE = """\
ratings.csv, movies.csv   (ml-latest-small, ml-20m, ml-25m, ml-32m)
ratings.dat, movies.dat   (ml-1m, ml-10m)
u.data, u.item            (ml-100k)"""

_RATINGS = ("userId", "movieId", "rating", "timestamp")
_NO_GENRES = "(no genres listed)"
#: Genres of ml-100k, in the order of the flags of ``u.item``; the first is "unknown".
_FLAGS = (
    *(_NO_GENRES, "Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_LARGEST = 1_000_000  # users or films


class _Sequences(NamedTuple):
    """Ratings in the order of users and time."""

    user_M: np.ndarray  # int64
    item_M: np.ndarray
    label_M: np.ndarray  # 0 or 1
    time_M: np.ndarray  # float64, increasing within a user
    split_M: np.ndarray  # names of splits; "" is not used
    users: np.ndarray  # names of the users


class MovieLens(ImageDataset):
    """Ratings as clicks: a rating of ``liked`` or more is a yes. The owner of a rating is its user.

    An item is an int32 row [2 + 2 L] for `iciia_exp.models.backbones.recommender.ClickModel`: user, film, then the
    user's earlier films, the disliked ones before the liked ones, each padded with -1 to L. Ratings of equal time stay
    in the order of the file. Val and test ratings have earlier val and test ratings in their histories.

    Args:
        root: the unpacked folder.
        split: ``user``: the latest ratings of every user are for testing; ``global``: all from ``cutoff`` on, as
            released.
        test_share: of each user's ratings (``user``).
        val_share: of each user's ratings before the test ratings, the latest.
        cutoff: in seconds since 1970 (``global``); the released code has 1225642324 for ml-20m.
        liked: least rating that is a yes.
        history: L.
        keep: ``latest`` or, as released, ``oldest`` L films of a history.
        min_test: users with fewer test ratings, or with train or test ratings of one label only, are not tested; their
            train ratings stay in the cloud's pool.
    """

    name = "movielens"
    task = CLICK
    cosmetic: ClassVar[frozenset[str]] = frozenset({"root"})
    class_names = ("no", "yes")

    def __init__(
        self,
        root: str | Path | None,
        split: str = "user",
        test_share: float = 0.2,
        val_share: float = 0.1,
        cutoff: int | None = None,
        liked: float = 4.0,
        history: int = 30,
        keep: str = "latest",
        min_test: int = 4,
    ) -> None:
        self.split = check_choice("split", split, ("user", "global"))
        self.test_share = check_float("test_share", test_share, 0.0, 0.9, open_low=True)
        self.val_share = check_float("val_share", val_share, 0.0, 0.9)
        self.cutoff = None if cutoff is None else check_int("cutoff", cutoff, 0)
        if split == "global" and cutoff is None:
            problem = "split=global needs the time from which on ratings are for testing, in seconds since 1970"
            raise ConfigError("cutoff", "null", problem)
        self.liked = check_float("liked", liked, 0.0, 100.0)
        self.history = check_int("history", history, 1, 10_000)
        self.keep = check_choice("keep", keep, ("latest", "oldest"))
        self.min_test = check_int("min_test", min_test, 1)
        self.root = existing_root(root, _WHAT, _TREE)
        for ratings, films, read in _LAYOUTS:
            if (self.root / ratings).is_file() and (self.root / films).is_file():
                self._files, self._read = (ratings, films), read
                return
        raise wrong_folder(self.root, "is no folder of MovieLens", _TREE)

    @cached_property
    def _tables(self) -> tuple[pd.DataFrame, list[tuple[str, ...]]]:
        """Return the ratings with numbers of films, and the genres of every film."""
        ratings, films = self._read(*(self.root / name for name in self._files))
        if not len(ratings):
            raise UserError(f"{self.root / self._files[0]}: has no ratings")
        where = pd.Index(films["movieId"])
        if not where.is_unique:
            twice = where[where.duplicated()][0]
            raise UserError(f"{self.root / self._files[1]}: film {twice} is there twice")
        item_M = where.get_indexer(pd.Index(ratings["movieId"]))
        if (unknown := np.flatnonzero(item_M < 0)).size:
            problem = f"{unknown.size:,} ratings are of films that {self._files[1]} does not have"
            raise UserError(f"{self.root / self._files[0]}: {problem} ({ratings['movieId'].iloc[unknown[0]]}, say)")
        genres = [tuple(g for g in text.split("|") if g and g != _NO_GENRES) for text in films["genres"]]
        return ratings.assign(item=item_M), genres

    @cached_property
    def _sequences(self) -> _Sequences:
        ratings, films = self._tables
        user_M, users = pd.factorize(ratings["userId"], sort=True)
        if max(len(users), len(films)) > _LARGEST:
            raise UserError(f"{self.root}: more than {_LARGEST:,} users or films")
        second_M = ratings["timestamp"].to_numpy(dtype=np.float64)
        order = np.lexsort((second_M, user_M))  # stable: equal times in the order of the file
        user_M, second_M = user_M[order], second_M[order]
        count_U = np.bincount(user_M, minlength=len(users))
        place_M = np.arange(len(user_M)) - np.repeat(np.cumsum(count_U) - count_U, count_U)
        label_M = (ratings["rating"].to_numpy()[order] >= self.liked).astype(np.int64)
        if self.split == "user":
            past_U = np.floor((1 - self.test_share) * count_U + 1e-9).astype(np.int64)
            test_M = place_M >= past_U[user_M]
        else:
            test_M = second_M >= self.cutoff
            past_U = np.bincount(user_M[~test_M], minlength=len(users))
        val_M = ~test_M & (place_M >= (past_U - np.floor(self.val_share * count_U).clip(max=past_U))[user_M])
        split_M = np.select([test_M, val_M], ["test", "val"], "train").astype(object)
        counts = np.zeros((2, 2, len(users)), dtype=np.int64)  # test or train, label
        np.add.at(counts, (np.where(test_M, 1, 0)[~val_M], label_M[~val_M], user_M[~val_M]), 1)
        counted_U = (counts > 0).all((0, 1)) & (counts[1].sum(0) >= self.min_test)
        split_M[test_M & ~counted_U[user_M]] = ""
        # ratings of the same second keep their order
        time_M = second_M + 1e-6 * place_M
        return _Sequences(
            user_M, ratings["item"].to_numpy()[order], label_M, time_M, split_M, users.astype(str).to_numpy(object)
        )

    @cached_property
    def _used(self) -> np.ndarray:
        """Numbers of the ratings in use, int64 [M]."""
        return np.flatnonzero(self._sequences.split_M != "")

    @cached_property
    def _histories(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For disliked and liked films: the films, every user's first, and how many came before each rating."""
        user_M, item_M, label_M = self._sequences[:3]
        first_M = np.searchsorted(user_M, user_M)  # of the user's ratings
        found = []
        for label in (0, 1):
            before_M = np.concatenate([[0], np.cumsum(label_M == label)])
            found.append((item_M[label_M == label], before_M[first_M], before_M[:-1]))
        return found

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a rating, int32 [2 + 2 L]."""
        at, sequences = self._used[index], self._sequences
        row = np.full(2 + 2 * self.history, -1, dtype=np.int32)
        row[:2] = sequences.user_M[at], sequences.item_M[at]
        for number, (items, first_M, last_M) in enumerate(self._histories):
            first, last = first_M[at], last_M[at]
            part = slice(max(first, last - self.history), last)
            if self.keep == "oldest":
                part = slice(first, min(first + self.history, last))
            found = items[part]
            start = 2 + number * self.history
            row[start : start + len(found)] = found
        return row

    def backbone_arguments(self) -> dict[str, Any]:
        """Return the numbers of users and of films, and the numbers of every film's genres."""
        films = self._tables[1]
        number = {genre: i for i, genre in enumerate(sorted({genre for genres in films for genre in genres}))}
        categories = [[number[genre] for genre in genres] for genres in films]
        return {"users": len(self._sequences.users), "items": len(films), "item_categories": categories}

    def load_table(self) -> pd.DataFrame:
        """Return label, split, owner, parent (none) and time."""
        s, used = self._sequences, self._used
        if "test" not in s.split_M:
            problem = f"no user has {self.min_test} test ratings, and both labels in train and test"
            raise UserError(f"{self.root}: {problem}; lower dataset.min_test or choose another split")
        tested = len(np.unique(s.user_M[s.split_M == "test"]))
        if left := len(s.users) - tested:
            why = f"fewer than {self.min_test} test ratings, or one label only in train or test"
            log.info("movielens: %s of %s users are not tested (%s)", f"{left:,}", f"{len(s.users):,}", why)
        columns = {"label": s.label_M, "split": s.split_M, "owner": s.users[s.user_M], "time": s.time_M}
        return pd.DataFrame({name: values[used] for name, values in columns.items()}).assign(parent=None)

    def describe(self, index: int) -> str:
        """Return user and place of a rating."""
        at, s = self._used[index], self._sequences
        return f"rating {at - np.searchsorted(s.user_M, s.user_M[at]) + 1} of user {s.users[s.user_M[at]]}"

    def fingerprint(self) -> str:
        """Return a digest of the table."""
        return table_digest(self.table)

    def content(self, kept: Content) -> str:
        """Return a digest of both files."""
        return kept.of(self.root, self._files)


def _checked(table: pd.DataFrame, file: Path) -> pd.DataFrame:
    """Return ratings with numbers in all columns; raises a `UserError` for other cells."""
    if missing := [name for name in _RATINGS if name not in table]:
        problem = f"has no column {missing[0]}; the header is {few(map(repr, table.columns), 6)}"
        raise UserError(f"{file}: {problem}; expected {','.join(_RATINGS)}, as GroupLens writes it")
    checked = {}
    for name in _RATINGS:
        values = pd.to_numeric(table[name], errors="coerce").to_numpy(dtype=np.float64)
        if (wrong := np.flatnonzero(~np.isfinite(values))).size:
            cell = table[name].iloc[wrong[0]]
            found = "empty" if pd.isna(cell) else f"{cell!r}, not a number"
            raise UserError(f"{file}, rating {wrong[0] + 1:,}: {name} is {found}")
        checked[name] = values if name == "rating" else values.astype(np.int64)
    return pd.DataFrame(checked)


def _read(file: Path, **options: Any) -> pd.DataFrame:
    try:
        return pd.read_csv(file, **options)
    except (ValueError, UnicodeError, OSError) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{file}: cannot be read ({first_line(error)}); download it again") from error


def _films(table: pd.DataFrame, file: Path) -> pd.DataFrame:
    numbers = pd.to_numeric(table["movieId"], errors="coerce")
    if numbers.isna().any():
        raise UserError(f"{file}: film {int(numbers.isna().to_numpy().argmax()) + 1:,} has no number")
    return pd.DataFrame({"movieId": numbers.astype(np.int64), "genres": table["genres"]})


def _read_csv(ratings: Path, films: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    # ratings by pandas' own types: 25 million as text would not fit
    return _checked(_read(ratings), ratings), _films(read_csv(films, ("movieId", "genres")), films)


def _read_dat(ratings: Path, films: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read columns with :: between them, as columns with : and empty ones between."""
    found = _read(ratings, sep=":", header=None)
    if found.shape[1] != 7:
        raise UserError(f"{ratings}: must have four columns with :: between them")
    found = found.set_axis(["userId", "", "movieId", "", "rating", "", "timestamp"], axis=1)
    table = _checked(found.loc[:, list(_RATINGS)], ratings)
    lines = _read(films, sep="\0", header=None, names=["line"], encoding="latin-1", quoting=3)["line"].str.split("::")
    if not all(len(line) == 3 for line in lines):
        raise UserError(f"{films}: must have three columns with :: between them")
    return table, _films(pd.DataFrame({"movieId": lines.str[0], "genres": lines.str[2]}), films)


def _read_100k(ratings: Path, films: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    found = _read(ratings, sep="\t", header=None)
    if found.shape[1] != 4:
        raise UserError(f"{ratings}: must have four columns with tabs between them")
    table = _read(films, sep="|", header=None, encoding="latin-1", quoting=3)
    if table.shape[1] != 5 + len(_FLAGS):
        raise UserError(f"{films}: must have {5 + len(_FLAGS)} columns with | between them")
    flags = table.iloc[:, 5:].to_numpy() == 1
    genres = ["|".join(name for name, flag in zip(_FLAGS, row, strict=True) if flag) for row in flags]
    described = pd.DataFrame({"movieId": table[0], "genres": genres})
    return _checked(found.set_axis(list(_RATINGS), axis=1), ratings), _films(described, films)


_Reader = Callable[[Path, Path], tuple[pd.DataFrame, pd.DataFrame]]
#: Files of ratings and of films, and how they are read.
_LAYOUTS: tuple[tuple[str, str, _Reader], ...] = (
    ("ratings.csv", "movies.csv", _read_csv),
    ("ratings.dat", "movies.dat", _read_dat),
    ("u.data", "u.item", _read_100k),
)
