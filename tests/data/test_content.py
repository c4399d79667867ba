"""Content: other bytes are another digest, also in place, and files are read once."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from iciia_exp.data import content
from iciia_exp.data.content import Content, bytes_digest

NAMES = ["a/1.bin", "a/2.bin", "b/3.bin"]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "_FRESH", -1.0)  # files of this test are young
    for name in NAMES:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    return tmp_path / "data"


def counting(monkeypatch):
    read = []

    def reading(path):
        read.append(Path(path).name)
        return bytes_digest(path)

    return read, reading


def test_a_file_is_read_once(root, tmp_path, monkeypatch):
    read, reading = counting(monkeypatch)
    kept = Content(tmp_path / "kept")
    first = kept.of(root, NAMES, reading)
    assert kept.of(root, NAMES, reading) == first == Content(None).of(root, NAMES)
    assert sorted(read) == ["1.bin", "2.bin", "3.bin"]
    assert Content(tmp_path / "kept").of(root, NAMES[:2], reading) != first  # others stay known
    assert kept.of(root, NAMES, reading) == first
    assert len(read) == 3


def test_replaced_in_place_with_the_same_size_and_time(root, tmp_path, monkeypatch):
    read, reading = counting(monkeypatch)
    kept, path = Content(tmp_path / "kept"), root / NAMES[1]
    before, status = kept.of(root, NAMES, reading), path.stat()
    path.write_text("A/2.bin")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    after = kept.of(root, NAMES, reading)
    assert after != before
    assert sorted(read) == ["1.bin", "2.bin", "2.bin", "3.bin"]
    path.write_text(NAMES[1])
    assert kept.of(root, NAMES, reading) == before
    path.unlink()
    assert kept.of(root, NAMES, reading) not in (before, after)


def test_a_moved_folder_has_the_same_content(root, tmp_path):
    kept = Content(tmp_path / "kept")
    before = kept.of(root, NAMES)
    assert kept.of(shutil.move(root, tmp_path / "elsewhere"), NAMES) == before
    assert kept.of(tmp_path / "elsewhere", NAMES[::-1]) != before


def test_a_young_file_is_read_again(root, tmp_path, monkeypatch):
    monkeypatch.setattr(content, "_FRESH", 60.0)
    os.utime(root / NAMES[0], (time.time() - 100,) * 2)  # its change of the inode is young
    read, reading = counting(monkeypatch)
    kept = Content(tmp_path / "kept")
    assert kept.of(root, NAMES, reading) == kept.of(root, NAMES, reading)
    assert len(read) == 6


@pytest.mark.parametrize("damage", [b"", b"nothing", b"PAR1 cut"])
def test_a_damaged_table_is_made_again(root, tmp_path, damage, caplog):
    kept = Content(tmp_path / "kept")
    before = kept.of(root, NAMES)
    (file,) = (tmp_path / "kept").iterdir()
    file.write_bytes(damage)
    assert kept.of(root, NAMES) == before
    assert f"{file}: cannot be read" in caplog.text
    caplog.clear()
    assert kept.of(root, NAMES) == before
    assert not caplog.records


def test_names_that_are_not_text(root, tmp_path):
    name = os.fsdecode(b"caf\xe9.bin")
    (root / name).write_text("1")
    kept = Content(tmp_path / "kept")
    assert kept.of(root, [name]) == kept.of(root, [name]) != kept.of(root, NAMES)


def test_one_file_has_the_digest_of_its_bytes(root, tmp_path):
    (root / "copy").write_text(NAMES[0])
    kept = Content(tmp_path / "kept")
    assert kept.of_one(root / "copy") == kept.of_one(root / NAMES[0]) != kept.of_one(root / NAMES[1])
    assert kept.each(root, ["none", NAMES[0]], bytes_digest, "bytes")[0] == 0
    assert kept.each(root, [NAMES[0]], bytes_digest, "bytes").dtype == np.int64
