"""wandb offline, read back with wandb's own tool; and every way in which it must not get in the way."""

import json
import subprocess
import sys
from glob import glob
from pathlib import Path

import pandas as pd
import pytest

from iciia_exp import Run
from iciia_exp.engine.execute import execute
from iciia_exp.engine.terminal import setup_logging
from iciia_exp.engine.tracking import METRICS, wandb_logged_in, wandb_mode
from iciia_exp.errors import ConfigError
from iciia_exp.results import columns
from iciia_exp.results.labels import label_of
from iciia_exp.results.tables import averages_by_history
from tests.making.kill import Killed


@pytest.fixture(autouse=True)
def logged():
    setup_logging()


def inspect(run_dir):
    """Return the records of the run directory's only offline wandb run."""
    (file,) = Path(run_dir).glob("wandb/offline-run-*/run-*.wandb")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.slow
def test_arguments_of_lightnings_logger(stages, tmp_path, capsys):
    more = ("+logger.wandb.offline=true", f"+logger.wandb.save_dir={tmp_path}/elsewhere", "+logger.wandb.version=abc")
    (tmp_path / "elsewhere").mkdir()
    execute(stages("logger=wandb", "method=linear_head", *more))
    assert "goes on without it" not in capsys.readouterr().out
    (file,) = (tmp_path / "elsewhere").rglob("run-*.wandb")
    assert file.name == "run-abc.wandb"


@pytest.mark.slow
def test_an_offline_run_holds_everything(stages, monkeypatch, capsys):
    monkeypatch.setattr(columns, "COLUMNS", [*columns.COLUMNS, columns.Column("se_clients", wandb="test")])
    made = stages("logger=wandb", "logger.wandb.tags=[mine]", "logger.wandb.log_model=true")
    row = execute(made)
    assert "goes on without it" not in capsys.readouterr().out
    text = inspect(made.run.folder)
    assert "test/se_clients" in columns.summary_keys()
    for key, name in columns.summary_keys().items():
        if row.get(name) is not None:
            assert key in text, key
    for word in (made.run.digest, '"digits"', "small_cnn", "mine", "val/accuracy", "gain_per_client", "clients"):
        assert word in text, word
    records = [json.loads(line) for line in text.splitlines()]
    steps = [r["history"]["item"] for r in records if r["type"] == "history"]
    curve = [step for step in steps if "history/images" in step]
    lengths = averages_by_history(pd.read_parquet(made.evaluation.folder / "history.parquet")).index
    assert [c["history/images"] for c in curve] == [n for n in lengths if n >= 0]
    assert all(0 <= c["history/client_accuracy"] <= 1 for c in curve)
    defined = {m.get("name") or m["glob_name"]: m for r in records if r["type"] == "metric" for m in [r["metric"]]}
    assert {name: m.get("step_metric") for name, m in defined.items()} == {
        name: options.get("step_metric") for name, options in METRICS.items()
    }
    tables = list(Path(made.run.folder).glob("wandb/offline-run-*/files/media/table/clients*.json"))
    assert len(tables) == 1
    table = json.loads(tables[0].read_text())
    clients = Run.load(made.run.folder).clients
    assert table["columns"] == list(clients)
    assert len(table["data"]) == len(clients)
    media = f"{made.run.folder}/wandb/offline-run-*/files/media"
    plots = {Path(p).name.split("_")[0] for p in glob(f"{media}/images/plots/*.png")}
    assert plots == {"accuracy", "calibration", "gain", "attribution"}
    (examples,) = [json.loads(Path(p).read_text()) for p in glob(f"{media}/table/attribution*.json")]
    kept = Run.load(made.run.folder).attribution
    assert examples["columns"][:6] == ["case", "client", "truth", "target", "before", "after"]
    assert [line[1] for line in examples["data"]] == kept[kept["rank"] == 0]["client"].tolist()
    artifacts = {r["artifact"]["name"]: r["artifact"] for r in records if r["type"] == "artifact"}
    held = {n: [c["path"] for c in a["manifest"]["contents"]] for n, a in artifacts.items()}
    pictures = {p for p in held[f"run-{row['digest']}-attribution"] if p.startswith("media/images/")}
    assert len(pictures) == kept["thumbnail"].nunique()
    (chart,) = [json.loads(Path(p).read_text()) for p in glob(f"{media}/table/accuracy_vs_overhead*.json")]
    assert chart["data"] == [[label_of(row, {}), row["overhead_percent"], 100 * row["accuracy"]]]
    assert set(held[f"model-{row['digest']}"]) == {"run.json", "config.yaml", "weights.safetensors"}
    tables = ("clients", "history", "attribution", "calibration")  # what the report reads
    kept_files = {f"{name}.parquet" for name in tables} | {"results.json"}
    assert set(held[f"results-{row['digest']}"]) == kept_files


@pytest.mark.slow
def test_an_agent_of_a_sweep_chooses_the_id_and_hears_of_finished_runs(stages, monkeypatch):
    """A sweep's server waits for the run whose id the agent has; what is finished is sent to it again."""
    import wandb

    execute(stages("logger=csv"))
    made, original, started = stages("logger=wandb"), wandb.init, []

    def init(*args, **kwargs):
        started.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(wandb, "init", init)
    execute(made)
    assert started == []  # finished: nothing to say to anybody
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcd1234")
    row = execute(made)
    assert len(started) == 1
    assert not {"id", "resume"} & set(started[0])
    text = inspect(made.run.folder)
    assert f"results-{row['digest']}" in text


@pytest.mark.slow
def test_the_logger_changes_no_number(stages, tmp_path):
    one = execute(stages("logger=wandb"))
    other = execute(stages(f"output_dir={tmp_path}/other"))
    assert one["accuracy"] == other["accuracy"]
    assert one["digest"] == other["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["init", "log", "summary", "finish"])
def test_a_failing_wandb_costs_nothing_but_itself(stages, monkeypatch, capsys, where):
    import wandb

    def fail(*_, **__):
        raise OSError("no space\nleft")

    if where == "init":
        monkeypatch.setattr(wandb, "init", fail)
    elif where == "summary":
        monkeypatch.setattr(wandb, "Table", fail)
    else:
        monkeypatch.setattr(wandb.Run, where, fail)
    row = execute(stages("logger=wandb"))
    assert row["test_clients"] > 0
    assert capsys.readouterr().out.count("warning: wandb") == 1
    monkeypatch.undo()
    if wandb.run is not None:
        wandb.finish()


def test_no_connection_falls_back_to_offline(stages, monkeypatch, capsys):
    import wandb

    original, modes = wandb.init, []

    def init(*args, mode, **kwargs):
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("network is unreachable")
        return original(*args, mode=mode, **kwargs)

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(wandb, "init", init)
    execute(stages("logger=wandb", "logger.wandb.mode=online"))
    assert modes == ["online", "offline"]
    assert "no connection" in capsys.readouterr().out


def test_mode_never_asks(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE")
    assert not wandb_logged_in()
    assert wandb_mode("auto") == "disabled"
    assert wandb_mode("online") == "offline"  # no key: it would ask for one
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("online") == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_logged_in()
    assert wandb_mode("auto") == wandb_mode("online") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not wandb_logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_logged_in()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode("auto") == "offline"
    with pytest.raises(ConfigError, match="mode=on: must be one of"):
        wandb_mode("on")


def test_csv_of_a_resumed_training_keeps_both_parts(stages, monkeypatch):
    from iciia_exp.engine.training.modules import MethodModule

    original = MethodModule.training_step

    def die(self, batch, batch_idx):
        if self.trainer.current_epoch == 2:
            raise Killed
        return original(self, batch, batch_idx)

    monkeypatch.setattr(MethodModule, "training_step", die)
    with pytest.raises(Killed):
        execute(stages())
    monkeypatch.setattr(MethodModule, "training_step", original)
    execute(stages())
    parts = [pd.read_csv(f) for f in sorted(stages().run.folder.glob("csv/version_*/metrics.csv"))]
    assert sorted(pd.concat(parts)["epoch"].unique()) == [0, 1, 2]
