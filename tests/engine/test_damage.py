"""Damaged files of a finished run and of the cache: said, or made again, and never other numbers."""

import shutil

import numpy as np
import pytest
import torch

from iciia_exp import Run
from iciia_exp.checksums import CHECKSUMS
from iciia_exp.config.experiment import Experiment
from iciia_exp.engine.execute import execute
from iciia_exp.engine.stages import Stages
from iciia_exp.engine.sweeps import _records, record_job
from iciia_exp.errors import UserError
from tests.making.damage import DAMAGE, flip

pytestmark = pytest.mark.usefixtures("undrawn")

LEARNED = ("partition=reserve_ratio", "method=finetune", "backbone.train=head", "backbone.recipe=null")
TRAINED = ("partition=reserve_ratio", "method=backbone", "backbone.recipe.epochs=1")


@pytest.fixture
def of(compose, small):
    """Return the stages of an experiment in a folder."""
    own = [override for override in small if not override.startswith(("partition.", "backbone.recipe."))]

    def make(root, overrides=LEARNED):
        places = (f"cache_dir={root}/cache", f"output_dir={root}/outputs")
        return Stages(Experiment.from_config(compose(*own, *overrides, *places)))

    return make


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tmp_path_factory.mktemp("original")


@pytest.fixture
def made(original, of, tmp_path):
    """Return the stages of a copy of a run that has every kind of artifact but a trained backbone."""
    if not (original / "outputs").exists():
        execute(of(original), brief=True)
        execute(of(original, TRAINED), brief=True)
    shutil.copytree(original, tmp_path / "copy")
    return of(tmp_path / "copy")


def consumed(stages):
    """Return all numbers that a user reads of a run; raises a `UserError` for damage."""
    run = Run.load(stages.run.folder, cache_dir=stages.experiment.cache_dir)
    store = run.features
    numbers = [
        store.array(),
        store.table["label"],
        store.bad,
        *run.method.state_dict().values(),
        *run.head.parameters(),
    ]
    clients = run.clients
    numbers += [clients[name] for name in clients.select_dtypes("number")]
    numbers += [run.partition.test.values, run.config["seed"], run.results["accuracy"]]
    numbers += [run.predict(torch.from_numpy(store.array()[:2].copy())[None], clients=run.partition.ids[:1].tolist())]
    return np.concatenate([np.asarray(part, dtype=np.float64).reshape(-1) for part in numbers])


FILES = (
    *("run/run.json", "run/weights.safetensors", "run/partition.parquet", "run/config.yaml", "run/training.json"),
    *("states/manifest.json", "states/00000.safetensors", "evaluation/results.json", "evaluation/clients.parquet"),
    *("features/manifest.json", "features/features.npy", "features/images.parquet", "head/head.safetensors"),
    *("run/checksums.json", "features/checksums.json"),
)


@pytest.mark.parametrize("name", FILES)
def test_damage_is_said_or_repaired(made, name):
    kind, file = name.split("/")
    folder = getattr(made, kind).folder
    path, whole = folder / file, consumed(made)
    content = path.read_bytes()
    for label, damage in DAMAGE.items():
        damage(path)
        try:
            found = consumed(made)
        except UserError as error:
            said = str(error)
        else:
            said = None  # not read here, or a list of checksums that is lost
            np.testing.assert_array_equal(found, whole, err_msg=label)
        unread = {("run", "training.json"), ("head", "head.safetensors")}
        assert said is not None or (kind, file) in unread or file == CHECKSUMS, label
        missing = {("states", "manifest.json"), ("evaluation", "results.json")}  # no states, no evaluation
        assert said is None or str(folder) in said or (label == "lost" and (kind, file) in missing), label
        assert said is None or "\n" not in said
        path.unlink(missing_ok=True)
        path.write_bytes(content)
    np.testing.assert_array_equal(consumed(made), whole)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "label"), [(n, "lost") for n in FILES if "checksums" not in n] + [(FILES[1], "cut")])
def test_what_is_lost_or_cut_off_is_made_again_by_the_same_command(made, name, label):
    kind, file = name.split("/")
    whole, path = consumed(made), getattr(made, kind).folder / file
    DAMAGE[label](path)
    if kind in ("features", "head"):  # a finished run does not need what it was made from
        shutil.rmtree(made.run.folder)
    execute(made, brief=True)
    assert path.is_file()
    np.testing.assert_array_equal(consumed(made), whole)


@pytest.mark.parametrize("name", ["features/features.npy", "features/images.parquet", "head/head.safetensors"])
def test_a_flipped_bit_is_said_before_a_run_uses_it(made, of, name):
    kind, file = name.split("/")
    path = getattr(made, kind).folder / file
    flip(path)
    shutil.rmtree(made.run.folder)
    with pytest.raises(UserError, match=rf"{file}: is not what was written: .*; delete {path.parent} and repeat"):
        execute(made, brief=True)
    shutil.rmtree(path.parent)
    execute(of(made.experiment.cache_dir.parent), brief=True)


@pytest.mark.parametrize("label", DAMAGE)
def test_a_trained_backbone(made, of, label):
    root = made.experiment.cache_dir.parent
    stages = of(root, TRAINED)
    path = stages.backbone.folder / "weights.safetensors"
    before = path.read_bytes()
    DAMAGE[label](path)
    with pytest.raises(UserError, match=r"weights\.safetensors"):
        Run.load(stages.run.folder, cache_dir=root / "cache").load_backbone()
    shutil.rmtree(stages.features.folder)
    shutil.rmtree(stages.run.folder)
    if label in ("cut", "empty", "lost"):
        execute(of(root, TRAINED), brief=True)
        assert path.read_bytes() == before
    else:
        with pytest.raises(UserError, match=r"weights\.safetensors: is not what was written"):
            execute(of(root, TRAINED), brief=True)


@pytest.mark.parametrize("kind", DAMAGE)
def test_facts_of_a_dataset_are_read_again(stages, tmp_path, kind):
    stages("method=backbone").facts.remember()
    before = stages("method=backbone").run.digest
    (facts,) = tmp_path.glob("cache/datasets/digits-*.json")
    whole = facts.read_bytes()
    DAMAGE[kind](facts)
    made = stages("method=backbone")
    assert made.run.digest == before
    made.facts.remember()
    assert facts.read_bytes() == whole


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_sweep_reports_without_the_damaged_record_of_a_job(tmp_path, kind, caplog):
    for number in (0, 1):
        record_job(tmp_path, number, [], {"status": "done", "evaluation_dir": None, "error": None})
    DAMAGE[kind](tmp_path / "jobs" / "00000.json")
    assert [job["job"] for job in _records(tmp_path)][-1:] == [1]
    assert kind in ("lost", "flip") or "00000.json" in caplog.text
