"""A training that was stopped at any epoch and repeated equals an uninterrupted one, to the bit."""

import re
import signal
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.optim import lr_scheduler

from iciia_exp.data.batches import FeatureBatches
from iciia_exp.data.clients import Ragged
from iciia_exp.engine.training.checkpoints import AtomicCheckpoints
from iciia_exp.engine.training.data_module import ClientDataModule
from iciia_exp.engine.training.fit import fit
from iciia_exp.engine.training.modules import MethodModule
from iciia_exp.engine.training.trainer import interruptible, make_trainer
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.methods.adapt.iciia import IciiaMethod
from iciia_exp.methods.base import Facts
from iciia_exp.models import grouped
from iciia_exp.recipe import Recipe
from tests.making.damage import DAMAGE
from tests.making.kill import Killed

TRAINER = {"_target_": "lightning.pytorch.Trainer", "_partial_": True, "accelerator": "cpu", "devices": 1}
D, K = 16, 4
SCHEDULERS = {"constant": None, "cosine": lr_scheduler.CosineAnnealingLR, "onecycle": lr_scheduler.OneCycleLR}


@pytest.fixture
def run(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(160, D)).astype(np.float32)
    labels = rng.integers(0, K, 160)
    clients = {
        "train": Ragged.from_rows(np.split(np.arange(80), 8) + [np.empty(0, int)] * 4),
        "val": Ragged.from_rows([np.empty(0, int)] * 8 + np.split(np.arange(80, 160), 4)),
    }

    def make(folder, schedule="cosine", patience=0, epochs=6, lr=0.01, callbacks=(), trainer=()):
        adamw = partial(torch.optim.AdamW, lr=lr, weight_decay=0.01, fused=True)
        recipe = Recipe(adamw, SCHEDULERS[schedule], epochs, 2, clip_norm=1.0)
        callbacks = {"model_checkpoint": ModelCheckpoint(monitor="val/accuracy", mode="max")} | dict(callbacks)
        if patience:
            callbacks["early_stopping"] = EarlyStopping("val/accuracy", mode="max", patience=patience)
        torch.manual_seed(1)
        head = nn.Linear(D, K)
        module = MethodModule(IciiaMethod(Facts.of(head), 1, 2, 4, dropout=0.3), head, recipe, 12)
        data = FeatureBatches(features, labels)
        batches = ClientDataModule(clients, data, 4, batch_size=2, eval_batch_size=2)
        options = {"trainer_config": TRAINER | dict(trainer), "loggers": [], "callbacks": callbacks}
        record = fit(module, batches, seed=3, folder=tmp_path / folder, **options)
        last = torch.load(tmp_path / folder / "last.ckpt", weights_only=True)["state_dict"]
        return module.method.state_dict() | {f"last.{name}": t for name, t in last.items()}, record

    make.features, make.labels = features, labels
    return make


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "cosine", "onecycle"])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_resumed_equals_uninterrupted(run, monkeypatch, schedule, epoch):
    want, record = run("whole", schedule)
    original = MethodModule.training_step

    def die(self, batch, batch_idx):
        if self.trainer.current_epoch == epoch and batch_idx == 3:  # in the middle of an epoch
            raise Killed
        return original(self, batch, batch_idx)

    monkeypatch.setattr(MethodModule, "training_step", die)
    with pytest.raises(Killed):
        run("killed", schedule)
    steps = []

    def count(self, batch, batch_idx):
        steps.append(self.trainer.current_epoch)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(MethodModule, "training_step", count)
    got, resumed = run("killed", schedule)
    assert sorted(set(steps)) == list(range(epoch, 6))  # it went on from the last whole epoch
    for name in want:
        assert torch.equal(got[name], want[name]), name
    for key in ("epochs", "best_epoch", "val_accuracy"):
        assert resumed[key] == record[key]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("last.ckpt", "epoch=*.ckpt") for kind in ("flip", "cut", "empty", "lost")),
        *(("last.ckpt", kind) for kind in ("folder", "another archive")),
    ],
)
def test_a_damaged_checkpoint_is_dropped_with_a_line(run, monkeypatch, tmp_path, caplog, kind, name):
    want, record = run("whole")
    original = MethodModule.training_step

    def die(self, batch, batch_idx):
        if self.trainer.current_epoch == 4:
            raise Killed
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(MethodModule, "training_step", die)
        with pytest.raises(Killed):
            run("killed")
    (path,) = (tmp_path / "killed").glob(name)
    if kind in DAMAGE:
        DAMAGE[kind](path)
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        else:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("a.txt", "text")
    if kind == "lost" and name != "last.ckpt":
        problem = "the best epoch is missing"
    else:
        problem = {"lost": "is missing", "another archive": "is not a checkpoint of"}.get(kind, "is damaged (")
    with caplog.at_level("WARNING"):
        got, resumed = run("killed")
    (said,) = [r.getMessage() for r in caplog.records if "training starts again" in r.getMessage()]
    assert said.startswith(f"{path}: {problem}")
    for key in want:
        assert torch.equal(got[key], want[key]), key
    assert resumed["best_epoch"] == record["best_epoch"]


def test_checkpoints_are_written_in_their_own_folder(run, monkeypatch, tmp_path):
    """A temporary folder that cannot be written, as on a full disk, is not asked; a kill leaves whole files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    run("whole", epochs=2)
    assert sorted(path.suffix for path in (tmp_path / "whole").iterdir()) == [".ckpt", ".ckpt"]

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    before = (tmp_path / "whole" / "last.ckpt").read_bytes()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run("whole", epochs=3)
    assert (tmp_path / "whole" / "last.ckpt").read_bytes() == before
    assert sorted(path.suffix for path in (tmp_path / "whole").iterdir()) == [".ckpt", ".ckpt"]


@pytest.mark.parametrize("patience", [0, 2])
def test_killed_after_the_last_epoch_trains_no_more(run, patience, monkeypatch):
    """Early stopping too: Lightning alone would train one epoch more after resuming."""
    want, record = run("whole", patience=patience, epochs=30 if patience else 4, lr=0.05)
    if patience:
        assert record["epochs"] < 30

    def step(*_):
        raise AssertionError("it trained again")

    monkeypatch.setattr(MethodModule, "training_step", step)
    got, resumed = run("whole", patience=patience, epochs=30 if patience else 4, lr=0.05)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert {k: v for k, v in resumed.items() if k != "seconds"} == {k: v for k, v in record.items() if k != "seconds"}


def test_a_run_that_moved_keeps_its_best_epoch(run, monkeypatch, tmp_path):
    want, record = run("whole", epochs=8)
    original = MethodModule.training_step

    def die(self, batch, batch_idx):
        if self.trainer.current_epoch == 6:
            raise Killed
        return original(self, batch, batch_idx)

    monkeypatch.setattr(MethodModule, "training_step", die)
    with pytest.raises(Killed):
        run("killed", epochs=8)
    monkeypatch.setattr(MethodModule, "training_step", original)
    (tmp_path / "killed").rename(tmp_path / "moved")
    got, resumed = run("moved", epochs=8)
    assert resumed["best_epoch"] == record["best_epoch"]
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_best_epoch_is_kept(run):
    _, record = run("a", epochs=8)
    assert 1 <= record["best_epoch"] <= 8
    assert 0 < record["val_accuracy"] < 1


def test_an_epoch_is_judged_by_its_own_weights(run, monkeypatch):
    monkeypatch.setattr(grouped, "_JOINED_VECTORS", 1)  # a form of the weights that may be kept
    state, record = run("a", epochs=8, lr=0.05)
    assert record["best_epoch"] > 1
    method = IciiaMethod(Facts.of(nn.Linear(D, K)), 1, 2, 4)
    method.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("last.")})
    with torch.no_grad():
        logits_CSK = method.eval()(torch.from_numpy(run.features[80:].reshape(-1, 4, D)))
    correct_M = logits_CSK.argmax(-1).flatten().numpy() == run.labels[80:]
    assert correct_M.mean() == pytest.approx(record["val_accuracy"])


def test_seed_zero_is_a_seed(run):
    assert torch.equal(run("a")[0]["model.classifier.weight"], run("b")[0]["model.classifier.weight"])


def test_checkpoints_hold_tensors_and_plain_values(run, tmp_path):
    run("a", epochs=2)
    paths = sorted((tmp_path / "a").glob("*.ckpt"))
    assert len(paths) == 2
    for path in paths:
        state = torch.load(path, weights_only=True)
        assert not any("head" in k for k in state["state_dict"])


class Keeps(pl.Callback):
    """A callback with a state."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return {"state": self.state}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            Path("a"),
            "the state of Keeps has pathlib.PosixPath, which cannot be loaded without executing stored code",
        ),
        (np.ones(3), "the state of Keeps has numpy"),
        (lambda: 3, "the state of Keeps has an object that cannot be stored (Can't pickle"),
    ],
)
def test_a_state_that_could_not_be_loaded_is_said_at_the_first_epoch(run, state, message):
    with pytest.raises(UserError, match=re.escape(f"callbacks: {message}")):
        run("x", callbacks={"keeps": Keeps(state)})


def test_where_nothing_is_loaded_at_the_end_such_a_state_is_a_warning(tmp_path, caplog):
    write = AtomicCheckpoints().save_checkpoint
    for name in ("a", "b"):
        write({"callbacks": {"Keeps": {"state": Path("a")}}}, tmp_path / name)
        assert (tmp_path / name).is_file()
    assert caplog.text.count("if the training is interrupted, it starts again") == 1


class Raises(pl.Callback):
    """A callback with an error of its own."""

    def on_train_start(self, trainer, pl_module):
        raise RuntimeError("my loader: give `devices` to Loader")


def test_errors_of_others_stay_theirs(run):
    with pytest.raises(RuntimeError, match="my loader"):
        run("x", callbacks={"raises": Raises()})


@pytest.mark.parametrize(
    ("callbacks", "trainer", "message"),
    [
        (
            {"stop": EarlyStopping("val/acuracy")},
            {},
            "callbacks.stop.monitor=val/acuracy: is not logged; valid: train/",
        ),
        ({"model_checkpoint": ModelCheckpoint(monitor="x")}, {}, "callbacks.model_checkpoint.monitor=x: is not logged"),
        ({}, {"val_check_interval": 99}, "trainer.val_check_interval=99: `val_check_interval` (99) must be less than"),
    ],
)
def test_what_does_not_fit_the_training_names_its_key(run, callbacks, trainer, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        run("x", callbacks=callbacks, trainer=trainer)


def test_bad_trainer_arguments_name_their_key():
    with pytest.raises(UserError, match=r"trainer\.acelerator: no such key; did you mean trainer\.accelerator"):
        make_trainer(TRAINER | {"acelerator": "cpu"})
    with pytest.raises(ConfigError, match=r"trainer\.precision=8"):
        make_trainer(TRAINER | {"precision": "8"})
    for key, value in {"callbacks": [], "logger": True, "gradient_clip_val": 1.0, "fast_dev_run": True}.items():
        with pytest.raises(ConfigError, match=rf"trainer\.{key}={re.escape(str(value))}: cannot be used: \w+"):
            make_trainer(TRAINER | {key: value})
    with pytest.raises(ConfigError, match=r"trainer\.strategy=fsdp: cannot be used; one of auto, ddp"):
        make_trainer(TRAINER | {"strategy": "fsdp"})
    with pytest.raises(ConfigError, match=r"trainer\._target_=builtins\.dict: must be Lightning's Trainer"):
        make_trainer({"_target_": "builtins.dict"})
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"trainer\.accelerator=gpu"):
            make_trainer(TRAINER | {"accelerator": "gpu"})


@pytest.fixture
def interruptible_process():
    """As in a terminal: a process that was started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


SIGNALS = pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)], ids=["SIGTERM", "Ctrl-C"]
)


@pytest.mark.usefixtures("interruptible_process")
@SIGNALS
def test_a_signal_ends_training_at_once_and_it_continues(run, monkeypatch, number, raised):
    """Lightning would end the process on Ctrl-C; after SIGTERM, at the end of the batch and with status 0."""
    want, _ = run("whole")
    original = MethodModule.training_step

    def ask(self, batch, batch_idx):
        if self.trainer.current_epoch == 2:
            signal.raise_signal(number)
            pytest.fail("the training went on")
        return original(self, batch, batch_idx)

    before = signal.getsignal(number)
    assert number != signal.SIGTERM or before is signal.SIG_DFL
    monkeypatch.setattr(MethodModule, "training_step", ask)
    with pytest.raises(raised) as ended:
        run("stopped")
    if raised is SystemExit:
        assert ended.value.code == 143
    assert signal.getsignal(number) == before
    monkeypatch.setattr(MethodModule, "training_step", original)
    got, _ = run("stopped")
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.usefixtures("interruptible_process")
@SIGNALS
def test_processes_that_a_trainer_started_are_ended(number, raised):
    """Else this process waits at its end for them, and they go on."""
    killed = []
    strategy = SimpleNamespace(launcher=SimpleNamespace(kill=killed.append))
    with pytest.raises(raised), interruptible(SimpleNamespace(strategy=strategy, interrupted=True)):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise SystemExit(1) from None  # as Lightning does
    assert killed == [signal.SIGKILL]
