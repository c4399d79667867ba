"""Class proportions are draws from a Dirichlet distribution; equal sizes; every image at most once."""

import numpy as np
import pandas as pd
import pytest

from iciia_exp.data.clients import ROLES
from iciia_exp.data.partitions.dirichlet import Dirichlet, draw_classes, draw_urn
from iciia_exp.errors import ConfigError


def table(images=6000, classes=10, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, images, p=rng.dirichlet(np.full(classes, 5)))
    split = rng.choice(["train", "val", "test", "backbone"], images, p=[0.5, 0.2, 0.2, 0.1])
    return pd.DataFrame({"label": labels, "split": split, "owner": None, "parent": None})


def proportions(clients, labels, role):
    counts = np.stack([np.bincount(labels[clients[role][i]], minlength=10) for i in range(len(clients))])
    return counts / counts.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("split", ["client", "within"])
@pytest.mark.parametrize("alpha", [0.01, 0.5, 100])
@pytest.mark.parametrize("sizes", [(16, None), (None, 40), (20, 30)])
def test_properties(split, alpha, sizes):
    images, number = sizes
    frame = table()
    clients = Dirichlet(alpha, images, number, split).assign(frame, 10)
    splits = frame["split"].to_numpy()
    for role in ROLES:
        assert (splits[clients[role].values] == role).all()
        assert len(np.unique(clients[role].values)) == len(clients[role].values)
        lengths = clients[role].lengths
        assert len(set(lengths[lengths > 0])) == 1
    lengths = np.stack([clients[role].lengths for role in ROLES])
    if split == "within":
        assert (lengths > 0).all()
    else:
        assert ((lengths > 0).sum(axis=0) == 1).all()
    if images is not None:
        assert (lengths.sum(axis=0) == images).all()
    if number is not None:
        assert len(clients) == number
    if number is None or images is None:  # what stays undealt is less than a client, or what whole quotas leave
        assert lengths.sum() > (0.75 if images and split == "within" else 0.95) * (splits != "backbone").sum()
    assert len(set(clients.ids)) == len(clients)
    assert set(clients.types) == {f"Dir({alpha:g})"}


def test_the_urn_is_a_dirichlet_distribution():
    """Moments of the proportions: E q = p, Var q_k = p_k (1 - p_k) / (A + 1), A the sum of alpha."""
    alpha = np.array([0.2, 0.5, 0.3])
    classes = draw_urn(alpha, 4000, 200, np.random.default_rng(0))
    q = np.stack([(classes == k).mean(axis=1) for k in range(3)], axis=1)
    np.testing.assert_allclose(q.mean(axis=0), alpha, atol=0.02)
    variance = alpha * (1 - alpha) / 2 + alpha * (1 - alpha) * (1 - 1 / 2) / 200  # of q, and of 200 draws from it
    np.testing.assert_allclose(q.var(axis=0), variance, rtol=0.05)
    # exchangeable: the first images of a client are distributed like its last
    early, late = ((classes[:, part] == 1).mean(axis=1) for part in (slice(0, 50), slice(150, 200)))
    assert early.var() == pytest.approx(late.var(), rel=0.08)
    assert (classes[:, 0] == classes[:, -1]).mean() == pytest.approx(0.5 + 0.5 * (alpha**2).sum(), abs=0.02)


def test_alpha_decides_the_skew():
    frame = table()
    classes = [
        Dirichlet(alpha).assign(frame, 10).statistics(frame["label"].to_numpy())["classes_mean"].mean()
        for alpha in (0.001, 0.1, 1, 100)
    ]
    assert classes == sorted(classes)
    assert classes[0] < 1.5
    assert classes[1] < 3.5
    assert classes[3] > 7


def test_within_a_client_is_the_same_in_all_roles():
    frame = table(images=20_000)
    labels = frame["label"].to_numpy()
    clients = Dirichlet(0.3, None, 60, "within").assign(frame, 10)
    train, test = proportions(clients, labels, "train"), proportions(clients, labels, "test")
    same = np.abs(train - test).sum(axis=1).mean() / 2
    others = np.abs(train - np.roll(test, 1, axis=0)).sum(axis=1).mean() / 2
    assert same < 0.15
    assert others > 0.5


def test_classes_that_run_out_do_not_stop_dealing():
    """All images are dealt, to the last, whatever the proportions ask for."""
    left = np.array([[50, 10, 40], [25, 5, 20]])
    for seed in range(5):
        drawn = draw_classes(left, np.array([10, 5]), 0.05, 10, np.random.default_rng(seed))
        assert np.bincount(drawn[:, :10].ravel()).tolist() == left[0].tolist()
        assert np.bincount(drawn[:, 10:].ravel()).tolist() == left[1].tolist()


def test_roles_with_different_classes():
    frame = table()
    frame = frame[(frame["label"] < 5) | (frame["split"] != "test")].reset_index(drop=True)
    clients = Dirichlet(0.1, None, 20, "within").assign(frame, 10)
    assert set(frame["label"].iloc[clients.test.values]) <= set(range(5))
    assert (clients.test.lengths == clients.test.lengths[0]).all()


@pytest.mark.parametrize("split", ["client", "within"])
def test_the_seed_alone_decides(split):
    one, again, other = (Dirichlet(split=split, seed=s).assign(table(), 10) for s in (0, 0, 1))
    np.testing.assert_array_equal(one.train.values, again.train.values)
    assert not np.array_equal(one.train.values[:100], other.train.values[:100])


@pytest.mark.parametrize(
    ("arguments", "change", "key", "words"),
    [
        ({"alpha": 0}, {}, "alpha", "above 0"),
        ({"images_per_client": None}, {}, "clients", "give a number of clients"),
        ({"images_per_client": 0}, {}, "images_per_client", "at least 1"),
        ({"clients": 2}, {}, "clients", "at least 3"),
        ({"clients": 0, "split": "within"}, {}, "clients", "at least 1"),
        ({"images_per_client": 1500}, {}, "images_per_client", "do not fill one client"),
        ({"clients": 3}, {}, "clients", "would leave no client for the .* images; use at least"),
        (
            {"images_per_client": 2, "split": "within"},
            {},
            "images_per_client",
            "without val images; use at least",
        ),
        ({"clients": 5000}, {}, "clients", "the images fill .* clients of 16"),
        ({"clients": 5000, "split": "within"}, {}, "clients", "the images fill .* clients of 16"),
        ({"clients": 9000, "images_per_client": None}, {}, "clients", "images are enough for; use fewer"),
        ({"split": "within", "clients": 2000, "images_per_client": None}, {}, "clients", "use fewer"),
        ({"split": "across"}, {}, "split", "client, within"),
        ({}, {"label": [[0]] * 6000}, "", "needs one label per image"),
        ({}, {"split": "train"}, "", "no test images"),
    ],
)
def test_impossible_partitions_name_their_key(arguments, change, key, words):
    with pytest.raises(ConfigError, match=words) as error:
        Dirichlet(**arguments).assign(table().assign(**change), 10)
    assert error.value.key == key
