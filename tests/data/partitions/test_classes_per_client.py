"""Properties that must hold for any labels: disjoint, deterministic, few classes, and covered where promised."""

import numpy as np
import pandas as pd
import pytest

from iciia_exp.data.clients import ROLES
from iciia_exp.data.partitions.classes_per_client import ClassesPerClient, deal_classes
from iciia_exp.errors import ConfigError


def table(images=1800, classes=10, seed=0, parents=3):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    split = rng.choice(["backbone", "train", "val", "test"], images, p=[0.2, 0.4, 0.1, 0.3])
    return pd.DataFrame({"label": labels, "split": split, "owner": None, "parent": [f"p{k % parents}" for k in labels]})


def assign(frame=None, **arguments):
    frame = table() if frame is None else frame
    return ClassesPerClient(**{"deals": 1, **arguments}).assign(frame, 10), frame


@pytest.mark.parametrize("split", ["client", "within"])
@pytest.mark.parametrize("by", ["class", "parent"])
@pytest.mark.parametrize(("k", "n"), [(1, 8), (2, 17), (3, 30)])
@pytest.mark.parametrize("deals", [1, 3])
def test_properties(split, by, k, n, deals):
    clients, frame = assign(classes_per_client=k, images_per_client=n, by=by, split=split, deals=deals)
    labels, splits = frame["label"].to_numpy(), frame["split"].to_numpy()
    parents = frame["parent"].to_numpy()
    for role in ROLES:
        ragged = clients[role]
        assert (splits[ragged.values] == role).all()  # images of other roles or of the backbone never come in
        lengths = ragged.lengths[ragged.lengths > 0]
        assert len(lengths)
        assert len(set(lengths)) == 1
        for i in range(len(clients)):
            row = ragged[i]
            assert len(np.unique(row)) == len(row)
            if len(row):
                counts = np.bincount(labels[row])
                counts = counts[counts > 0]
                assert len(counts) == min(k, lengths[0])
                assert counts.max() - counts.min() <= 1  # as even as whole numbers allow
                if by == "parent":
                    assert set(parents[row]) == {clients.types[i]}
    assert len(np.unique(clients.test.values)) == len(clients.test.values)  # every test image counts once
    if deals == 1:
        assert len(np.unique(clients.train.values)) == len(clients.train.values)
    if split == "client":
        assert ((np.stack([clients[r].lengths for r in ROLES]) > 0).sum(axis=0) == 1).all()
        assert clients.test.lengths.max() == n
    else:
        whole = np.stack([clients[r].lengths for r in ROLES])[:, clients.test.lengths > 0]
        assert (whole > 0).all()
        assert (whole.sum(axis=0) == n).all()
    assert len(set(clients.ids)) == len(clients)


def test_the_seed_alone_decides():
    one, _ = assign(seed=0, images_per_client=10)
    again, _ = assign(seed=0, images_per_client=10)
    other, _ = assign(seed=1, images_per_client=10)
    np.testing.assert_array_equal(one.test.values, again.test.values)
    assert not np.array_equal(one.test.values[:50], other.test.values[:50])


def test_coverage_few_images_stay_undealt():
    clients, frame = assign(classes_per_client=2, images_per_client=10)
    dealt = len(clients.train.values)
    assert dealt >= 0.85 * (frame["split"] == "train").sum()
    assert set(frame["label"].to_numpy()[clients.train.values]) == set(range(10))


def test_pairs_of_classes_are_diverse():
    """Dealing in proportion to what is left must not glue the same classes together."""
    labels = np.repeat(np.arange(10), 400)
    pools = {"train": np.arange(4000)}
    clients = deal_classes(labels, np.zeros(10, int), pools, {"train": 16}, 2, np.random.default_rng(0))
    pairs = {tuple(np.unique(labels[images["train"]])) for _, images in clients}
    assert len(clients) >= 240
    assert len(pairs) == 45


def test_within_gives_one_client_the_same_classes_everywhere():
    clients, frame = assign(classes_per_client=2, images_per_client=20, split="within")
    labels = frame["label"].to_numpy()
    for i in range(len(clients)):
        train, test = set(labels[clients.train[i]]), set(labels[clients.test[i]])
        assert train == test
        assert set(labels[clients.val[i]]) <= train


@pytest.mark.parametrize(
    ("arguments", "key", "words"),
    [
        ({"classes_per_client": 11}, "classes_per_client", "10 classes; use 1 to 10"),
        ({"classes_per_client": 5, "by": "parent"}, "classes_per_client", "use 1 to 4"),
        ({"classes_per_client": 0}, "classes_per_client", "at least 1"),
        ({"classes_per_client": 3, "images_per_client": 2}, "images_per_client", "at least 3 .one image of each class"),
        ({"images_per_client": 2000}, "images_per_client", "do not fill one client"),
        ({"images_per_client": 2, "split": "within"}, "images_per_client", "without val images; use at least"),
        ({"by": "clas"}, "by", "did you mean class"),
        ({"split": "across"}, "split", "client, within"),
        ({"deals": 0}, "deals", "1 to 1000"),
        ({"val_share": 0}, "val_share", "above 0"),
        ({"seed": -1}, "seed", "at least 0"),
    ],
)
def test_impossible_partitions_name_their_key(arguments, key, words):
    with pytest.raises(ConfigError, match=words) as error:
        assign(**arguments)
    assert error.value.key == key


def test_the_hint_of_an_error_works():
    with pytest.raises(ConfigError) as error:
        assign(images_per_client=2, split="within")
    assign(images_per_client=int(str(error.value).rsplit(" ", 1)[-1]), split="within")


@pytest.mark.parametrize("role", ["train", "test"])
def test_a_dataset_without_a_role_is_refused(role):
    frame = table()
    with pytest.raises(ConfigError, match=f"classes_per_client: the dataset has no {role} images"):
        assign(frame[frame["split"] != role].reset_index(drop=True))


def test_a_dataset_without_parents_is_refused():
    with pytest.raises(ConfigError, match="no parent category"):
        assign(table().assign(parent=None), by="parent")


def test_several_labels_per_image_are_refused():
    frame = table()
    with pytest.raises(ConfigError, match="needs one label per image; use partition=owner"):
        assign(frame.assign(label=[[k] for k in frame["label"]]))


def test_a_class_without_images_is_never_dealt():
    frame = table()
    frame = frame[frame["label"] != 4].reset_index(drop=True)
    clients, _ = assign(frame, images_per_client=10)
    assert 4 not in frame["label"].to_numpy()[clients.train.values]
