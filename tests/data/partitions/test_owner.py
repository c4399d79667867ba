"""Every owner is a client: the dataset's splits, owners dealt to roles, and images dealt within owners."""

import numpy as np
import pandas as pd
import pytest

from iciia_exp.data.clients import ROLES
from iciia_exp.data.partitions.owner import Owner, deal_owners, give_val, most_frequent
from iciia_exp.errors import ConfigError


def table(owners=60, images=1500, parents=4, splits="within", seed=0):
    """Owners of different sizes, each mostly of one parent; ``splits``: by ``client`` or ``within``."""
    rng = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(owners), rng.choice(owners, images - owners, p=rng.dirichlet(np.ones(owners)))])
    owner = rng.permutation(owner)
    parent = np.where(rng.random(images) < 0.8, owner % parents, rng.integers(0, parents, images))
    if splits == "client":
        split = np.where(owner % 5 == 0, "test", "train")
    else:
        split = np.where(rng.random(images) < 0.1, "test", "train")
    split = np.where(rng.random(images) < 0.05, "backbone", split)
    return pd.DataFrame(
        {
            "label": rng.integers(0, 10, images),
            "split": split,
            "owner": [f"user{i}" for i in owner],
            "parent": [f"p{k}" for k in parent],
        }
    )


def check(clients, frame):
    """Properties of every split: one owner a client, roles disjoint, no backbone images, names and types right."""
    owners, parents = frame["owner"].to_numpy(), frame["parent"].to_numpy()
    everything = np.concatenate([clients[role].values for role in ROLES])
    assert len(np.unique(everything)) == len(everything)
    assert not (frame["split"].to_numpy()[everything] == "backbone").any()
    assert len(set(clients.ids)) == len(clients)
    for i in range(len(clients)):
        rows = np.concatenate([clients[role][i] for role in ROLES])
        assert set(owners[rows]) == {clients.ids[i]}
        names, counts = np.unique(parents[rows], return_counts=True)
        assert clients.types[i] == names[counts.argmax()]  # the first of equals
    assert all((clients[role].lengths > 0).any() for role in ROLES)
    return set(everything.tolist())


def test_given_splits_with_val_images_are_kept():
    frame = table()
    rng = np.random.default_rng(0)
    frame.loc[(frame["split"] == "train") & (rng.random(len(frame)) < 0.3), "split"] = "val"
    clients = Owner().assign(frame, 10)
    check(clients, frame)
    for role in ROLES:
        assert sorted(clients[role].values) == np.flatnonzero(frame["split"] == role).tolist()


def test_given_by_client_takes_val_clients():
    frame = table(splits="client")
    clients = Owner(val_share=0.25).assign(frame, 10)
    assert check(clients, frame) == set(np.flatnonzero(frame["split"] != "backbone").tolist())
    has = np.stack([clients[role].lengths > 0 for role in ROLES])
    assert (has.sum(axis=0) == 1).all()
    train, val, test = has.sum(axis=1)
    assert val == round(0.25 * (train + val))
    assert test == 12
    assert sorted(clients.test.values) == np.flatnonzero(frame["split"] == "test").tolist()


def test_given_within_takes_val_images_of_each_client():
    frame = table(images=3000)
    clients = Owner().assign(frame, 10)
    check(clients, frame)
    assert sorted(clients.test.values) == np.flatnonzero(frame["split"] == "test").tolist()
    train, val = clients.train.lengths, clients.val.lengths
    both = train + val
    expected = np.clip(np.floor(0.2 * both + 0.5), np.minimum(both - 1, 1), both - 1)
    np.testing.assert_array_equal(val[both > 0], expected[both > 0])


def test_a_single_train_image_stays_in_train():
    roles = give_val(np.array([0, 2, 0, 0]), np.array([0, 0, 1, 1]), np.arange(4), 0.9, np.random.default_rng(0))
    assert roles.tolist() == [0, 2, 0, 1]


def test_by_client_every_parent_has_clients_of_all_roles():
    frame = table(owners=100)
    clients = Owner("client", test_share=0.3, val_share=0.2).assign(frame, 10)
    assert check(clients, frame) == set(np.flatnonzero(frame["split"] != "backbone").tolist())
    has = np.stack([clients[role].lengths > 0 for role in ROLES])
    assert (has.sum(axis=0) == 1).all()
    for client_type in set(clients.types):
        assert has[:, clients.types == client_type].any(axis=1).all()
    assert has[2].mean() == pytest.approx(0.3, abs=0.03)
    assert has[1].sum() / has[:2].sum() == pytest.approx(0.2, abs=0.03)


def test_small_kinds_are_dealt_out_together():
    roles = deal_owners(np.repeat(np.arange(60), [3] + [1] * 59), 0.2, 0.25, np.random.default_rng(0))
    assert sorted(roles[:3]) == [0, 1, 2]
    assert np.bincount(roles[3:]).tolist() == [35, 12, 12]


@pytest.mark.parametrize("time", [False, True])
def test_within_every_client_has_all_roles(time):
    frame = table(splits="client")
    if time:
        frame["time"] = np.random.default_rng(1).integers(0, 50, len(frame)).astype(float)
    clients = Owner("within", test_share=0.25, val_share=0.2, min_images=5).assign(frame, 10)
    check(clients, frame)
    lengths = np.stack([clients[role].lengths for role in ROLES])
    assert (lengths > 0).all()
    total = lengths.sum(axis=0)
    assert total.min() >= 5
    assert len(clients) == (frame.loc[frame["split"] != "backbone", "owner"].value_counts() >= 5).sum()
    assert (np.abs(lengths[2] - 0.25 * total) <= 0.5).all()
    if time:
        times = frame["time"].to_numpy()
        for i in range(len(clients)):
            history = np.concatenate([times[clients[role][i]] for role in ROLES])
            assert (np.diff(history) >= 0).all()  # train, then val, then test


def test_within_leaves_out_owners_of_less_than_three_images():
    frame = pd.DataFrame({"label": 0, "split": "train", "owner": [*"xxyzzz", "w"], "parent": None})
    frame.loc[6, "split"] = "backbone"
    clients = Owner("within").assign(frame, 10)
    assert clients.ids.tolist() == ["z"]
    assert [clients[role].lengths.tolist() for role in ROLES] == [[1], [1], [1]]


def test_time_orders_the_images_of_a_client():
    frame = table()
    rng = np.random.default_rng(0)
    frame["time"] = np.where(rng.random(len(frame)) < 0.1, np.nan, rng.random(len(frame)))
    clients = Owner().assign(frame, 10)
    for role in ROLES:
        for i in range(len(clients)):
            times = frame["time"].to_numpy()[clients[role][i]]
            known = times[~np.isnan(times)]
            assert (np.diff(known) > 0).all()
            assert np.isnan(times[len(known) :]).all()  # unknown ones last


@pytest.mark.parametrize(("times", "in_time"), [([1, 2, None], True), ([1, 1, None], False), ([None] * 3, False)])
def test_a_missing_time_leaves_the_order_of_time(times, in_time):
    frame = table(images=300)
    frame["time"] = np.resize(np.array(times, dtype=float), len(frame))
    assert Owner().assign(frame, 10).in_time is in_time


def test_without_time_images_are_shuffled():
    """A table sorted by class must not put images of one class next to each other in a chunk."""
    frame = table(images=3000).sort_values("label").reset_index(drop=True)
    clients = Owner().assign(frame, 10)
    ordered = [np.all(np.diff(clients.train[i]) > 0) for i in range(len(clients)) if clients.train.lengths[i] > 10]
    assert not any(ordered)


@pytest.mark.parametrize("split", ["given", "client", "within"])
def test_the_seed_alone_decides(split):
    one, again, other = (Owner(split, seed=s).assign(table(), 10) for s in (0, 0, 1))
    for role in ROLES:
        np.testing.assert_array_equal(one[role].values, again[role].values)
        np.testing.assert_array_equal(one[role].offsets, again[role].offsets)
    assert not np.array_equal(one.train.values, other.train.values)


@pytest.mark.parametrize("split", ["given", "client", "within"])
def test_several_labels_per_image_and_no_parents(split):
    frame = table().assign(parent=None)
    frame["label"] = [[k, (k + 1) % 10] if k else [] for k in frame["label"]]
    clients = Owner(split).assign(frame, 10)
    assert set(clients.types) == {"owner"}
    assert all((clients[role].lengths > 0).any() for role in ROLES)


def test_most_frequent():
    rows, values = np.array([0, 0, 0, 2, 2, 3]), np.array([1, 1, 0, 2, 1, 0])
    assert most_frequent(rows, values, 5).tolist() == [1, -1, 1, 0, -1]
    assert most_frequent(rows[:0], values[:0], 2).tolist() == [-1, -1]


def test_images_of_the_backbone_need_no_owner():
    frame = table()
    frame.loc[frame["split"] == "backbone", "owner"] = None
    check(Owner().assign(frame, 10), frame)


@pytest.mark.parametrize(
    ("arguments", "change", "key", "words"),
    [
        ({"split": "clients"}, {}, "split", "did you mean client"),
        ({"min_images": 0}, {}, "min_images", "at least 1"),
        ({"min_images": 2000}, {}, "min_images", "every owner has fewer than 2000 images, the largest"),
        ({"test_share": 0}, {}, "test_share", "above 0"),
        ({"val_share": 1}, {}, "val_share", "at most 0.9"),
        (
            {},
            {"owner": None},
            "",
            "of the dataset's .* images have no owner; give them .*dataset.csv=FILE.*, or choose another partition",
        ),
        ({}, {"split": "train"}, "split", "has test images; use split=client or split=within"),
        ({"split": "client"}, {"owner": "only"}, "split", "none of the 1 owners has val images; use split=given"),
        ({}, {"split": "backbone"}, "min_images", "every owner has fewer than 1 images, the largest 0"),
    ],
)
def test_impossible_partitions_name_their_key(arguments, change, key, words):
    with pytest.raises(ConfigError, match=words) as error:
        Owner(**arguments).assign(table().assign(**change), 10)
    assert error.value.key == key


def test_the_writers_of_mnist(reference):
    """539 writers of train images, a fifth of them for val, and 297 others of test images."""
    path = reference.parent / "data" / "mnist_writers.npz"
    if not path.is_file():
        pytest.skip("MNIST with its writers is not on this machine")
    with np.load(path) as data:
        split = np.where(data["is_test"], "test", "train")
        frame = pd.DataFrame({"label": data["labels"], "split": split, "owner": data["writers"], "parent": None})
    clients = Owner().assign(frame, 10)
    statistics = clients.statistics(frame["label"].to_numpy()).set_index("role")
    assert statistics["clients"].to_dict() == {"train": 431, "val": 108, "test": 297}
    assert statistics["images"].sum() == 70_000


def test_images_without_an_owner_are_left_out(caplog):
    table = pd.DataFrame(
        {"label": 0, "split": ["train", "test"] * 6, "owner": ["a", "a", "b", "b"] * 3, "parent": None}
    )
    table.loc[[2, 3], "owner"] = None
    with caplog.at_level("WARNING"):
        clients = Owner(val_share=0.2).assign(table, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "partition: 2 of the dataset's 12 images have no owner; they are left out"
    ]
    used = np.concatenate([clients[role].values for role in ("train", "val", "test")])
    assert sorted(used) == [0, 1, *range(4, 12)]
    assert clients.ids.tolist() == ["a", "b"]
