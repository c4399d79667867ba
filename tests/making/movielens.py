"""MovieLens in GroupLens's three layouts: users who like films of their own genre."""

import numpy as np

GENRES = ("Action", "Comedy", "Drama")
#: First flag of a genre in ``u.item``.
FLAGS = {"Action": 6, "Comedy": 10, "Drama": 13}


def make_ratings(users=12, films=30, each=20, seed=0):
    """Return ratings as (user, film, rating, second) in no order, and the genres of the films by their id."""
    rng = np.random.default_rng(seed)
    genres = {
        10 + 3 * film: [GENRES[film % 3], *(["Drama"] if film % 5 == 0 and film % 3 < 2 else [])]
        for film in range(films)
    }
    ids = np.array(list(genres))
    rows = []
    for user in range(1, users + 1):
        for place, film in enumerate(rng.permutation(ids)[:each]):
            liked = rng.random() < (0.8 if GENRES[user % 3] in genres[film] else 0.3)
            rows.append(
                (
                    user,
                    int(film),
                    int(rng.integers(4, 6) if liked else rng.integers(1, 4)),
                    900_000_000 + 10 * user + 7 * (place // 2),
                )
            )
    return [rows[i] for i in rng.permutation(len(rows))], genres


def make_movielens(root, layout="ratings.csv", **sizes):
    """Write a layout, named by its file of ratings, and return the ratings and genres."""
    ratings, genres = make_ratings(**sizes)
    root.mkdir(parents=True, exist_ok=True)
    if layout == "ratings.csv":
        lines = ["userId,movieId,rating,timestamp", *(f"{u},{f},{r}.0,{t}" for u, f, r, t in ratings)]
        films = ["movieId,title,genres", *(f'{f},"Film, {f} (1999)",{"|".join(g)}' for f, g in genres.items())]
        files = {"ratings.csv": lines, "movies.csv": films}
    elif layout == "ratings.dat":
        films = [f"{f}::Film: {f} é (1999)::{'|'.join(g)}" for f, g in genres.items()]
        files = {"ratings.dat": [f"{u}::{f}::{r}::{t}" for u, f, r, t in ratings], "movies.dat": films}
    else:
        films = []
        for film, names in genres.items():
            flags = ["0"] * 19
            for name in names:
                flags[FLAGS[name] - 5] = "1"
            films.append("|".join([str(film), f"Film é {film} (1999)", "01-Jan-1999", "", "http://films", *flags]))
        files = {"u.data": ["\t".join(map(str, rating)) for rating in ratings], "u.item": films}
    for name, lines in files.items():
        encoding = "latin-1" if name in ("movies.dat", "u.item") else "utf-8"
        (root / name).write_text("\n".join(lines) + "\n", encoding=encoding)
    return ratings, genres
