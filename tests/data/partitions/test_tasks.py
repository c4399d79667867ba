import numpy as np
import pandas as pd
import pytest

from iciia_exp.data.clients import ROLES
from iciia_exp.data.partitions import Tasks
from iciia_exp.errors import ConfigError

K = 12


def table(**change):
    """Ten train, four val and six test images of each class; three parents of 6, 5 and 1 classes."""
    labels = np.repeat(np.arange(K), 20)
    split = np.tile(["train"] * 10 + ["val"] * 4 + ["test"] * 6, K)
    parent = np.where(labels < 6, "a", np.where(labels < 11, "b", "c"))
    frame = pd.DataFrame({"label": labels, "split": split, "owner": None, "parent": parent})
    return frame.sample(frac=1, random_state=0, ignore_index=True).assign(**change)


def classes_of(frame, rows):
    return set(frame["label"].to_numpy()[rows])


@pytest.mark.parametrize(
    ("by", "sets"),
    [("parent", [range(6), range(6, 11)]), ("class", [range(0, 12, 3), range(1, 12, 3), range(2, 12, 3)])],
)
def test_a_client_has_the_images_of_its_own_classes(by, sets):
    frame = table()
    clients = Tasks(by=by, tasks=3).assign(frame, K)
    assert clients.ids.tolist() == (["a", "b"] if by == "parent" else ["task-0", "task-1", "task-2"])
    for role in ROLES:
        for c, own in enumerate(sets):
            rows = clients[role][c]
            assert classes_of(frame, rows) == set(own)
            want = frame.index[(frame["split"] == role) & frame["label"].isin(own)]
            assert sorted(rows) == sorted(want)


def test_a_task_that_is_left_out_gives_no_other_its_group():
    """Class 11 has too few classes for a task; its images come last in the table."""
    frame = table().sort_values("label", ignore_index=True)
    frame["group"] = frame["parent"].map({"a": "natural", "b": "structured", "c": "specialised"})
    assert Tasks(by="parent").assign(frame, K).types.tolist() == ["natural", "structured"]


@pytest.mark.parametrize(("shots", "val_shots"), [(1, None), (4, 2), (99, 99)])
def test_shots_are_images_of_every_class(shots, val_shots):
    frame = table()
    clients = Tasks(shots=shots, val_shots=val_shots).assign(frame, K)
    for c in range(2):
        for role, most, there in (("train", shots, 10), ("val", val_shots, 4), ("test", None, 6)):
            counts = np.bincount(frame["label"].to_numpy()[clients[role][c]])
            assert set(counts[counts > 0]) == {min(there, most or there)}
    again, other = (Tasks(shots=shots, seed=seed).assign(frame, K).train.values.tolist() for seed in (0, 1))
    assert again == Tasks(shots=shots).assign(frame, K).train.values.tolist()
    assert again != other


def test_more_shots_contain_fewer():
    frame = table()
    few, more = (Tasks(shots=shots).assign(frame, K) for shots in (2, 5))
    assert set(few.train.values) < set(more.train.values)


def test_without_val_images_a_share_of_train():
    frame = table()
    frame = frame[frame["split"] != "val"].reset_index(drop=True)
    clients = Tasks(val_share=0.2).assign(frame, K)
    assert clients.val.lengths.tolist() == [12, 10]
    assert not set(clients.val.values) & set(clients.train.values)


@pytest.mark.parametrize(
    ("arguments", "change", "key", "message"),
    [
        ({"by": "alphabet"}, {}, "by", "must be one of parent, class"),
        ({"by": "class", "tasks": 7}, {}, "tasks", "12 classes give 6 tasks of two or more"),
        ({"shots": 0}, {}, "shots", "at least 1"),
        ({"fewest_classes": 7}, {}, "fewest_classes", "no task has images of every role and 7 classes or more"),
        ({}, {"parent": None}, "", "no parent category .* use partition.by=class"),
        ({}, {"split": "train"}, "", "the dataset has no test images"),
        ({}, {"label": [[0]] * 240}, "", "needs one label per image"),
    ],
)
def test_bad_values_are_named(arguments, change, key, message):
    with pytest.raises(ConfigError, match=message) as error:
        Tasks(**arguments).assign(table(**change), K)
    assert error.value.key == key
