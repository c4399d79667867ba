"""Between one parent category and a uniform mixture, with the same number and sizes of clients."""

import numpy as np
import pandas as pd
import pytest

from iciia_exp.data.clients import ROLES
from iciia_exp.data.partitions import ParentCategory, ReserveRatio
from iciia_exp.data.partitions.parent_category import mix_samples
from iciia_exp.errors import ConfigError

CHUNKS = {"train_chunk": 20, "test_chunk": 10}


def table(images=6000, classes=12, parents=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    split = rng.choice(["train", "test", "backbone"], images, p=[0.6, 0.3, 0.1])
    return pd.DataFrame({"label": labels, "split": split, "owner": None, "parent": [f"p{k % parents}" for k in labels]})


def purity(clients, frame, role):
    """Return the share of each client's images that are of its most frequent parent."""
    codes = pd.factorize(frame["parent"])[0]
    return np.array([np.bincount(codes[clients[role][i]]).max() / len(clients[role][i]) for i in range(len(clients))])


@pytest.mark.parametrize("of", ["samples", "clients"])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_properties(of, ratio):
    frame = table()
    clients = ReserveRatio(ratio, of, **CHUNKS).assign(frame, 12)
    plain = ParentCategory(**CHUNKS).assign(frame, 12)
    everything = np.concatenate([clients[role].values for role in ROLES])
    assert sorted(everything) == np.flatnonzero(frame["split"] != "backbone").tolist()
    assert set(frame["split"].iloc[clients.test.values]) == {"test"}
    for role in ROLES:
        assert sorted(clients[role].lengths) == sorted(plain[role].lengths)
        assert (clients[role].lengths > 0).all()
    assert len(set(clients.ids)) == len(clients)
    pure = np.stack([purity(clients, frame, role) for role in ROLES])
    whole = (pure == 1).all(axis=0)
    if of == "clients":
        assert whole.sum() == round(ratio * len(clients))
        assert set(clients.types[~whole]) <= {"mixed"}
        assert "mixed" not in clients.types[whole]
    elif ratio < 1:
        assert not whole.any()
        parents = frame["parent"].to_numpy()[clients.train.values]
        own = (parents == clients.types[clients.train.row_numbers]).mean()
        # r of a client's images are of its own parent, and a quarter of the rest
        assert own == (0 if ratio == 0 else pytest.approx(ratio + (1 - ratio) / 4, abs=0.03))
        if ratio == 0:
            assert pure[0].max() < 0.7
        assert set(clients.types) == ({"mixed"} if ratio == 0 else {"p0", "p1", "p2", "p3"})


@pytest.mark.parametrize("of", ["samples", "clients"])
def test_a_ratio_of_1_is_parent_category(of):
    frame = table()
    for seed in range(2):
        clients = ReserveRatio(1.0, of, seed=seed, **CHUNKS).assign(frame, 12)
        plain = ParentCategory(**CHUNKS, seed=seed).assign(frame, 12)
        for name in ("ids", "types"):
            np.testing.assert_array_equal(getattr(clients, name), getattr(plain, name))
        for role in ROLES:
            np.testing.assert_array_equal(clients[role].offsets, plain[role].offsets)
            np.testing.assert_array_equal(clients[role].values, plain[role].values)


def test_mixing_keeps_the_sizes_and_the_ratio():
    frame = table()
    parents = pd.factorize(frame["parent"])[0]
    pools = {role: np.flatnonzero(frame["split"] == role) for role in ("train", "test")}
    mixed = mix_samples(parents, pools, 0.4, np.random.default_rng(0))
    for pool in pools.values():
        np.testing.assert_array_equal(np.bincount(mixed[pool]), np.bincount(parents[pool]))
        kept = (mixed[pool] == parents[pool]).mean()
        assert kept == pytest.approx(0.4 + 0.6 / 4, abs=0.04)
    rest = np.flatnonzero(frame["split"] == "backbone")
    np.testing.assert_array_equal(mixed[rest], parents[rest])


@pytest.mark.parametrize("of", ["samples", "clients"])
def test_the_seed_alone_decides(of):
    one, again, other = (ReserveRatio(0.5, of, seed=s, **CHUNKS).assign(table(), 12) for s in (0, 0, 1))
    np.testing.assert_array_equal(one.train.values, again.train.values)
    assert not np.array_equal(one.train.values, other.train.values)


def test_imagenet_has_as_many_clients_at_every_ratio(reference):
    groups = pd.read_csv(reference / "imagenet_class_groups.csv").sort_values("class_index")["group"].to_numpy()
    labels = np.repeat(np.arange(1000), 350)  # a quarter of the train images: enough for all 16-image chunks
    split = np.tile(np.repeat(["train", "test"], [300, 50]), 1000)
    frame = pd.DataFrame({"label": labels, "split": split, "owner": None, "parent": groups[labels].astype(str)})
    classes = []
    for ratio in (0.0, 0.5, 1.0):
        clients = ReserveRatio(ratio).assign(frame, 1000)
        assert len(clients) == 3161
        classes.append(clients.classes_per_client(labels, "test").mean())
    assert classes == sorted(classes, reverse=True)
    assert classes[0] > 15.5  # 16 images of 1,000 classes
    assert classes[2] < 10


@pytest.mark.parametrize(
    ("arguments", "change", "key", "words"),
    [
        ({"ratio": 1.1}, {}, "ratio", "at least 0, at most 1"),
        ({"of": "images"}, {}, "of", "samples, clients"),
        ({"train_chunk": 1}, {}, "train_chunk", "at least 2"),
        ({}, {"parent": None}, "", "no parent category for its classes"),
        ({}, {"label": [[0]] * 6000}, "", "needs one label per image"),
        ({}, {"split": "train"}, "test_chunk", "no parent category has both"),
        ({"of": "clients"}, {"split": "train"}, "test_chunk", "no parent category has both"),
    ],
)
def test_impossible_partitions_name_their_key(arguments, change, key, words):
    with pytest.raises(ConfigError, match=words) as error:
        ReserveRatio(**arguments).assign(table().assign(**change), 12)
    assert error.value.key == key
