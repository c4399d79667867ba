"""MovieLens: three layouts, splits, histories, and files that are damaged."""

import numpy as np
import pandas as pd
import pytest

from iciia_exp.data.datasets.movielens import MovieLens
from iciia_exp.errors import ConfigError, UserError
from tests.making.movielens import make_movielens

LAYOUTS = ("ratings.csv", "ratings.dat", "u.data")


def by_user(ratings):
    """Return every user's ratings by time, those of equal time in the order of the file."""
    users = sorted({user for user, *_ in ratings})
    return {user: sorted((r for r in ratings if r[0] == user), key=lambda r: r[3]) for user in users}


def both(ratings):
    return {r[2] >= 4 for r in ratings} == {True, False}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep", ["latest", "oldest"])
def test_rows_against_a_loop_over_users(tmp_path, layout, keep, caplog):
    caplog.set_level("INFO")
    ratings, genres = make_movielens(tmp_path, layout)
    films, slots = list(genres), 5
    dataset = MovieLens(tmp_path, history=slots, keep=keep, test_share=0.3, val_share=0.2)
    want, tested = [], 0
    for number, (user, own) in enumerate(by_user(ratings).items()):
        test, val = round(0.3 * len(own)), int(0.2 * len(own))
        parts = {"train": own[: -test - val], "val": own[-test - val : -test], "test": own[-test:]}
        counted = both(parts["test"]) and both(parts["train"])
        tested += counted
        for split, part in parts.items():
            for rating in part if counted or split != "test" else ():
                before = own[: own.index(rating)]
                row = [number, films.index(rating[1])]
                for liked in (False, True):
                    found = [films.index(r[1]) for r in before if (r[2] >= 4) == liked]
                    found = found[-slots:] if keep == "latest" else found[:slots]
                    row += found + [-1] * (slots - len(found))
                want.append((row, int(rating[2] >= 4), split, str(user)))
    assert tested > 0
    assert len(dataset) == len(want)
    assert [dataset[i].tolist() for i in range(len(want))] == [row for row, *_ in want]
    assert dataset[0].dtype == np.int32
    found = dataset.table[["label", "split", "owner"]].to_numpy().tolist()
    assert found == [[label, split, user] for _, label, split, user in want]
    assert f"{12 - tested} of 12 users are not tested (fewer than 4 test" in caplog.text or tested == 12
    times = dataset.table.groupby("owner")["time"].apply(np.diff)
    assert all((steps > 0).all() for steps in times), "equal times keep their order"


def test_the_three_layouts_are_one_dataset(tmp_path):
    made = []
    for layout in LAYOUTS:
        make_movielens(tmp_path / layout, layout)
        made.append(MovieLens(tmp_path / layout, history=4))
    one = made[0]
    assert one.backbone_arguments() == {
        "users": 12,
        "items": 30,
        "item_categories": one.backbone_arguments()["item_categories"],
    }
    for other in made[1:]:
        pd.testing.assert_frame_equal(other.table, one.table)
        assert other.backbone_arguments() == one.backbone_arguments()
        assert all((other[i] == one[i]).all() for i in range(len(one)))


def test_categories_are_the_genres_of_every_film(tmp_path):
    _, genres = make_movielens(tmp_path)
    names = sorted({name for found in genres.values() for name in found})
    assert MovieLens(tmp_path).backbone_arguments()["item_categories"] == [
        [names.index(n) for n in found] for found in genres.values()
    ]


def test_a_global_split(tmp_path):
    ratings, _ = make_movielens(tmp_path)
    cutoff = sorted(r[3] for r in ratings)[len(ratings) // 2]
    table = MovieLens(tmp_path, split="global", cutoff=cutoff, val_share=0.0, min_test=3).table
    owned = by_user(ratings)
    kept = {
        u: both(p) and both(t) and len(t) >= 3
        for u, own in owned.items()
        for p, t in [([r for r in own if r[3] < cutoff], [r for r in own if r[3] >= cutoff])]
    }
    assert True in kept.values()
    assert False in kept.values()
    counts = table.groupby(["owner", "split"]).size()
    for user, own in owned.items():
        past = sum(r[3] < cutoff for r in own)
        assert counts.get((str(user), "train"), 0) == past
        assert counts.get((str(user), "test"), 0) == (len(own) - past if kept[user] else 0)


def test_the_order_of_users_and_of_equal_lines_is_not_that_of_time(tmp_path):
    ratings, _ = make_movielens(tmp_path)
    assert ratings != sorted(ratings, key=lambda r: (r[0], r[3]))
    assert len({(r[0], r[3]) for r in ratings}) < len(ratings)


@pytest.mark.parametrize(
    ("layout", "file", "change", "message"),
    [
        ("ratings.csv", "ratings.csv", lambda t: t.replace(",", ";"), "has no column userId; the header is 'userId;movieId"),
        ("ratings.csv", "ratings.csv", lambda t: t.replace("timestamp", "time"), "has no column timestamp"),
        ("ratings.csv", "ratings.csv", lambda t: t.replace(",4.0,", ",four,", 1), r"rating \d+: rating is 'four', not a number"),
        ("ratings.csv", "ratings.csv", lambda t: t.replace(",4.0,", ",,", 1), r"rating \d+: rating is empty"),
        ("ratings.csv", "ratings.csv", lambda t: t.splitlines()[0] + "\n", "ratings.csv: has no ratings"),
        ("ratings.csv", "ratings.csv", lambda t: "", "ratings.csv: cannot be read"),
        ("ratings.csv", "ratings.csv", lambda t: t + "1,99999,4.0,1\n", r"1 ratings are of films that movies.csv does not have \(99999"),
        ("ratings.csv", "movies.csv", lambda t: t + '10,"Twice",Drama\n', "movies.csv: film 10 is there twice"),
        ("ratings.csv", "movies.csv", lambda t: t + 'ten,"Ten",Drama\n', "movies.csv: film 31 has no number"),
        ("ratings.csv", "movies.csv", lambda t: t.replace("genres", "genre"), "movies.csv: has no column genres"),
        ("ratings.dat", "ratings.dat", lambda t: t.replace("::", ","), "ratings.dat: must have four columns with :: "),
        ("ratings.dat", "movies.dat", lambda t: t.replace("::", "|"), "movies.dat: must have three columns with :: "),
        ("u.data", "u.data", lambda t: t.replace("\t", " "), "u.data: must have four columns with tabs"),
        ("u.data", "u.item", lambda t: t.replace("|", ","), r"u.item: must have 24 columns with \| between them"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path, layout, file, change, message):
    make_movielens(tmp_path, layout)
    path = tmp_path / file
    path.write_text(change(path.read_text(encoding="latin-1")), encoding="latin-1")
    with pytest.raises(UserError, match=message) as caught:
        MovieLens(tmp_path).table  # noqa: B018
    assert str(path) in str(caught.value)


def test_no_user_can_be_tested(tmp_path):
    make_movielens(tmp_path)
    with pytest.raises(UserError, match="no user has 40 test ratings, and both labels in train and test; lower"):
        MovieLens(tmp_path, min_test=40).table  # noqa: B018


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "ratings.csv").write_text("userId\n")
    with pytest.raises(UserError, match="is no folder of MovieLens"):
        MovieLens(tmp_path)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("split", {"split": "time"}),
        ("cutoff", {"split": "global"}),
        ("test_share", {"test_share": 0.0}),
        ("val_share", {"val_share": 1.0}),
        ("history", {"history": 0}),
        ("keep", {"keep": "newest"}),
        ("min_test", {"min_test": 0}),
        ("liked", {"liked": float("nan")}),
    ],
)
def test_settings_that_make_no_sense(tmp_path, key, settings):
    make_movielens(tmp_path)
    with pytest.raises(ConfigError) as caught:
        MovieLens(tmp_path, **settings)
    assert caught.value.key == key


def test_a_changed_rating_is_other_content(tmp_path):
    make_movielens(tmp_path)
    before = MovieLens(tmp_path).fingerprint()
    path = tmp_path / "ratings.csv"
    path.write_text(path.read_text().replace(",5.0,", ",1.0,", 1))
    assert MovieLens(tmp_path).fingerprint() != before
