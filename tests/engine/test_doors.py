"""Trainer, callbacks, loggers, optimiser and scheduler of the user's choice: used, or refused with the reason."""

import logging

import pandas as pd
import pytest
import torch
import yaml

from iciia_exp.artifacts import read_json
from iciia_exp.engine.execute import execute
from iciia_exp.engine.jobs import run_experiment
from iciia_exp.engine.terminal import setup_logging
from iciia_exp.errors import ConfigError, UserError
from tests.making.lightning_objects import TOLD

pytestmark = pytest.mark.usefixtures("undrawn")

MINE = "tests.making.lightning_objects."


@pytest.fixture(autouse=True)
def told():
    TOLD.clear()
    setup_logging()


def test_a_callback_of_the_user_s_is_called_in_training_and_test(stages):
    made = stages(f"+callbacks.mine._target_={MINE}Mine")
    assert made.run.digest != stages().run.digest  # it might change a number
    execute(made)
    assert TOLD == [("epoch", 0), ("epoch", 1), ("epoch", 2), ("test", "Trainer")]


def test_callbacks_that_only_observe_change_no_digest(stages):
    observer = "+callbacks.lr._target_=lightning.pytorch.callbacks.LearningRateMonitor"
    assert stages(observer).run.digest == stages().run.digest
    assert stages("training.patience=3").run.digest != stages().run.digest
    assert stages("callbacks=none").run.digest != stages().run.digest
    execute(stages(observer, "stage=backbone"))
    execute(stages(observer, "stage=features"))
    execute(made := stages(observer, "stage=train", "+trainer.log_every_n_steps=1"))
    rates = pd.read_csv(made.run.folder / "csv" / "version_0" / "metrics.csv")
    assert rates["lr-AdamW"].max() == pytest.approx(0.003)


def test_the_weights_of_the_last_epoch_without_callbacks(stages):
    execute(made := stages("callbacks=none"))
    record = read_json(made.run.folder / "training.json")
    assert (record["epochs"], record["best_epoch"]) == (3, None)


def test_another_metric_chooses_the_epoch_and_stops(stages):
    options = ("callbacks.model_checkpoint.monitor=val/log_loss", "callbacks.model_checkpoint.mode=min")
    execute(made := stages(*options, "optimizer.lr=0.3", "training.recipe.epochs=6"))
    record = read_json(made.run.folder / "training.json")
    curve = pd.read_csv(made.run.folder / "csv" / "version_0" / "metrics.csv").dropna(subset=["val/log_loss"])
    best = curve.set_index("epoch")["val/log_loss"].idxmin()
    assert record["best_epoch"] == best + 1
    assert record["val_accuracy"] == pytest.approx(curve.set_index("epoch")["val/accuracy"][best])


def test_a_second_checkpoint_stays(stages):
    keep = "lightning.pytorch.callbacks.ModelCheckpoint"
    execute(made := stages(f"+callbacks.every={{_target_: {keep}, every_n_epochs: 1, save_top_k: -1}}", "stage=all"))
    kept = sorted(path.name for path in made.run.folder.rglob("*.ckpt"))
    assert len(kept) == 3
    state = torch.load(made.run.folder / "every" / kept[0], weights_only=True)
    assert "state_dict" in state


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "+callbacks.mine._target_=builtins.dict",
            "callbacks.mine._target_=builtins.dict: must be a Lightning callback",
        ),
        ("+callbacks.mine._target_=nowhere.Mine", "callbacks.mine._target_=nowhere.Mine: cannot be imported"),
        ("+callbacks.early_stopping.patiense=3", "callbacks.early_stopping.patiense: no such key; did you mean"),
        (
            "+logger.mine._target_=builtins.dict",
            "logger.mine._target_=builtins.dict: must be one of Lightning's loggers",
        ),
        ("+logger.csv.nam=x", "logger.csv.nam: no such key; did you mean logger.csv.name"),
        ("+trainer.callbacks=[]", r"trainer.callbacks=\[\]: cannot be used: callbacks are objects of the group"),
        ("+trainer.fast_dev_run=true", "trainer.fast_dev_run=True: cannot be used: .*trainer=smoke"),
        ("trainer._target_=builtins.dict", "trainer._target_=builtins.dict: must be Lightning's Trainer"),
        ("+trainer.overfit_batches=1", "trainer.overfit_batches=1: cannot be used: .*limit_train_batches"),
        ("+trainer.max_time='00:00:00:02'", "trainer.max_time=.*: cannot be used: .*Timer"),
        ("+trainer.max_steps=3", "trainer.max_steps=3: cannot be used: .*training.recipe.epochs"),
        ("+trainer.max_epochs=0", "trainer.max_epochs=0: must be 1 or more, or -1"),
        ("+trainer.max_epochs=many", "trainer.max_epochs=many: must be 1 or more"),
        ("+trainer.limit_train_batches=0", "trainer.limit_train_batches=0: must be above 0"),
        ("+trainer.limit_val_batches=0", "trainer.limit_val_batches=0: must be above 0"),
        ("+trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0: must be 1 or more"),
        ("trainer.precision=16-true", "trainer.precision=16-true: cannot be used: .*16-mixed"),
        ("trainer.precision=64-true", "trainer.precision=64-true: cannot be used"),
        ("+trainer.max_epoch=3", "trainer.max_epoch: no such key; did you mean trainer.max_epochs"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_any_work(stages, override, message, tmp_path):
    with pytest.raises(UserError, match=f"^{message}"):
        execute(stages(override))
    assert not (tmp_path / "outputs").exists()
    assert not (tmp_path / "cache").exists()


def test_a_limit_of_the_trainer_is_said_and_none_is_the_recipes(stages, capsys):
    row = execute(stages("+trainer.max_epochs=1", "+trainer.profiler=simple"))
    out = capsys.readouterr().out
    assert out.count("training 1 of 2 epochs (trainer.max_epochs)") == 1  # the backbone
    assert out.count("training 1 of 3 epochs (trainer.max_epochs)") == 1
    assert logging.getLogger("lightning.pytorch.profilers.profiler").isEnabledFor(logging.INFO)  # its report
    assert row["epochs"] == 1
    assert execute(stages("+trainer.max_epochs=-1"))["epochs"] == 3


def test_a_trainer_of_the_user_s_is_used(stages):
    made = stages(f"trainer._target_={MINE}MyTrainer", "+trainer.accumulate_grad_batches=2")
    assert made.run.digest != stages("+trainer.accumulate_grad_batches=2").run.digest
    execute(made)
    assert ("trainer", 2) in TOLD


def test_loggers_of_the_user_s_hear_of_curves_and_results(stages):
    made = stages("logger=[csv,tensorboard]", f"+logger.mine._target_={MINE}MyLogger")
    row = execute(made)
    told = [value for kind, value in TOLD if kind == "metrics"]
    assert sum("val/accuracy" in metrics for metrics in told) == 3
    assert told[-1]["test/accuracy"] == row["accuracy"]
    ((_, settings),) = [(kind, value) for kind, value in TOLD if kind == "settings"]
    assert settings["optimizer.lr"] == 0.003
    assert len(list(made.run.folder.glob("tensorboard/version_0/events.out.*"))) >= 1
    assert made.run.digest == stages().run.digest


def test_a_failing_logger_costs_nothing_but_itself(stages, capsys):
    row = execute(stages(f"+logger.mine={{_target_: {MINE}MyLogger, fails: true}}"))
    assert row["test_clients"] > 0
    assert capsys.readouterr().out.count("warning: mine: logging failed (OSError: no space)") == 1


def test_wandb_is_off_unless_this_machine_is_logged_in(stages, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    execute(made := stages("logger=auto"))
    assert not (made.run.folder / "wandb").exists()
    assert list(made.run.folder.glob("csv/version_0/metrics.csv"))


def test_two_wandb_loggers_are_one_too_many(stages):
    again = "+logger.again._target_=lightning.pytorch.loggers.WandbLogger"
    with pytest.raises(ConfigError, match=r"logger\.again=again: logger\.wandb logs to wandb already"):
        execute(stages("logger=wandb", again))


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer._target_=timm.optim.Lamb", "~optimizer.fused"),
        ("scheduler._target_=timm.scheduler.CosineLRScheduler", "+scheduler.warmup_t=1"),
        ("scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau", "+scheduler.patience=0"),
        ("scheduler=step", "scheduler.step_size=1"),
    ],
    ids=["timm's Lamb", "timm's cosine", "plateau", "step"],
)
def test_optimisers_and_schedulers_of_any_library_train(stages, overrides):
    for stage in ("backbone", "features"):
        execute(stages(f"stage={stage}"))
    execute(made := stages(*overrides, "stage=train"))
    assert read_json(made.run.folder / "training.json")["epochs"] == 3
    assert made.run.digest != stages().run.digest


def test_a_run_has_a_log_and_its_overrides(small, capsys):
    run = run_experiment(*small, "groups=4")
    assert yaml.safe_load((run.path / "overrides.yaml").read_text()) == [*small, "groups=4"]
    lines = (run.path / "run.log").read_text().splitlines()
    assert any("INFO train: 3 epochs in" in line for line in lines)
    before = len(lines)
    run_experiment(*small, "groups=4")
    assert len((run.path / "run.log").read_text().splitlines()) == before  # finished before
    with pytest.raises(UserError, match="diverged"):
        run_experiment(*small, "optimizer=sgd", "optimizer.lr=1e12", "training.recipe.clip_norm=0")
    (failed,) = [p for p in run.path.parent.glob("*/run.log") if p.parent != run.path]
    assert "ERROR stopped" in failed.read_text()
    assert "training diverged" in failed.read_text()
