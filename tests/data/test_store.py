import errno
import multiprocessing
import os
import signal
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from iciia_exp.artifacts import read_json, write_json
from iciia_exp.data import store
from iciia_exp.data.store import FeatureStore, FeatureWriter
from iciia_exp.errors import UserError

M, D, K = 50, 4, 3
FEATURES = np.random.default_rng(0).normal(size=(M, D)).astype(np.float32)
VALUES = {
    "features": FEATURES,
    "logits": np.random.default_rng(1).normal(size=(M, K)).astype(np.float32),
    "tokens": np.random.default_rng(2).normal(size=(M, 5, 2)).astype(np.float16),
}
TABLE = pd.DataFrame({"label": np.arange(M) % K, "split": "train", "owner": None, "parent": "p"})
HEAD = {"weight": torch.arange(K * D).float().view(K, D), "bias": torch.arange(K).float()}


@pytest.fixture(params=[("features",), tuple(VALUES)], ids=["features", "several"])
def names(request):
    """Return the names of the arrays of a store: the features alone, or several."""
    return request.param


def prepare(folder, names=("features",), dtype="float32"):
    arrays = {name: (VALUES[name].shape[1:], str(VALUES[name].dtype)) for name in names}
    FeatureWriter.prepare(folder, M, arrays | {"features": ((D,), dtype)})
    return FeatureWriter.remaining(folder)


def values(names, rows):
    return {name: VALUES[name][rows] for name in names}


def fill(folder, names=("features",), rows=None, **options):
    left = prepare(folder, names)
    writer = FeatureWriter(folder, **options)
    for part in np.array_split(left if rows is None else rows, 5):
        writer.write(part, values(names, part))
    writer.flush()


def finish(folder, head=HEAD):
    FeatureWriter.finish(folder, TABLE, head, {"dim": D, "num_classes": K, "macs": 7})


def check_arrays(folder, names):
    store = FeatureStore.open(folder)
    for name in names:
        np.testing.assert_array_equal(store.array(name), VALUES[name])
        assert store.array(name).dtype == VALUES[name].dtype


def test_round_trip(tmp_path, names):
    fill(tmp_path, names)
    finish(tmp_path)
    store = FeatureStore.open(tmp_path)
    check_arrays(tmp_path, names)
    assert isinstance(store.array(), np.memmap)
    pd.testing.assert_frame_equal(store.table, TABLE, check_dtype=False)
    assert not store.bad.any()
    assert (store.dim, store.num_classes, store.macs) == (D, K, 7)
    torch.testing.assert_close(load_file(tmp_path / "head.safetensors"), HEAD)
    files = [*(f"{name}.npy" for name in names), "head.safetensors", "images.parquet", "manifest.json"]
    assert sorted(os.listdir(tmp_path)) == sorted(files)
    assert store.manifest["arrays"] == {
        name: {"shape": list(VALUES[name].shape), "dtype": str(VALUES[name].dtype)} for name in names
    }


def test_an_array_that_is_not_there_says_how_to_make_it(tmp_path):
    fill(tmp_path)
    finish(tmp_path)
    with pytest.raises(UserError) as error:
        FeatureStore.open(tmp_path).array("tokens")
    assert str(error.value) == (
        f"{tmp_path}: has no array tokens, only features; "
        "a method with tokens in its `reads` makes a store of its own that has it"
    )


def test_without_a_classifier(tmp_path):
    fill(tmp_path)
    finish(tmp_path, None)
    assert not (tmp_path / "head.safetensors").exists()


def test_float16(tmp_path):
    prepare(tmp_path, dtype="float16")
    writer = FeatureWriter(tmp_path)
    with pytest.raises(UserError, match=r"^features: .* does not fit float16; use features\.dtype=float32"):
        writer.write(np.arange(M), {"features": FEATURES * 1e6})
    writer.write(np.arange(M), {"features": FEATURES})
    writer.flush()
    finish(tmp_path)
    np.testing.assert_array_equal(FeatureStore.open(tmp_path).array(), FEATURES.astype(np.float16))


def test_an_unfinished_store_is_not_one(tmp_path):
    with pytest.raises(UserError, match="no feature store"):
        FeatureStore.open(tmp_path)
    fill(tmp_path, rows=np.arange(20))
    with pytest.raises(RuntimeError, match="30 of 50"):
        finish(tmp_path)
    with pytest.raises(UserError, match="no feature store"):
        FeatureStore.open(tmp_path)


def test_images_that_cannot_be_read(tmp_path, names):
    good = np.setdiff1d(np.arange(M), [3, 40])
    prepare(tmp_path, names)
    writer = FeatureWriter(tmp_path)
    writer.write(good, values(names, good))
    for _ in range(2):  # noted before a kill, and again after it
        writer.write_bad([(40, "OSError: truncated"), (3, "missing")])
    writer.flush()
    assert FeatureWriter.bad_images(tmp_path) == {3: "missing", 40: "OSError: truncated"}
    finish(tmp_path)
    store = FeatureStore.open(tmp_path)
    assert np.flatnonzero(store.bad).tolist() == [3, 40]
    assert not any(store.array(name)[[3, 40]].any() for name in names)


def test_images_that_could_not_be_read_are_tried_again(tmp_path, names):
    prepare(tmp_path, names)
    writer = FeatureWriter(tmp_path)
    writer.write(np.arange(10), values(names, slice(10)))
    writer.write_bad([(12, "missing")])
    writer.flush()
    with open(tmp_path / "bad.0.jsonl", "a") as file:
        file.write('[13, "cut o')  # by a kill
    assert FeatureWriter.bad_images(tmp_path) == {12: "missing"}
    assert prepare(tmp_path, names).tolist() == list(range(10, M))
    assert FeatureWriter.bad_images(tmp_path) == {}


def test_several_processes_share_the_rows(tmp_path, names):
    prepare(tmp_path, names)
    for rank, rows in enumerate(np.array_split(np.arange(M), 3)):
        writer = FeatureWriter(tmp_path, rank)
        writer.write(rows, values(names, rows))
        if rank != 1:  # the second is killed before its rows are known to be on disk
            writer.flush()
    assert FeatureWriter.remaining(tmp_path).tolist() == np.array_split(np.arange(M), 3)[1].tolist()
    fill(tmp_path, names)  # one process finishes the work of three
    finish(tmp_path)
    check_arrays(tmp_path, names)
    assert len(os.listdir(tmp_path)) == len(names) + 3


def _killed(folder, names):
    fill(folder, names, np.arange(20))
    writer = FeatureWriter(folder, flush_seconds=1e9)
    writer.write(np.arange(20, 30), values(names, slice(20, 30)))  # written, not yet known to be on disk
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_extraction_continues(tmp_path, names):
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path, names))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert prepare(tmp_path, names).tolist() == list(range(20, M))
    fill(tmp_path, names)
    finish(tmp_path)
    check_arrays(tmp_path, names)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_rows_are_done_only_when_every_array_is_on_disk(tmp_path, monkeypatch, where):
    """A flush is killed before its first, second or third array is on disk."""
    names = tuple(VALUES)
    prepare(tmp_path, names)
    writer = FeatureWriter(tmp_path)
    writer.write(np.arange(20), values(names, slice(20)))
    original, flushed = np.memmap.flush, []

    def flush(array):
        if len(flushed) == where:
            raise KeyboardInterrupt
        flushed.append(array)
        original(array)

    with monkeypatch.context() as patch:
        patch.setattr(np.memmap, "flush", flush)
        with pytest.raises(KeyboardInterrupt):
            writer.flush()
    assert len(prepare(tmp_path, names)) == M
    fill(tmp_path, names)
    finish(tmp_path)
    check_arrays(tmp_path, names)


def test_leftovers_of_another_shape_are_started_afresh(tmp_path):
    fill(tmp_path, rows=np.arange(20))
    assert len(prepare(tmp_path)) == M - 20
    assert len(prepare(tmp_path, dtype="float16")) == M
    (tmp_path / "done.0.npy").write_bytes(b"cut o")
    assert len(prepare(tmp_path, dtype="float16")) == M


def test_leftovers_with_other_arrays_are_started_afresh(tmp_path):
    names = tuple(VALUES)
    fill(tmp_path, names, np.arange(20))
    assert len(prepare(tmp_path, names)) == M - 20
    (tmp_path / "tokens.npy").unlink()  # killed while the arrays were made
    assert len(prepare(tmp_path, names)) == M
    fill(tmp_path, names, np.arange(20))
    assert len(prepare(tmp_path, names[:2])) == M
    assert sorted(os.listdir(tmp_path)) == ["features.npy", "logits.npy"]
    np.save(tmp_path / "logits.npy", VALUES["logits"][:, :2])
    assert len(prepare(tmp_path, names[:2])) == M
    (tmp_path / "logits.npy").write_bytes(b"cut o")
    fill(tmp_path, names[:2])
    finish(tmp_path)
    check_arrays(tmp_path, names[:2])


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_values_must_be_finite(tmp_path, name, wrong):
    prepare(tmp_path, tuple(VALUES))
    bad = {key: value[:3].copy() for key, value in VALUES.items()}
    bad[name][1, 1] = wrong
    with pytest.raises(UserError, match=rf"^{name}: .* not finite for 1 images, first \[1\]"):
        FeatureWriter(tmp_path).write(np.arange(3), bad)


def test_values_must_fit_their_array(tmp_path):
    prepare(tmp_path, tuple(VALUES))
    writer = FeatureWriter(tmp_path)
    large = values(VALUES, slice(3)) | {"tokens": np.full((3, 5, 2), -7e4, np.float32)}
    with pytest.raises(UserError, match=r"^tokens: a value of 7e\+04 does not fit float16$"):
        writer.write(np.arange(3), large)
    with pytest.raises(UserError, match=r"^tokens: the backbone gave \[4, 2\] for an image, the first .* \[5, 2\]$"):
        writer.write(np.arange(3), large | {"tokens": np.zeros((3, 4, 2), np.float32)})


def test_a_disk_too_small_is_seen_before_the_work(tmp_path):
    with pytest.raises(UserError, match=r"features and tokens need 8.0 PB, the disk has"):
        FeatureWriter.prepare(tmp_path, 10**12, {"features": ((1000,), "float32"), "tokens": ((20, 100), "float16")})
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


def test_rows_that_were_damaged_before_a_resumption_are_done_again(tmp_path, names):
    """A flipped bit in an array, and in the marks of rows that are done and that are not."""
    fill(tmp_path, names, np.arange(30))
    for name in names:
        array = np.lib.format.open_memmap(tmp_path / f"{name}.npy", mode="r+")
        row = array[4 + names.index(name)].reshape(-1).view(np.uint8)
        row[1] ^= 4
        array.flush()
    marks = np.lib.format.open_memmap(tmp_path / "done.0.npy", mode="r+")
    marks[[2, 40]] ^= 8
    marks.flush()
    damaged = [2, *range(4, 4 + len(names))]
    assert FeatureWriter.remaining(tmp_path).tolist() == [*damaged, *range(30, M)]
    fill(tmp_path, names)
    finish(tmp_path)
    check_arrays(tmp_path, names)


def test_what_cannot_be_continued_gives_its_room_back_first(tmp_path, monkeypatch):
    """A disk was full when the marks were written; after that as much is free as the arrays need."""
    fill(tmp_path)
    (mark,) = tmp_path.glob("done.*.npy")
    mark.write_bytes(b"")
    arrays = {path.stem: np.load(path) for path in tmp_path.glob("*.npy") if path != mark}
    need = sum(array.nbytes for array in arrays.values())

    def usage(_):
        held = sum(path.stat().st_size for path in tmp_path.glob("*.npy"))
        return SimpleNamespace(free=need + 1000 - held)

    monkeypatch.setattr(store.shutil, "disk_usage", usage)
    FeatureWriter.prepare(tmp_path, M, {name: (a.shape[1:], a.dtype.name) for name, a in arrays.items()})
    assert {path.stem for path in tmp_path.glob("*.npy")} == set(arrays)


def test_a_disk_that_is_full_of_marks_names_them(tmp_path, monkeypatch):
    FeatureWriter.prepare(tmp_path, 20, {"features": ((8,), "float32")})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/done\.0\.npy'"):
        FeatureWriter(tmp_path)
