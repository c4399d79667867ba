import multiprocessing
import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from iciia_exp.artifacts import read_json, write_json
from iciia_exp.data.store import FeatureStore, FeatureWriter
from iciia_exp.errors import UserError

M, D, K = 50, 4, 3
FEATURES = np.random.default_rng(0).normal(size=(M, D)).astype(np.float32)
TABLE = pd.DataFrame({"label": np.arange(M) % K, "split": "train", "owner": None, "parent": "p"})
HEAD = {"weight": torch.arange(K * D).float().view(K, D), "bias": torch.arange(K).float()}


def prepare(folder, dtype="float32"):
    FeatureWriter.prepare(folder, M, D, dtype)
    return FeatureWriter.remaining(folder)


def fill(folder, rows=None, **options):
    left = prepare(folder)
    writer = FeatureWriter(folder, **options)
    for part in np.array_split(left if rows is None else rows, 5):
        writer.write(part, FEATURES[part])
    writer.flush()


def finish(folder, head=HEAD):
    FeatureWriter.finish(folder, TABLE, head, {"dim": D, "num_classes": K, "macs": 7})


def test_round_trip(tmp_path):
    fill(tmp_path)
    finish(tmp_path)
    store = FeatureStore.open(tmp_path)
    np.testing.assert_array_equal(store.array(), FEATURES)
    assert isinstance(store.array(), np.memmap)
    pd.testing.assert_frame_equal(store.table, TABLE, check_dtype=False)
    assert not store.bad.any()
    assert (store.dim, store.num_classes, store.macs) == (D, K, 7)
    torch.testing.assert_close(load_file(tmp_path / "head.safetensors"), HEAD)
    assert sorted(os.listdir(tmp_path)) == ["features.npy", "head.safetensors", "images.parquet", "manifest.json"]


def test_without_a_classifier(tmp_path):
    fill(tmp_path)
    finish(tmp_path, None)
    assert not (tmp_path / "head.safetensors").exists()


def test_float16(tmp_path):
    prepare(tmp_path, "float16")
    writer = FeatureWriter(tmp_path)
    with pytest.raises(UserError, match="does not fit float16"):
        writer.write(np.arange(M), FEATURES * 1e6)
    writer.write(np.arange(M), FEATURES)
    writer.flush()
    finish(tmp_path)
    np.testing.assert_array_equal(FeatureStore.open(tmp_path).array(), FEATURES.astype(np.float16))


def test_an_unfinished_store_is_not_one(tmp_path):
    with pytest.raises(UserError, match="no feature store"):
        FeatureStore.open(tmp_path)
    fill(tmp_path, np.arange(20))
    with pytest.raises(RuntimeError, match="30 of 50"):
        finish(tmp_path)
    with pytest.raises(UserError, match="no feature store"):
        FeatureStore.open(tmp_path)


def test_images_that_cannot_be_read(tmp_path):
    good = np.setdiff1d(np.arange(M), [3, 40])
    prepare(tmp_path)
    writer = FeatureWriter(tmp_path)
    writer.write(good, FEATURES[good])
    for _ in range(2):  # noted before a kill, and again after it
        writer.write_bad([(40, "OSError: truncated"), (3, "missing")])
    writer.flush()
    assert FeatureWriter.bad_images(tmp_path) == {3: "missing", 40: "OSError: truncated"}
    finish(tmp_path)
    store = FeatureStore.open(tmp_path)
    assert np.flatnonzero(store.bad).tolist() == [3, 40]
    assert not store.array()[[3, 40]].any()


def test_images_that_could_not_be_read_are_tried_again(tmp_path):
    prepare(tmp_path)
    writer = FeatureWriter(tmp_path)
    writer.write(np.arange(10), FEATURES[:10])
    writer.write_bad([(12, "missing")])
    writer.flush()
    with open(tmp_path / "bad.0.jsonl", "a") as file:
        file.write('[13, "cut o')  # by a kill
    assert FeatureWriter.bad_images(tmp_path) == {12: "missing"}
    assert prepare(tmp_path).tolist() == list(range(10, M))
    assert FeatureWriter.bad_images(tmp_path) == {}


def test_several_processes_share_the_rows(tmp_path):
    prepare(tmp_path)
    for rank, rows in enumerate(np.array_split(np.arange(M), 3)):
        writer = FeatureWriter(tmp_path, rank)
        writer.write(rows, FEATURES[rows])
        if rank != 1:  # the second is killed before its rows are known to be on disk
            writer.flush()
    assert FeatureWriter.remaining(tmp_path).tolist() == np.array_split(np.arange(M), 3)[1].tolist()
    fill(tmp_path)  # one process finishes the work of three
    finish(tmp_path)
    np.testing.assert_array_equal(FeatureStore.open(tmp_path).array(), FEATURES)
    assert len(os.listdir(tmp_path)) == 4


def _killed(folder):
    fill(folder, np.arange(20))
    writer = FeatureWriter(folder, flush_seconds=1e9)
    writer.write(np.arange(20, 30), FEATURES[20:30])  # written, not yet known to be on disk
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_extraction_continues(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert prepare(tmp_path).tolist() == list(range(20, M))
    fill(tmp_path)
    finish(tmp_path)
    np.testing.assert_array_equal(FeatureStore.open(tmp_path).array(), FEATURES)


def test_leftovers_of_another_shape_are_started_afresh(tmp_path):
    fill(tmp_path, np.arange(20))
    assert len(prepare(tmp_path)) == M - 20
    assert len(prepare(tmp_path, "float16")) == M
    (tmp_path / "done.0.npy").write_bytes(b"cut o")
    assert len(prepare(tmp_path, "float16")) == M


def test_features_must_be_finite(tmp_path):
    prepare(tmp_path)
    bad = FEATURES[:3].copy()
    bad[1, 2] = np.nan
    with pytest.raises(UserError, match=r"not finite for 1 images, first \[1\]"):
        FeatureWriter(tmp_path).write(np.arange(3), bad)


def test_a_disk_too_small_is_seen_before_the_work(tmp_path):
    with pytest.raises(UserError, match=r"need 4000000\.0 GB"):
        FeatureWriter.prepare(tmp_path, 10**12, 1000, "float32")
    assert not os.listdir(tmp_path)


def test_foreign_and_damaged_stores_are_refused(tmp_path):
    fill(tmp_path)
    finish(tmp_path)
    manifest = read_json(tmp_path / "manifest.json")
    write_json(tmp_path / "manifest.json", manifest | {"format": 99})
    with pytest.raises(UserError, match="format 99"):
        FeatureStore.open(tmp_path)
    write_json(tmp_path / "manifest.json", manifest)
    np.save(tmp_path / "features.npy", FEATURES[:10])
    with pytest.raises(UserError, match="not the array"):
        FeatureStore.open(tmp_path).array()
