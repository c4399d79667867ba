"""Stages stand alone: training without the dataset's files, a finished run without Lightning, evaluation by itself."""

import json
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from iciia_exp import Run
from iciia_exp.config.experiment import Experiment
from iciia_exp.data.store import FeatureStore
from iciia_exp.engine.execute import execute
from iciia_exp.engine.stages import Stages
from iciia_exp.errors import UserError
from iciia_exp.report.__main__ import main as report
from tests.making.extraction import HEAD, SMALL


def numbers(row):
    """Return a row without what differs between two runs of the same thing."""
    return {k: v for k, v in row.items() if not k.startswith("seconds") and k != "finished"}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("train", [(), HEAD], ids=["all", "head"])
def test_training_and_evaluation_need_no_files_of_the_dataset(folder, root, train, capsys, tmp_path):
    want = execute(folder(*train, f"output_dir={tmp_path}/with_files"))
    root.rename(tmp_path / "away")
    capsys.readouterr()
    assert execute(folder(*train, "stage=train")) is None
    assert "not there; going on with stored features" in capsys.readouterr().out
    row = execute(folder(*train, "stage=evaluate"))
    assert numbers(row) == numbers(want)
    assert "examples without pictures" in capsys.readouterr().out
    run = Run.load(folder(*train).run.folder)
    assert run.attribution["thumbnail"].isna().all()
    assert execute(folder(*train, "method=lame"))["test_images"] == row["test_images"]
    with pytest.raises(UserError, match=r"^data_dir=.*: there is no such folder"):  # images are wanted
        execute(folder(*train, "features.dtype=float16"))
    (tmp_path / "away").rename(root)
    assert numbers(execute(folder(*train))) == numbers(want)


def test_a_dataset_that_was_never_read_is_not_known(folder, root):
    root.rename(root.with_name("elsewhere"))
    with pytest.raises(UserError, match=r"^data_dir=.*: there is no such folder"):
        execute(folder("stage=train"))


def test_a_relative_folder_is_another_one_elsewhere(compose, root, tmp_path, monkeypatch):
    def made(*overrides):
        return Stages(Experiment.from_config(compose(*SMALL, f"data_dir='{root.name}'", *overrides)))

    monkeypatch.chdir(root.parent)
    execute(made("stage=backbone"))
    execute(made("stage=features"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"^data_dir=.*: there is no such folder"):
        execute(made("stage=train"))


def test_the_stores_table_is_the_datasets(folder):
    stages = folder()
    execute(folder("stage=backbone"))
    execute(folder("stage=features"))
    own = stages.experiment.dataset.table
    pd.testing.assert_frame_equal(FeatureStore.open(stages.features.folder).table, own, check_dtype=False)
    again = folder()
    assert (again.clients.test.values == stages.clients.test.values).all()


@pytest.mark.slow
def test_a_finished_run_is_found_without_lightning(stages, small):
    execute(stages())
    code = (
        "import sys; from iciia_exp import run_experiment; run = run_experiment(*sys.argv[1:]); "
        "print([m for m in ('lightning', 'matplotlib', 'wandb', 'scipy.stats', 'torch._dynamo') if m in sys.modules]); run.results"
    )
    command = [sys.executable, "-c", code, *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=os.environ)
    assert "finished before" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


CHANGES = (
    *("evaluation.examples=6", "evaluation.history_orders=1", "evaluation.history_lengths=[0,2]"),
    *("evaluation.drawn_clients=4", "evaluation.cost_images=8", "evaluation.images=4", "evaluation.pixels=16"),
)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_an_evaluation_setting_evaluates_again_and_trains_nothing(stages, capsys):
    def files(made):
        kept = [path for path in made.run.folder.glob("[!.]*.*") if path.name != "run.log"]  # every job adds its lines
        return {path.name: path.stat().st_mtime_ns for path in kept}

    first, before, shown = execute(stages()), files(stages()), 1
    for changed in CHANGES:
        made = stages(changed)
        assert made.run.folder == stages().run.folder
        assert made.evaluation.folder != stages().evaluation.folder
        row = execute(made)
        assert files(made) == before
        assert row["digest"] == first["digest"]
        assert row["evaluation_digest"] != first["evaluation_digest"]
        same = changed.split("=")[0] not in ("evaluation.images", "evaluation.cost_images")
        assert (row["setting_digest"] == first["setting_digest"]) == same
        assert (row["accuracy"] == first["accuracy"]) == (changed != "evaluation.images=4")
        shown += not same
    assert Run.load(stages("evaluation.examples=6").evaluation.folder).attribution["example"].nunique() == 6
    assert Run.load(stages().evaluation.folder).attribution["example"].nunique() == 12
    capsys.readouterr()
    report(["outputs"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| iciia ")]
    assert len(lines) == len(set(lines)) == shown  # settings are rows that show what differs


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_other_arguments_of_the_trainer_are_another_row_and_of_the_backbone_another_table(stages, capsys):
    for override in ("seed=1", "seed=2", "training.recipe.epochs=2", "trainer=smoke"):
        execute(stages(override))
    capsys.readouterr()
    report(["outputs"])
    text = capsys.readouterr().out
    labels = [re.search(r"^\| iciia ([^|]*?)( \*)? +\| +[\d.]+", line) for line in text.splitlines()]
    assert sorted(match[1] for match in labels if match) == sorted(
        ["N=1 H=4 G=1 epochs=3", "N=1 H=4 G=1 epochs=2", "N=1 H=4 G=1"]
    )
    assert text.count("backbone.trainer.max_epochs=1") == 1


@pytest.mark.slow
def test_a_runs_files_do_not_depend_on_its_neighbours(stages, tmp_path):
    execute(stages("groups=4"))
    beside = stages()
    execute(beside)
    alone = stages(f"output_dir={tmp_path}/alone")
    execute(alone)
    names = sorted(p.name for p in (alone.evaluation.folder / "plots").iterdir())
    assert names == sorted(p.name for p in (beside.evaluation.folder / "plots").iterdir())
    for name in names:
        one, other = (made.evaluation.folder / "plots" / name for made in (alone, beside))
        assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.usefixtures("undrawn")
def test_a_run_whose_evaluation_is_lost_is_evaluated_again(stages):
    row = execute(stages())
    shutil.rmtree(stages().evaluation.folder)
    assert numbers(execute(stages())) == numbers(row)
    (stages().evaluation.folder / "results.json").unlink()
    assert numbers(execute(stages())) == numbers(row)
    assert json.loads((stages().evaluation.folder / "results.json").read_text())["finished"]
