import os
from datetime import datetime, timedelta

import pytest
from filelock import FileLock

from iciia_exp.artifacts import write_json
from iciia_exp.cache import entries, main


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    for name in ("backbones/a-1", "features/a-2", "features/b-3.partial"):
        (folder / name).mkdir(parents=True)
        (folder / name / "data").write_bytes(b"x" * 1000)
        if not name.endswith(".partial"):
            write_json(folder / name / "manifest.json", {})
    return folder


def names(folder):
    return {(e.kind, e.path.name, e.state) for e in entries(folder)}


def test_list(cache, capsys):
    assert names(cache) == {
        ("backbones", "a-1", "whole"),
        ("features", "a-2", "whole"),
        ("features", "b-3.partial", "partial"),
    }
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "3 entries" in out
    assert "b-3.partial  (unfinished)" in out


def test_an_empty_cache(tmp_path, capsys):
    assert main(["list", "--cache-dir", str(tmp_path / "nothing")]) == 0
    assert "0 entries" in capsys.readouterr().out


def test_clean_asks_first(cache, capsys):
    assert main(["clean"]) == 2
    assert "--yes" in capsys.readouterr().err
    assert len(names(cache)) == 3


def test_clean_by_name_and_state(cache):
    assert main(["clean", "--partial", "--yes"]) == 0
    assert len(names(cache)) == 2
    assert main(["clean", "a-2", "--yes"]) == 0
    assert names(cache) == {("backbones", "a-1", "whole")}
    assert main(["clean", "--yes"]) == 0
    assert not names(cache)


def test_clean_by_age(cache):
    old = (datetime.now() - timedelta(days=10)).timestamp()
    for path in (cache / "backbones" / "a-1").iterdir():
        os.utime(path, (old, old))
    os.utime(cache / "backbones" / "a-1", (old, old))
    assert main(["clean", "--older-than", "5", "--yes"]) == 0
    assert {n for _, n, _ in names(cache)} == {"a-2", "b-3.partial"}


def test_what_is_being_made_is_kept(cache, capsys):
    with FileLock(cache / "features" / ".b-3.lock"):
        assert main(["clean", "b-3", "--yes"]) == 1
    assert "is making it now" in capsys.readouterr().err
    assert ("features", "b-3.partial", "partial") in names(cache)
