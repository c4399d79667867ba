import multiprocessing
import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch

from iciia_exp.artifacts import read_json, write_json
from iciia_exp.data.store import FeatureStore, FeatureWriter
from iciia_exp.errors import UserError

M, D, K = 50, 4, 3
FEATURES = np.random.default_rng(0).normal(size=(M, D)).astype(np.float32)
TABLE = pd.DataFrame({"label": np.arange(M) % K, "split": "train", "owner": None, "parent": "p"})
HEAD = {"weight": torch.arange(K * D).float().view(K, D), "bias": torch.arange(K).float()}


def fill(folder, rows=None, **options):
    writer = FeatureWriter(folder, M, D, "float32", **options)
    for part in np.array_split(writer.remaining() if rows is None else rows, 5):
        writer.write(part, FEATURES[part])
    return writer


def finish(writer):
    writer.finish(TABLE, HEAD, {"dim": D, "num_classes": K, "macs": 7})


def test_round_trip(tmp_path):
    finish(fill(tmp_path))
    store = FeatureStore.open(tmp_path)
    np.testing.assert_array_equal(store.array(), FEATURES)
    assert isinstance(store.array(), np.memmap)
    pd.testing.assert_frame_equal(store.table, TABLE)
    assert (store.dim, store.num_classes, store.macs) == (D, K, 7)
    torch.testing.assert_close(store.head(), HEAD)
    assert sorted(os.listdir(tmp_path)) == ["features.npy", "head.safetensors", "images.parquet", "manifest.json"]


def test_float16(tmp_path):
    writer = FeatureWriter(tmp_path, M, D, "float16")
    writer.write(np.arange(M), FEATURES)
    finish(writer)
    np.testing.assert_array_equal(FeatureStore.open(tmp_path).array(), FEATURES.astype(np.float16))


def test_an_unfinished_store_is_not_one(tmp_path):
    with pytest.raises(UserError, match="no feature store"):
        FeatureStore.open(tmp_path)
    writer = fill(tmp_path, np.arange(20))
    with pytest.raises(RuntimeError, match="30 of 50"):
        finish(writer)
    with pytest.raises(UserError, match="no feature store"):
        FeatureStore.open(tmp_path)


def _killed(folder):
    fill(folder, np.arange(20), flush_seconds=0.0)
    writer = FeatureWriter(folder, M, D, "float32", flush_seconds=1e9)
    writer.write(np.arange(20, 30), FEATURES[20:30])  # written, not yet known to be on disk
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_extraction_continues(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    writer = FeatureWriter(tmp_path, M, D, "float32")
    assert writer.remaining().tolist() == list(range(20, M))
    finish(fill(tmp_path))
    np.testing.assert_array_equal(FeatureStore.open(tmp_path).array(), FEATURES)


def test_leftovers_of_another_shape_are_started_afresh(tmp_path):
    fill(tmp_path, np.arange(20))
    assert len(FeatureWriter(tmp_path, M, D, "float16").remaining()) == M
    (tmp_path / "done.npy").write_bytes(b"cut o")
    assert len(FeatureWriter(tmp_path, M, D, "float16").remaining()) == M


def test_features_must_be_finite(tmp_path):
    writer = FeatureWriter(tmp_path, M, D, "float32")
    bad = FEATURES[:3].copy()
    bad[1, 2] = np.nan
    with pytest.raises(UserError, match=r"not finite for 1 images, first \[1\]"):
        writer.write(np.arange(3), bad)


def test_a_disk_too_small_is_seen_before_the_work(tmp_path):
    with pytest.raises(UserError, match=r"need 4000000\.0 GB"):
        FeatureWriter(tmp_path, 10**12, 1000, "float32")
    assert not os.listdir(tmp_path)


def test_foreign_and_damaged_stores_are_refused(tmp_path):
    finish(fill(tmp_path))
    manifest = read_json(tmp_path / "manifest.json")
    write_json(tmp_path / "manifest.json", manifest | {"format": 99})
    with pytest.raises(UserError, match="format 99"):
        FeatureStore.open(tmp_path)
    write_json(tmp_path / "manifest.json", manifest)
    np.save(tmp_path / "features.npy", FEATURES[:10])
    with pytest.raises(UserError, match="not the array"):
        FeatureStore.open(tmp_path).array()
