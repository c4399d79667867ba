import time

import numpy as np
import pytest

from iciia_exp.data.clients import ROLES, Clients, Ragged


@pytest.fixture
def clients():
    rows = {
        "train": [np.array([0, 1, 2]), np.array([], dtype=int), np.array([], dtype=int)],
        "val": [np.array([], dtype=int), np.array([3]), np.array([], dtype=int)],
        "test": [np.array([], dtype=int), np.array([], dtype=int), np.array([5, 4])],
    }
    ids, types = (np.array(v, dtype=object) for v in (["a", "b", "c"], ["x", "y", "x"]))
    return Clients(ids, types, **{role: Ragged.from_rows(r) for role, r in rows.items()})


def test_rows(clients):
    assert clients.train.lengths.tolist() == [3, 0, 0]
    assert clients["test"][2].tolist() == [5, 4]
    assert clients.test.row_numbers.tolist() == [2, 2]
    with pytest.raises(KeyError):
        clients["validation"]


def test_save_and_load(clients, tmp_path):
    clients.save(tmp_path / "p.parquet")
    again = Clients.load(tmp_path / "p.parquet")
    for name in ("ids", "types"):
        np.testing.assert_array_equal(getattr(again, name), getattr(clients, name))
    for role in ("train", "val", "test"):
        np.testing.assert_array_equal(again[role].offsets, clients[role].offsets)
        np.testing.assert_array_equal(again[role].values, clients[role].values)


def test_the_file_is_readable_without_this_package(clients, tmp_path):
    import pandas as pd

    clients.save(tmp_path / "p.parquet")
    frame = pd.read_parquet(tmp_path / "p.parquet")
    assert frame["test"].map(list).tolist() == [[], [], [5, 4]]


def test_statistics(clients):
    table = clients.statistics(np.array([0, 0, 1, 1, 2, 2])).set_index("role")
    assert table.loc["train", ["clients", "images", "classes_mean", "images_mean"]].tolist() == [1, 3, 2.0, 3.0]
    assert table.loc["test", "classes_mean"] == 1.0


def test_statistics_of_several_labels_per_image(clients):
    labels_MK = np.array([[1, 0, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]], dtype=np.uint8)
    assert clients.classes_per_client(labels_MK, "train").tolist() == [3, 0, 0]
    assert clients.classes_per_client(labels_MK, "test").tolist() == [0, 0, 1]
    table = clients.statistics(labels_MK).set_index("role")
    assert table["classes_mean"].to_dict() == {"train": 3.0, "val": 0.0, "test": 1.0}


def test_an_image_of_several_rows_is_one_distinct_image():
    row = Ragged.from_rows([np.array([0, 1, 2])] * 3)
    table = Clients(*(np.array(["a", "b", "c"], dtype=object),) * 2, row, row, row).statistics(np.array([0, 0, 1]))
    assert table[["images", "distinct_images"]].to_numpy().tolist() == [[9, 3]] * 3


def test_from_pairs_is_from_rows():
    rng = np.random.default_rng(0)
    rows, values = rng.integers(0, 5, 40), rng.permutation(40)
    expected = Ragged.from_rows([values[rows == r] for r in range(7)])  # the last two are empty
    ragged = Ragged.from_pairs(rows, values, 7)
    np.testing.assert_array_equal(ragged.offsets, expected.offsets)
    np.testing.assert_array_equal(ragged.values, expected.values)
    assert len(Ragged.from_pairs(rows[:0], values[:0], 3)) == 3


@pytest.mark.parametrize("ordered", [False, True])
def test_from_assignment_is_what_a_loop_gives(ordered):
    rng = np.random.default_rng(0)
    client_M, role_M, order_M = rng.integers(-1, 6, 200), rng.integers(-1, 3, 200), rng.integers(0, 20, 200)
    names = np.array([f"c{i}" for i in range(7)], dtype=object)
    clients = Clients.from_assignment(names, names, client_M, role_M, order_M if ordered else None)
    for r, role in enumerate(ROLES):
        for i in range(7):
            rows = np.flatnonzero((client_M == i) & (role_M == r))
            expected = rows[np.argsort(order_M[rows], kind="stable")] if ordered else rows
            np.testing.assert_array_equal(clients[role][i], expected)


def test_a_hundred_thousand_clients_take_no_time():
    rng = np.random.default_rng(0)
    images, number = 1_300_000, 100_000
    names = np.arange(number).astype(str).astype(object)
    start = time.perf_counter()
    clients = Clients.from_assignment(
        names, names, rng.integers(0, number, images), rng.integers(0, 3, images), rng.random(images)
    )
    clients.statistics(rng.integers(0, 1000, images))
    assert time.perf_counter() - start < 10  # half a second here; a loop over clients takes longer than this


def test_sizes_must_agree():
    empty = Ragged.from_rows([])
    with pytest.raises(ValueError, match="one entry per client"):
        Clients(np.array(["a"]), np.array(["x"]), empty, empty, empty)
