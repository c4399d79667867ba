"""What is in a dataset, and what may be wrong with it, is said before any work."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from iciia_exp.engine import data_check
from iciia_exp.engine.data_check import findings, unreadable
from iciia_exp.engine.execute import execute
from iciia_exp.engine.terminal import setup_logging
from iciia_exp.errors import UserError
from tests.making.extraction import artifacts_in
from tests.making.images import write_image
from tests.making.vectors import make_vectors

pytestmark = pytest.mark.usefixtures("undrawn")


def found(stages):
    return list(findings(stages, whole=True))


def test_a_check_works_at_nothing(stages, capsys, tmp_path):
    setup_logging()
    execute(stages("stage=check"))
    out = capsys.readouterr().out
    assert "images per class: least" in out
    assert next(line for line in out.splitlines() if line.startswith("train ")).split()[1] == "100"
    assert "data: nothing found that is wrong" in out
    assert not (tmp_path / "outputs").exists()
    assert not artifacts_in(tmp_path / "cache")


def test_what_cannot_be_read_is_named_before_any_work(folder, root, capsys):
    setup_logging()
    execute(folder("stage=check"))
    assert "cannot be read" not in capsys.readouterr().out
    paths = sorted((root / "test/apple").iterdir())
    paths[0].write_bytes(b"")  # no image, cut off, a link to nothing, a pipe, too many pixels
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    for path in paths[2:5]:
        path.unlink()
    paths[2].symlink_to("nothing")
    os.mkfifo(paths[3])
    Image.new("1", (13_000, 13_000)).save(paths[4], "PNG")
    execute(folder("stage=check"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "cannot be read" in line]
    assert line.startswith(
        "warning: data: 5 of 81 images cannot be read, a run leaves them out (test/apple/000.jpg: Un"
    )
    assert unreadable(folder())[1] == 81
    for number, problem in enumerate(("cannot identify", "Truncated", "No such file", "regular file", "limit")):
        for path in paths[:5]:
            shutil.move(path, path.with_suffix(".kept"))
        shutil.move(paths[number].with_suffix(".kept"), paths[number])
        assert problem in " ".join(unreadable(folder("dataset.csv=null"))[0])
        shutil.move(paths[number], paths[number].with_suffix(".kept"))
        for path in paths[:5]:
            shutil.move(path.with_suffix(".kept"), path)


def test_of_many_images_some_are_decoded(folder, root, monkeypatch, capsys):
    setup_logging()
    monkeypatch.setattr(data_check, "_DECODED_AT_ONCE", 10)
    monkeypatch.setattr(data_check.time, "monotonic", iter(range(1000)).__next__)
    monkeypatch.setattr(data_check, "_PATIENCE", 3.0)
    assert unreadable(folder()) == ([], 20)
    (root / "test/apple/000.jpg").write_bytes(b"")
    assert len(unreadable(folder())[0]) == 1


def test_photos_far_larger_than_the_input(folder, root):
    for path in root.rglob("*.jpg"):
        Image.open(path).resize((700, 600)).save(path)
    (line,) = [line for line in found(folder("backbone.model.size=64")) if "sees" in line]
    assert line.endswith("sees 64 x 64 pixels of pictures whose shorter side is 600; smaller copies load faster")


def test_names_with_line_breaks_are_one_line(folder, root, capsys):
    setup_logging()
    for split in ("train", "val", "test"):
        (root / split / "apple").rename(root / split / "a\nb")
    for path in root.rglob("*.jpg"):
        write_image(path, 0)
    execute(folder("stage=check", "dataset.csv=null", "partition=classes_per_client"))
    out = capsys.readouterr().out
    assert "(test/a\\nb/000.jpg = train/a\\nb/000.jpg)" in out
    assert not any(line.startswith("b/") for line in out.splitlines())


def test_errors_of_the_configuration_are_found(folder):
    with pytest.raises(Exception, match="groups=3"):
        execute(folder("stage=check", "method=iciia", "groups=3"))


def test_images_are_checked_where_the_partition_is_wrong(folder, root, capsys):
    (root / "test/apple/000.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="parent category"):
        execute(folder("stage=check", "partition=parent_category"))
    assert "1 of 81 images cannot be read" in capsys.readouterr().out


def test_copies_of_train_images_among_test_images(folder, root, capsys):
    for number, path in enumerate(sorted((root / "test").rglob("*.jpg"))):
        write_image(path, 0, 100 + number)
    for number, path in enumerate(sorted((root / "val").rglob("*.jpg"))):
        write_image(path, 0, 200 + number)
    assert not [line for line in found(folder()) if "train images as well" in line]
    for number in (0, 1):
        shutil.copy(root / f"train/apple/00{number}.jpg", root / f"test/apple/00{number}.jpg")
    assert "2 of 27 test images are train images as well (test/apple/000.jpg = train/apple/000.jpg)" in found(folder())
    execute(folder())
    out = capsys.readouterr().out
    assert out.index("warning: data: 2 of 27 test images") < out.index("backbone: training")


def test_copies_among_train_images(folder, root):
    assert not [line for line in found(folder()) if "copies" in line or "content" in line]
    for number in (0, 1):
        shutil.copy(root / f"train/apple/00{number}.jpg", root / f"train/apple/00{number + 2}.jpg")
    (line,) = [line for line in found(folder()) if "copies" in line]
    assert line.startswith("2 of ")
    assert line.endswith(" train images are copies of others (train/apple/002.jpg = train/apple/000.jpg)")
    shutil.copy(root / "train/apple/000.jpg", root / "train/cup/000.jpg")
    (line,) = [line for line in found(folder()) if "content" in line]
    pair = "train/cup/000.jpg = train/apple/000.jpg"
    assert line == f"3 train images have content that others have with another label ({pair})"


def test_classes_that_no_train_image_has(folder, root, capsys):
    """Owners of whom only those in test have a class."""
    table = (root / "images.csv").read_text().splitlines()
    kept = [line for line in table if "train/cup" not in line]
    assert len(kept) < len(table)
    (root / "images.csv").write_text("\n".join(kept) + "\n")
    (line,) = [line for line in found(folder()) if "no train images" in line]
    assert line == "1 of 3 classes have test images and no train images (cup); 9 of 27 test images are of them"


def test_vectors_of_other_owners(stages, tmp_path):
    owner = ["x"] * 60 + ["y"] * 30 + ["z"] * 30
    label = [0] * 30 + [1] * 30 + [0] * 15 + [1] * 15 + [2] * 30
    split = ["train"] * 60 + ["val"] * 30 + ["test"] * 30
    vectors, _ = make_vectors(tmp_path / "data", owner=owner, label=label, split=split)
    vectors[100] = vectors[3]
    np.save(tmp_path / "data" / "features.npy", vectors)
    head = ("backbone=precomputed", "dataset=features", f"data_dir={tmp_path}/data")
    made = _plain(stages, *head, "partition=owner", "method=backbone")
    lines = found(made)
    assert "1 of 3 classes have test images and no train images (2); 30 of 30 test images are of them" in lines
    assert "1 of 30 test images are train images as well (features.npy, row 100 = features.npy, row 3)" in lines


def test_vectors_that_are_not_finite(stages, tmp_path, capsys):
    given = {"owner": ["x", "y", "z"], "split": ["train", "val", "test"], "label": [0, 1, 0, 1, 1, 0]}
    vectors, _ = make_vectors(tmp_path / "data", **{name: 120 // len(v) * v for name, v in given.items()})
    vectors[[3, 50, 110]] = np.nan
    np.save(tmp_path / "data" / "features.npy", vectors)
    head = ("backbone=precomputed", "dataset=features", f"data_dir={tmp_path}/data", "partition=owner")
    made = _plain(stages, *head, "method=backbone")
    assert not [line for line in found(made) if "images as well" in line]  # they are equal in nothing
    np.save(tmp_path / "data" / "features.npy", np.full_like(vectors, np.nan))
    assert not [line for line in found(_plain(stages, *head, "method=backbone")) if "images" in line]
    np.save(tmp_path / "data" / "features.npy", vectors)
    (line,), _ = unreadable(made)
    names = ", ".join(f"features.npy, row {row}: ValueError: has numbers that are not finite" for row in (3, 50, 110))
    assert line == f"3 of 120 images cannot be read, a run leaves them out ({names})"
    setup_logging()
    for stage in ("all", "features"):
        with pytest.raises(UserError, match=rf"^3 of 120 vectors cannot be read \({names}\); repair them, or leave"):
            execute(_plain(stages, *head, "method=backbone", "features.on_bad_image=error", f"stage={stage}"))
    execute(made)
    assert f"3 of 120 images could not be read and are left out ({names})" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"^3 of 120 images could not be read \({names}\); repair them and delete"):
        execute(_plain(stages, *head, "method=backbone", "features.on_bad_image=error"))


def _plain(stages, *overrides):
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from iciia_exp.config.experiment import Experiment
    from iciia_exp.config.paths import CONF_DIR

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("config", overrides=["logger=csv", "trainer=cpu", *overrides])
    return type(stages())(Experiment.from_config(config))


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        (("caf\u00e9", "cafe\u0301"), "'café' and 'café'"),
        (("Cup", "cup"), "'Cup' and 'cup'"),
        (("01", "1"), "'01' and '1'"),
        (("a b", "a  b"), "'a  b' and 'a b'"),
    ],
)
def test_names_that_collide(folder, root, names, pair):
    (root / "images.csv").unlink()
    for split in ("train", "val", "test"):
        for name in names:
            write_image(root / split / name / "0.jpg", 0)
    lines = [
        line for line in found(folder("dataset.csv=null", "partition=classes_per_client")) if "differ in case" in line
    ]
    assert len(lines) == 1
    assert lines[0].startswith("1 names of classes differ in case")
    assert lines[0].count(" and ") == 1


def test_a_backbone_that_sees_little(folder, root):
    assert not [line for line in found(folder()) if "sees" in line]
    for path in root.rglob("*.jpg"):
        Image.open(path).resize((200, 100)).save(path)
    grey = folder("backbone.model.channels=1", "backbone.model.size=8")
    (line,) = [line for line in found(grey) if "sees" in line]
    assert line == "the backbone small_cnn sees 8 x 8 grey pixels of coloured pictures whose shorter side is 100"


def test_weights_that_do_not_fit(folder, root, capsys, tmp_path):
    import torch

    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "w.pt")
    execute(folder("stage=check", f"+backbone.weights={tmp_path}/w.pt"))
    assert "warning: data: " in capsys.readouterr().out
