"""VTAB-1K's layout: tasks side by side, with lists of their images."""

import pandas as pd
import pytest

from iciia_exp.data.clients import ROLES
from iciia_exp.data.datasets.vtab import GROUPS, Vtab
from iciia_exp.data.partitions.tasks import Tasks
from iciia_exp.engine.evaluation.row import group_accuracy
from iciia_exp.errors import UserError
from tests.making.vtab import make_vtab


@pytest.fixture
def root(tmp_path):
    return make_vtab(tmp_path / "vtab")


def test_the_groups_are_those_of_the_benchmark():
    sizes = {group: list(GROUPS.values()).count(group) for group in dict.fromkeys(GROUPS.values())}
    assert sizes == {"Natural": 7, "Specialized": 4, "Structured": 8}


def test_every_task_is_a_client_with_its_own_classes_and_lists(root):
    dataset = Vtab(root)
    assert dataset.class_names[:4] == ("cifar/0", "cifar/1", "cifar/2", "eurosat/0")
    table = dataset.table
    assert len(table) == 5 * 3 * (4 + 2 + 3)
    assert dataset[0].size == (32, 24)
    clients = Tasks(by="parent").assign(table, dataset.num_classes)
    assert clients.ids.tolist() == ["cifar", "eurosat", "kitti", "own", "svhn"]
    assert clients.types.tolist() == ["Natural", "Specialized", "Structured", "task", "Natural"]
    assert [int(clients[role].lengths[0]) for role in ROLES] == [12, 6, 9]
    assert set(table["parent"].to_numpy()[clients.test[2]]) == {"kitti"}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("cifar/test.txt", None, r"cifar: has no list of its test images; expected"),
        ("cifar/train200.txt", "", r"cifar: has several lists: train200.txt, train800.txt of its train images"),
        ("svhn/val200.txt", "images/a.png\n", r"val200.txt, line 1: expected a path and the number of a class"),
        ("svhn/val200.txt", "images/train/train800-0-0.png 0\n", r"lists name an image twice \(svhn/images/train/tr"),
        ("svhn/val200.txt", b"\xff\xfe", r"val200.txt: cannot be read"),
    ],
)
def test_what_is_wrong_is_named(root, file, text, message):
    path = root / file
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        Vtab(root).table  # noqa: B018


def test_the_mean_of_the_groups_weighs_them_alike():
    rows = {"client_type": ["Natural", "Natural", "Structured"], "method_correct": [9, 7, 2], "decisions": 10}
    assert group_accuracy(pd.DataFrame(rows)) == pytest.approx((0.8 + 0.2) / 2)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="has no folder with lists of images"):
        Vtab(tmp_path).class_names  # noqa: B018
