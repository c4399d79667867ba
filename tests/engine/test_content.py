"""Two datasets with other bytes are two datasets, for every dataset of files; a moved one is the same."""

import contextlib
import shutil

import numpy as np
import pytest

from iciia_exp.config.experiment import Experiment
from iciia_exp.data.content import Content
from iciia_exp.engine.execute import execute
from iciia_exp.engine.stages import Stages
from iciia_exp.errors import UserError
from tests.engine.test_experiments import CHEAP, EXPERIMENTS, TINY, offline_weights  # noqa: F401
from tests.making.folder import make_folder
from tests.making.omniglot import make_omniglot

#: prompts are all in the table, whose fingerprint tests/data/datasets/test_prompts.py changes
MADE = {
    name: made
    for name, made in EXPERIMENTS.items()
    if made[0] is not None and name.count("imagenet") < 1 and not name.startswith("route_t2i")
}
MADE["mobilenetv3_imagenet"] = EXPERIMENTS["mobilenetv3_imagenet"]
MADE["omniglot"] = (lambda root, _: make_omniglot(root, zipped=False), ())


def flip(path):
    """Change a byte in the middle of a file, which keeps its size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_another_byte_is_another_dataset_and_another_place_is_not(name, compose, tmp_path, monkeypatch):
    make, overrides = MADE[name]
    (tmp_path / "data").mkdir()
    make(tmp_path / "data", monkeypatch)

    def experiment(place="data"):
        given = (f"+experiment={name}", f"data_dir={tmp_path}/{place}", *CHEAP, *overrides)
        return Experiment.from_config(compose(*given))

    def digests(place="data"):
        made = Stages(experiment(place))
        return made.features.digest, made.run.digest

    def content():
        return experiment().dataset.content(Content(None))

    before, bytes_before = digests(), content()
    files = [p for p in (tmp_path / "data").rglob("*") if p.is_file()]
    images = [p for p in files if p.suffix not in (".csv", ".txt")]
    largest = max(images or files, key=lambda p: (p.stat().st_size, str(p)))
    flip(largest)
    assert content() != bytes_before
    with contextlib.suppress(UserError):  # what checks its files says so
        assert not set(digests()) & set(before)
    flip(largest)
    assert content() == bytes_before
    assert digests() == before
    shutil.move(tmp_path / "data", tmp_path / "moved")
    assert digests("moved") == before


@pytest.mark.slow
def test_replaced_images_are_trained_on(compose, tmp_path, offline_weights):  # noqa: F811
    """Other images under the same names: the finished run is not that of the new ones."""
    given = ("+experiment=folder", f"data_dir={tmp_path}/data", *CHEAP, TINY, "partition.images_per_client=4")
    make_folder(tmp_path / "data")

    def made():
        return Stages(Experiment.from_config(compose(*given)))

    first = execute(made())
    features = np.load(made().features.folder / "features.npy")
    images = sorted((tmp_path / "data").rglob("*.jpg"))
    contents = [path.read_bytes() for path in images]
    for path, content in zip(images, contents[::-1], strict=True):
        path.write_bytes(content)
    second = execute(made())
    assert first["digest"] != second["digest"]
    assert not np.array_equal(np.load(made().features.folder / "features.npy"), features)
    for path, content in zip(images, contents, strict=True):
        path.write_bytes(content)
    assert execute(made()) == first
