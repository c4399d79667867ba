"""Two datasets with other bytes are two datasets, for every dataset of files; a moved one is the same."""

import contextlib
import shutil

import numpy as np
import pytest
from safetensors.torch import save_file

from iciia_exp.config.experiment import Experiment
from iciia_exp.data.content import Content
from iciia_exp.engine.execute import execute
from iciia_exp.engine.stages import Stages
from iciia_exp.engine.training import extract
from iciia_exp.errors import UserError
from tests.engine.test_experiments import CHEAP, EXPERIMENTS, TINY, offline_weights  # noqa: F401
from tests.making.folder import make_folder
from tests.making.omniglot import make_omniglot
from tests.making.vectors import make_vectors

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


@pytest.mark.parametrize("what", ["data_dir", "backbone.weights"])
def test_files_that_change_while_they_are_read(compose, tmp_path, monkeypatch, offline_weights, what):  # noqa: F811
    """Nothing is kept: the digest is that of the files before, and what was read may be the files after."""
    make_folder(tmp_path / "data")
    weights = tmp_path / "weights.safetensors"
    given = (
        *("+experiment=folder", f"data_dir={tmp_path}/data", *CHEAP, TINY),
        *("partition.images_per_client=4", "method=backbone", "backbone.train=head"),
    )

    def made():
        return Stages(Experiment.from_config(compose(*given)))

    save_file(made().new_backbone().pretrained_state(), weights)
    if what == "backbone.weights":
        given = (*given, f"backbone.weights={weights}")
    file = weights if what == "backbone.weights" else sorted((tmp_path / "data").rglob("*.jpg"))[0]
    before, original = file.read_bytes(), extract.extract

    def change(*arguments):
        flip(file)
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(extract, "extract", change)
        with pytest.raises(UserError, match=f"{what}=.*changed while it was read; nothing made of it is kept"):
            execute(made())
    file.write_bytes(before)
    stages = made()
    folder = stages.features.folder
    assert not folder.exists()
    assert not folder.with_name(f"{folder.name}.partial").exists()
    execute(stages)
    assert folder.exists()


def test_what_could_not_be_compared_is_not_finished(stages, tmp_path, monkeypatch):
    """A Ctrl-C between the features' manifest and the comparison of the files that they were made of."""
    made, folder = stages(), tmp_path / "features"
    folder.mkdir()

    def interrupted(*_):
        raise KeyboardInterrupt

    assert made.files is not None
    monkeypatch.setattr("iciia_exp.engine.stages.Inputs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made._make_of_files(lambda at: (at / "manifest.json").touch(), folder)
    assert not (folder / "manifest.json").exists()


def test_digests_are_computed_where_none_can_be_kept(tmp_path):
    """As in a cache that others may only read."""
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "file").touch()
    kept = Content(tmp_path / "file" / "cache")
    assert kept.of(tmp_path, ["a"]) == Content(None).of(tmp_path, ["a"])


@pytest.mark.slow
def test_without_its_files_the_data_is_that_of_the_last_run(compose, tmp_path, caplog):
    given = ("dataset=features", "backbone=precomputed", f"data_dir={tmp_path}/data", "method=prior_em")
    more = ("logger=csv", "trainer=cpu", "partition.images_per_client=4", "evaluation.history_lengths=[]")

    def row(seed=None):
        if seed is not None:
            make_vectors(tmp_path / "data", images=240, seed=seed)
        return execute(Stages(Experiment.from_config(compose(*given, *more))))

    first, second = row(1), row(2)
    assert first["digest"] != second["digest"]
    assert row(1) == first
    shutil.rmtree(tmp_path / "data")
    assert row() == first
