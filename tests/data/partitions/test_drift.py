"""Histories in phases: few classes at a time, some replaced from one phase to the next, every image at most once."""

import itertools

import numpy as np
import pandas as pd
import pytest

from iciia_exp.data.clients import ROLES
from iciia_exp.data.partitions.drift import Drift, draw_phases
from iciia_exp.errors import ConfigError


def table(images=3000, classes=12, parents=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    split = rng.choice(["backbone", "train", "val", "test"], images, p=[0.1, 0.5, 0.2, 0.2])
    return pd.DataFrame({"label": labels, "split": split, "owner": None, "parent": [f"p{k % parents}" for k in labels]})


@pytest.mark.parametrize("by", ["class", "parent"])
@pytest.mark.parametrize(
    ("k", "n", "phases", "turnover"), [(1, 4, 3, 1), (2, 7, 4, 1), (2, 8, 2, 2), (3, 6, 3, 0), (2, 8, 1, 2)]
)
@pytest.mark.parametrize("deals", [1, 3])
def test_properties(by, k, n, phases, turnover, deals):
    frame = table()
    clients = Drift(k, n, phases, turnover, by, deals).assign(frame, 12)
    labels, splits, parents = (frame[c].to_numpy() for c in ("label", "split", "parent"))
    assert ((np.stack([clients[role].lengths for role in ROLES]) > 0).sum(axis=0) == 1).all()
    for role in ROLES:
        ragged = clients[role]
        assert (splits[ragged.values] == role).all()
        assert set(ragged.lengths) == {0, phases * n}
        if deals == 1 or role == "test":
            assert len(np.unique(ragged.values)) == len(ragged.values)
            assert len(ragged.values) > 0.75 * (splits == role).sum()
        for i in np.flatnonzero(ragged.lengths):
            row = ragged[i]
            assert len(np.unique(row)) == len(row)
            history = [np.unique(phase) for phase in labels[row].reshape(phases, n)]
            for phase in labels[row].reshape(phases, n):
                counts = np.unique(phase, return_counts=True)[1]
                assert len(counts) == k
                assert np.ptp(counts) <= 1
            for before, after in itertools.pairwise(history):
                assert len(np.setdiff1d(after, before)) == turnover
            if by == "parent":
                assert set(parents[row]) == {clients.types[i]}
    assert len(set(clients.ids)) == len(clients)


def test_images_are_shuffled_within_a_phase():
    frame = table()
    labels = frame["label"].to_numpy()
    clients = Drift(2, 8, 4, 1, deals=1).assign(frame, 12)
    blocks = [np.count_nonzero(np.diff(phase)) == 1 for phase in labels[clients.train.values].reshape(-1, 8)]
    assert np.mean(blocks) < 0.2  # only by chance are the classes of a phase one after the other


def test_a_history_drops_exhausted_classes_first():
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = draw_phases(np.array([4, 100, 100, 100]), 4, 2, 2, 1, rng)
        assert not (0 in first and 0 in second)
    assert draw_phases(np.array([4, 4, 3]), 4, 2, 2, 1, rng) is None  # nobody is there to replace
    assert draw_phases(np.array([4, 4, 100]), 4, 1, 3, 1, rng) is not None


@pytest.mark.parametrize("by", ["class", "parent"])
def test_the_seed_alone_decides(by):
    one, again, other = (Drift(by=by, seed=s, deals=1).assign(table(), 12) for s in (0, 0, 1))
    np.testing.assert_array_equal(one.test.values, again.test.values)
    assert not np.array_equal(one.test.values[:50], other.test.values[:50])


def test_parents_of_too_few_classes_have_no_clients():
    frame = table()
    frame["parent"] = np.where(frame["label"] < 2, "small", "large")
    clients = Drift(2, 8, 3, 1, by="parent", deals=1).assign(frame, 12)
    assert set(clients.types) == {"large"}
    still = Drift(2, 8, 3, 0, by="parent", deals=1).assign(frame, 12)
    assert set(still.types) == {"small", "large"}


@pytest.mark.parametrize(
    ("arguments", "change", "key", "words"),
    [
        ({"classes_per_client": 0}, {}, "classes_per_client", "at least 1"),
        (
            {"classes_per_client": 3, "images_per_phase": 2},
            {},
            "images_per_phase",
            "at least 3 .one image of each class",
        ),
        ({"phases": 0}, {}, "phases", "at least 1"),
        ({"turnover": 3}, {}, "turnover", "0 to 2"),
        ({"classes_per_client": 8, "images_per_phase": 8, "turnover": 5}, {}, "classes_per_client", "use 1 to 7"),
        ({"classes_per_client": 4, "by": "parent"}, {}, "classes_per_client", "has 4 classes, .* use 1 to 3"),
        ({"images_per_phase": 900}, {}, "images_per_phase", "images do not fill 4 phases of 2 classes"),
        ({"by": "owner"}, {}, "by", "class, parent"),
        ({"deals": 0}, {}, "deals", "1 to 1000"),
        ({"val_share": 1.0}, {}, "val_share", "at most 0.9"),
        ({"by": "parent"}, {"parent": None}, "by", "no parent category"),
        ({}, {"label": [[0]] * 3000}, "", "needs one label per image"),
        ({}, {"split": "train"}, "", "no test images"),
    ],
)
def test_impossible_partitions_name_their_key(arguments, change, key, words):
    with pytest.raises(ConfigError, match=words) as error:
        Drift(**{"deals": 1, **arguments}).assign(table().assign(**change), 12)
    assert error.value.key == key
