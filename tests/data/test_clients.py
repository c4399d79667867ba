import numpy as np
import pytest

from iciia_exp.data.clients import Clients, Ragged


@pytest.fixture
def clients():
    rows = {
        "train": [np.array([0, 1, 2]), np.array([], dtype=int), np.array([], dtype=int)],
        "selection": [np.array([], dtype=int), np.array([3]), np.array([], dtype=int)],
        "test": [np.array([], dtype=int), np.array([], dtype=int), np.array([5, 4])],
    }
    ids, kinds = (np.array(v, dtype=object) for v in (["a", "b", "c"], ["x", "y", "x"]))
    return Clients(ids, kinds, **{role: Ragged.from_rows(r) for role, r in rows.items()})


def test_rows(clients):
    assert clients.train.lengths.tolist() == [3, 0, 0]
    assert clients["test"][2].tolist() == [5, 4]
    assert clients.test.row_numbers.tolist() == [2, 2]
    with pytest.raises(KeyError):
        clients["validation"]


def test_save_and_load(clients, tmp_path):
    clients.save(tmp_path / "p.parquet")
    again = Clients.load(tmp_path / "p.parquet")
    for name in ("ids", "kinds"):
        np.testing.assert_array_equal(getattr(again, name), getattr(clients, name))
    for role in ("train", "selection", "test"):
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


def test_sizes_must_agree():
    empty = Ragged.from_rows([])
    with pytest.raises(ValueError, match="one entry per client"):
        Clients(np.array(["a"]), np.array(["x"]), empty, empty, empty)
