import errno
import json
import math
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from iciia_exp import artifacts
from iciia_exp.artifacts import (
    allocate,
    atomic_write,
    finished_folder,
    in_use,
    make_folder,
    read_json,
    replacing_folder,
    write_json,
)
from iciia_exp.errors import UserError


def test_atomic_write_leaves_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("place", ["folder", "file/a.txt", "/proc/a.txt"])
def test_atomic_write_names_the_path_and_no_temporary_file(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / place
    with pytest.raises(OSError) as found, atomic_write(path) as file:  # noqa: PT011  # of several kinds
        file.write("a")
    assert str(found.value.filename) in (str(path), str(path.parent))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_atomic_write_makes_ordinary_files(tmp_path):
    with atomic_write(tmp_path / "new" / "a.bin", "wb") as file:
        file.write(b"x")
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "new" / "a.bin").stat().st_mode == plain.stat().st_mode


def test_json_is_strict_and_damage_names_the_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": math.nan, "y": [math.inf, 1.5], "ü": "é"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [None, 1.5], "ü": "é"}
    (tmp_path / "b.json").write_text('{"x": ')
    with pytest.raises(UserError, match=r"b\.json: not valid JSON"):
        read_json(tmp_path / "b.json")


def build(partial):
    with open(partial / "log", "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.3)
    write_json(partial / "manifest.json", {})


def test_a_folder_is_made_once(tmp_path):
    assert make_folder(tmp_path / "a", "a", build)
    assert not make_folder(tmp_path / "a", "a", build)
    assert len((tmp_path / "a" / "log").read_text().splitlines()) == 1
    assert (tmp_path / ".a.use.lock").is_file(), "who may only read cannot make it"


def test_a_failed_build_leaves_its_work_aside_and_continues(tmp_path):
    def fail(partial):
        (partial / "work").write_text("done so far")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_folder(tmp_path / "a", "a", fail)
    assert not finished_folder(tmp_path / "a")

    def finish(partial):
        assert (partial / "work").read_text() == "done so far"
        write_json(partial / "manifest.json", {})

    assert make_folder(tmp_path / "a", "a", finish)
    assert (tmp_path / "a" / "work").exists()


def _make(path):
    make_folder(path, "a", build)


def test_two_processes_make_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_make, args=(tmp_path / "a",)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [w.exitcode for w in workers] == [0, 0, 0]
    assert len((tmp_path / "a" / "log").read_text().splitlines()) == 1


def test_who_waited_for_a_folder_does_not_wait_for_its_readers(tmp_path):
    both = threading.Barrier(2)

    def read(path):
        make_folder(path, "a", build)
        with in_use(path):
            both.wait(20)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, [tmp_path / "a"] * 2))


def test_a_maker_must_write_its_manifest(tmp_path):
    with pytest.raises(RuntimeError, match=r"no manifest\.json"):
        make_folder(tmp_path / "a", "a", lambda partial: None)


def test_a_full_disk_is_said_before_memory_is_mapped(tmp_path, monkeypatch):
    path = tmp_path / "array.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(1 << 20,)).flush()
    assert path.stat().st_blocks < 2000  # sparse
    allocate(path)
    assert path.stat().st_blocks * 512 >= 1 << 20

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=rf"^{path}: needs 1\.0 MB, the disk is full .*; free some space and repeat"):
        allocate(path)

    def quota(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", quota)
    with pytest.raises(UserError, match=rf"^{path}: needs 1\.0 MB, Disk quota exceeded; free some space"):
        allocate(path)


@pytest.mark.parametrize("in_place", [False, True])
def test_killed_before_its_checksums_a_folder_is_not_finished(tmp_path, monkeypatch, in_place):
    class Killed(BaseException):
        pass

    def kill(folder):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "checksums_of", kill)
        with pytest.raises(Killed):
            make_folder(tmp_path / "a", "a", build, in_place=in_place)
    assert not finished_folder(tmp_path / "a", in_place=in_place)
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "a" / ".checksums.json.k3_x9abq").touch()
    # all is there, and what the build would continue from is gone
    assert make_folder(tmp_path / "a", "a", lambda folder: pytest.fail("built again"), in_place=in_place)
    assert finished_folder(tmp_path / "a", in_place=True)
    assert not [name for name in os.listdir(tmp_path / "a") if name.startswith(".")]


def test_what_a_kill_left_of_a_write_is_removed_by_the_next_build(tmp_path):
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / ".part.npz.k3_x9abq").touch()
    (tmp_path / "a.partial" / ".keep").touch()

    def build(folder):
        assert sorted(os.listdir(folder)) == [".keep"]
        write_json(folder / "manifest.json", {})

    make_folder(tmp_path / "a", "a", build)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    for text in ("first", "second"):
        with replacing_folder(out, "sign", ["sign"], "export") as folder:
            (folder / "sign").write_text(text)
        assert (out / "sign").read_text() == text
    with pytest.raises(ZeroDivisionError), replacing_folder(out, "sign", ["sign"], "export") as folder:
        (folder / "sign").write_text("third")
        1 / 0  # noqa: B018
    assert (out / "sign").read_text() == "second"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    for path in (tmp_path / "mine", tmp_path / "mine" / "file"):
        with pytest.raises(UserError, match="is there, and is no export"):
            replace(path)
    with pytest.raises(UserError, match="file/out: cannot be written .*; choose another folder"):
        replace(tmp_path / "mine" / "file" / "out")
    (tmp_path / "empty").mkdir()
    replace(tmp_path / "empty")
    assert (tmp_path / "empty" / "sign").is_file()


def replace(path):
    with replacing_folder(path, "sign", ["sign", "*.onnx"], "export") as folder:
        (folder / "sign").touch()


def test_no_file_of_the_user_goes_with_a_folder(tmp_path, monkeypatch):
    """A clone of one's own repository, say."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("sign", "old.onnx", ".git"):
        (out / name).touch()
    with pytest.raises(UserError, match="out: has .git, which is no part of the export"):
        replace(out)
    assert sorted(os.listdir(out)) == [".git", "old.onnx", "sign"]
    (out / ".git").unlink()
    (tmp_path / "link").symlink_to("out")
    replace(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(out) == ["sign"]
    monkeypatch.chdir(out)
    with pytest.raises(UserError, match="is the working directory; choose a folder in it"):
        replace(Path())
