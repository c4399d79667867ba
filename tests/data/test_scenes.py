"""Scenes: captions, pictures, what is right in them, and their dataset."""

import numpy as np
import pytest

from iciia_exp.data import scenes
from iciia_exp.data.datasets.scenes import Scenes
from iciia_exp.errors import ConfigError, UserError

LONG = "a small red one above a large blue seven above a small green four"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_captions_are_read_as_they_are_drawn(rng):
    for objects in (1, 2, 3):
        for _ in range(50):
            caption = scenes.draw_caption(rng, objects)
            things, relation = scenes.parse(caption)
            assert len(things) == objects
            assert (relation is None) == (objects == 1)
            assert set(caption.split()) <= set(scenes.WORDS)
    assert scenes.parse(LONG)[1] == "above"


@pytest.mark.parametrize(
    "caption",
    [
        *("", "red", "a red small one", "a small red one left a small blue one", "a small red one left of"),
        *("a small red one and a small blue one", "a small red one above a large red seven"),
        "a small red one above a large blue seven left of a small green four",
    ],
)
def test_other_captions_are_refused(caption):
    with pytest.raises(UserError, match=r"is not the caption of a scene|a scene has up to 3 objects"):
        scenes.parse(caption)


def test_everything_is_right_in_a_rendered_picture(rng):
    captions = [scenes.draw_caption(rng, 1 + i % 3) for i in range(150)]
    right = np.array([scenes.truths(caption, scenes.render(caption, rng)) for caption in captions])
    assert (right[:, 0] == 1).mean() > 0.98  # neighbours may overlap
    assert (right.mean(0) > 0.98).all()


@pytest.mark.parametrize("kind", scenes.TRUTHS)
def test_one_thing_is_wrong_in_the_picture_of_an_altered_caption(rng, kind):
    found = []
    for number in range(60):
        caption = scenes.draw_caption(rng, 1 + number % 3)
        groups = scenes.altered(caption, kind)
        assert len(groups) == max(1, 1 + number % 3 - (kind == "place"))
        for group in groups:
            assert caption not in group
            found += [(number % 3, scenes.truths(caption, scenes.render(other, rng))) for other in group]
    at = scenes.TRUTHS.index(kind)
    for objects in (2, 3):
        right = np.mean([truth for n, truth in found if n == objects - 1], 0)
        of = objects if kind != "place" else objects - 1
        if kind == "place" and objects == 3:  # an object changes places with a neighbour of another one, too
            assert right[at] < 0.8
        elif kind == "color":
            assert right[at] == pytest.approx(0.5, abs=0.02)  # one colour is missing, and one is there in its place
        else:
            assert right[at] == pytest.approx(1 - 1 / of, abs=0.12)
        if kind in ("size", "digit"):
            others = [i for i, name in enumerate(scenes.TRUTHS) if name != kind]
            assert (right[others] > 0.9).all()


def test_nothing_is_right_in_a_black_picture():
    assert scenes.truths(LONG, np.zeros((32, 32, 3), np.uint8)).tolist() == [0.25, 0, 0, 0]  # yellow is not there


def test_the_captions_of_a_router_are_in_one_split():
    sizes = {"backbone": 300, "train": 80, "val": 40, "test": 60}
    dataset = Scenes(sizes, seed=1)
    table = dataset.table
    assert table["split"].value_counts().to_dict() == sizes
    own = table[table["split"] != "backbone"]
    assert own["path"].is_unique
    held = set(own.loc[own["split"] != "train", "path"])
    assert not held & set(table.loc[table["split"] == "backbone", "path"])
    assert dataset[3] == table["path"][3]
    assert Scenes(sizes, seed=1).table.equals(table)
    assert not Scenes(sizes, seed=2).table.equals(table)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train": 1}, "must give the number of captions for each of backbone, train, val, test"),
        ({"backbone": 1, "train": 10**6, "val": 1, "test": 1}, "can have 20,000 captions together"),
        ({"backbone": 1, "train": 0, "val": 1, "test": 1}, "sizes.train=0"),
    ],
)
def test_wrong_sizes(sizes, message):
    with pytest.raises(ConfigError, match=message):
        Scenes(sizes).table  # noqa: B018
