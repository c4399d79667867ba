import errno
import os
from datetime import datetime, timedelta

import pytest
from filelock import FileLock

from iciia_exp import cache as cache_module
from iciia_exp.artifacts import in_use, write_json
from iciia_exp.cache import entries, main, remove
from iciia_exp.engine.execute import execute


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    for name in ("backbones/a-000000000001", "features/a-000000000002", "features/b-000000000003.partial"):
        (folder / name).mkdir(parents=True)
        (folder / name / "data").write_bytes(b"x" * 1000)
        if not name.endswith(".partial"):
            write_json(folder / name / "manifest.json", {"format": 1})
    return folder


def names(folder):
    return {(e.kind, e.path.name, e.state) for e in entries(folder)}


def test_list(cache, capsys):
    assert names(cache) == {
        ("backbones", "a-000000000001", "whole"),
        ("features", "a-000000000002", "whole"),
        ("features", "b-000000000003.partial", "partial"),
    }
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "3 entries" in out
    assert "b-000000000003.partial  (unfinished)" in out


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
    assert main(["clean", "a-000000000002", "--yes"]) == 0
    assert names(cache) == {("backbones", "a-000000000001", "whole")}
    assert main(["clean", "--yes"]) == 0
    assert not names(cache)


def test_clean_by_age(cache):
    old = (datetime.now() - timedelta(days=10)).timestamp()
    for path in (cache / "backbones" / "a-000000000001").iterdir():
        os.utime(path, (old, old))
    os.utime(cache / "backbones" / "a-000000000001", (old, old))
    assert main(["clean", "--older-than", "5", "--yes"]) == 0
    assert {n for _, n, _ in names(cache)} == {"a-000000000002", "b-000000000003.partial"}


def test_what_is_being_made_is_kept(cache, capsys):
    with FileLock(cache / "features" / ".b-000000000003.lock"):
        assert main(["clean", "b-000000000003", "--yes"]) == 1
    assert "is making or reading it now" in capsys.readouterr().err
    assert ("features", "b-000000000003.partial", "partial") in names(cache)


def test_what_is_not_ours_is_neither_listed_nor_deleted(cache, tmp_path):
    """A cache folder that holds data of a user, some with names like ours, and links."""
    before = names(cache)
    elsewhere = tmp_path / "elsewhere-0123456789ab"
    elsewhere.mkdir()
    write_json(elsewhere / "manifest.json", {"format": 1})
    theirs = ("datasets/imagenet", "features/mine", "features/mine-0123456789ab", "backbones/x.partial")
    theirs += ("features/.hidden-0123456789ab",)
    for name in theirs:
        (cache / name).mkdir(parents=True)
        (cache / name / "precious").touch()
    hidden = [cache / "datasets" / ".vimrc.swapfile", cache / "features" / ".bashrc.abcdefgh"]
    for path in hidden:
        path.touch()
        os.utime(path, (0, 0))
    write_json(cache / "features/mine" / "manifest.json", {"format": 1})
    (cache / "features" / elsewhere.name).symlink_to(elsewhere)
    (cache / "features" / f"{elsewhere.name}.partial").symlink_to(elsewhere)
    (cache / "features" / "a-000000000002" / "link").symlink_to(elsewhere)
    (cache / "features" / "broken-0123456789ab").symlink_to(tmp_path / "nowhere")
    assert names(cache) == before
    assert main(["clean", "--yes"]) == 0
    assert not names(cache)
    assert (elsewhere / "manifest.json").is_file()
    left = {str(path.relative_to(cache)) for path in cache.rglob("precious")}
    assert left == {f"{name}/precious" for name in theirs}
    assert all(path.exists() for path in hidden)
    assert (cache / "features" / elsewhere.name).is_symlink()


def test_what_a_kill_left_is_removed(cache):
    aside = cache / "features" / ".a-000000000009.deleted"
    aside.mkdir()
    temporary = cache / "datasets" / ".folder-000000000001.json.ab1_z9kq"
    temporary.parent.mkdir()
    temporary.touch()
    old = (datetime.now() - timedelta(days=1)).timestamp()
    os.utime(temporary, (old, old))
    young = temporary.with_name(".folder-000000000002.json.ab1_z9kq")
    young.touch()
    assert ("features", aside.name, "partial") in names(cache)
    assert main(["clean", "--yes"]) == 0
    assert not aside.exists()
    assert not temporary.exists()
    assert young.exists()  # somebody may be writing it


def test_a_removal_that_was_killed_is_finished_by_the_next(cache):
    aside = cache / "features" / ".a-000000000002.deleted"
    aside.mkdir()
    (aside / "data").touch()
    assert main(["clean", "--yes"]) == 0
    assert not names(cache)


def test_what_cannot_be_removed_is_named_and_the_rest_is_removed(cache, capsys, monkeypatch):
    whole = cache_module.shutil.rmtree

    def busy(path):
        if "a-000000000001" in path.name:
            raise OSError(errno.EBUSY, "Device or resource busy", "mounted")
        whole(path)

    monkeypatch.setattr(cache_module.shutil, "rmtree", busy)
    assert main(["clean", "--yes"]) == 1
    assert capsys.readouterr().err == "kept a-000000000001: mounted: Device or resource busy\n"
    assert names(cache) == {("backbones", ".a-000000000001.deleted", "partial")}


def test_an_empty_name_is_no_folder(monkeypatch, capsys):
    monkeypatch.setenv("ICIIA_EXP_CACHE", "")
    assert main(["list"]) == 2
    assert "is empty; name a folder, or unset it" in capsys.readouterr().err


def test_what_a_run_reads_is_kept(cache, capsys):
    path = cache / "features" / "a-000000000002"
    with in_use(path), in_use(path):  # several may read it
        assert main(["clean", "--yes", "a-000000000002"]) == 1
        assert "a process is making or reading it now" in capsys.readouterr().err
        assert path.is_dir()
    assert main(["clean", "--yes", "a-000000000002"]) == 0
    assert not path.exists()


def test_a_run_holds_what_it_reads(stages, monkeypatch):
    """The features, while a method is trained on them."""
    kept = []

    def clean(*_, **__):
        kept.append([remove(entry) for entry in entries(made.experiment.cache_dir)])
        raise KeyboardInterrupt

    execute(stages("method=backbone"))
    made = stages("method=linear_head")
    monkeypatch.setattr("iciia_exp.engine.training.fit.fit", clean)
    with pytest.raises(KeyboardInterrupt):
        execute(made)
    assert kept == [["a process is making or reading it now"] * 2]  # backbone and features
    assert [remove(entry) for entry in entries(made.experiment.cache_dir)] == [None, None]


def test_a_file_that_has_just_gone_is_passed_over(cache, monkeypatch):
    real = os.walk
    monkeypatch.setattr("iciia_exp.cache.os.walk", lambda at: [(a, d, [*f, "gone"]) for a, d, f in real(at)])
    assert len(names(cache)) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([""], "NAME is empty"),
        *((["--older-than", days], f"--older-than {days}: must be a number of days") for days in ("nan", "inf", "-5")),
    ],
)
def test_wrong_arguments_delete_nothing(cache, capsys, arguments, said):
    assert main(["clean", "--yes", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert len(names(cache)) == 3
