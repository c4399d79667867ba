"""What is in a dataset, and what may be wrong with it, is said before any work."""

import shutil

import numpy as np
import pytest
from PIL import Image

from iciia_exp.engine.data_check import findings
from iciia_exp.engine.execute import execute
from iciia_exp.engine.terminal import setup_logging
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


def test_errors_of_the_configuration_are_found(folder):
    with pytest.raises(Exception, match="groups=3"):
        execute(folder("stage=check", "method=iciia", "groups=3"))


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
    assert "1 of 30 test images are train images as well (image 100 = image 3)" in lines


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
