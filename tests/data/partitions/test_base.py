"""What several partitions share: drawing shares, the fall-back for val images, and parents by class."""

import numpy as np
import pandas as pd
import pytest

from iciia_exp.data.clients import ROLES
from iciia_exp.data.partitions import ClassesPerClient, Dirichlet, Drift, Owner, ParentCategory
from iciia_exp.data.partitions.base import draw_share, numbered, parents_of_classes, role_pools, share_out
from iciia_exp.errors import ConfigError


def table(images=2400, classes=8, val=False, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    probabilities = [0.5, 0.2, 0.2, 0.1] if val else [0.7, 0.0, 0.2, 0.1]
    split = rng.choice(["train", "val", "test", "backbone"], images, p=probabilities)
    return pd.DataFrame({"label": labels, "split": split, "owner": None, "parent": [f"p{k % 2}" for k in labels]})


def test_a_share_of_every_stratum():
    strata = np.repeat([0, 1, 2, 3, 4], [100, 10, 2, 1, 3])
    drawn = draw_share(strata, 0.2, np.random.default_rng(0).random(len(strata)))
    assert np.bincount(strata[drawn], minlength=5).tolist() == [20, 2, 1, 0, 1]
    spare = draw_share(strata, 0.9, np.random.default_rng(0).random(len(strata)), spare=2)
    assert np.bincount(strata[spare], minlength=5).tolist() == [90, 8, 0, 0, 1]


def test_a_share_takes_the_last_in_order():
    strata = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    order = np.array([3, 0, 1, 1, 2, 2, 0, 3])
    assert np.flatnonzero(draw_share(strata, 0.25, order)).tolist() == [0, 7]


def test_val_images_come_from_train_class_by_class():
    frame = table()
    labels = frame["label"].to_numpy()
    pools = role_pools(frame, labels, 0.25, np.random.default_rng(0), Drift(deals=1))
    train = np.flatnonzero(frame["split"] == "train")
    assert sorted([*pools["train"], *pools["val"]]) == train.tolist()
    assert pools["test"].tolist() == np.flatnonzero(frame["split"] == "test").tolist()
    share = np.bincount(labels[pools["val"]]) / np.bincount(labels[train])
    np.testing.assert_allclose(share, 0.25, atol=0.005)


def test_a_dataset_with_val_images_draws_nothing():
    frame = table(val=True)
    rng = np.random.default_rng(0)
    pools = role_pools(frame, frame["label"].to_numpy(), 0.25, rng, Drift(deals=1))
    for role in ROLES:
        assert pools[role].tolist() == np.flatnonzero(frame["split"] == role).tolist()
    assert rng.random() == np.random.default_rng(0).random()


def test_one_train_image_a_class_leaves_nothing_for_val():
    frame = pd.DataFrame({"label": [0, 1, 0], "split": ["train", "train", "test"]})
    with pytest.raises(ConfigError, match="no class has two train images") as error:
        role_pools(frame, frame["label"].to_numpy(), 0.2, np.random.default_rng(0), Drift(deals=1))
    assert error.value.key == "val_share"


@pytest.mark.parametrize("client_type", [ClassesPerClient, Dirichlet, Drift])
def test_every_partition_by_class_falls_back(client_type):
    frame = table()
    clients = client_type(val_share=0.3).assign(frame, 8)
    values = {role: clients[role].values for role in ROLES}
    assert not np.intersect1d(values["train"], values["val"]).size
    for role, split in (("train", "train"), ("val", "train"), ("test", "test")):
        assert set(frame["split"].iloc[values[role]]) == {split}
    share = len(values["val"]) / (len(values["train"]) + len(values["val"]))
    assert share == pytest.approx(0.3, abs=0.06)
    # with val images of its own, the share does not matter
    own = table(val=True)
    one, other = (client_type(val_share=share).assign(own, 8) for share in (0.2, 0.5))
    np.testing.assert_array_equal(one.train.values, other.train.values)


def test_parents_of_a_column_with_gaps():
    frame = pd.DataFrame({"label": [2, 0, 1, 0], "parent": ["b", None, "a", "b"]})
    codes, names = parents_of_classes(frame, 3, "by", "parent", "use by=class")
    assert (codes.tolist(), names) == ([1, 0, 1], ["a", "b"])


def test_largest_remainders_come_first():
    sizes = {"train": 60, "val": 17, "test": 23}
    lacking = "no {role}"
    assert share_out(10, sizes, "n", lacking) == {"train": 6, "val": 2, "test": 2}
    assert share_out(7, sizes, "n", lacking) == {"train": 4, "val": 1, "test": 2}
    with pytest.raises(ConfigError, match="n=2: would leave no val; use at least 6"):
        share_out(2, sizes, "n", lacking)
    assert share_out(6, sizes, "n", lacking)["val"] == 1


def test_numbers_are_as_wide_as_needed():
    assert numbered("c", 10)[-1] == "c-9"
    assert numbered("c", 101)[0] == "c-000"


@pytest.mark.parametrize(
    "make",
    [
        lambda most: ParentCategory(train_chunk=20, test_chunk=10, train_images=most),
        lambda most: Owner(split="within", train_images=most),
        lambda most: ClassesPerClient(split="within", images_per_client=30, train_images=most),
    ],
)
def test_clients_with_few_train_images(make):
    rng = np.random.default_rng(0)
    split = np.repeat(["train", "test"], [400, 200])
    label = rng.integers(0, 8, 600)
    owner = np.array([f"o{i}" for i in rng.integers(0, 12, 600)], dtype=object)
    images = pd.DataFrame({"label": label, "split": split, "owner": owner, "parent": [f"p{k // 4}" for k in label]})
    every, few, fewer = (make(most).assign(images, 8) for most in (None, 7, 3))
    assert every.train.lengths.max() > 7
    assert few.train.lengths.tolist() == every.train.lengths.clip(max=7).tolist()
    for client in range(len(every)):
        assert set(fewer.train[client]) <= set(few.train[client]) <= set(every.train[client])
        assert [i for i in every.train[client] if i in set(few.train[client])] == few.train[client].tolist(), (
            "the order"
        )
    for role in ("val", "test"):
        assert few[role].values.tolist() == every[role].values.tolist()
    with pytest.raises(ConfigError, match="train_images"):
        make(0)
