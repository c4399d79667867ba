"""Extraction of features by several processes, how long it will take, and how large the values are."""

import signal
import time

import numpy as np
import pytest
import torch

from iciia_exp.data.store import FeatureWriter
from iciia_exp.engine.execute import execute
from iciia_exp.engine.training import extract
from iciia_exp.engine.training.extract import probes
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.machine import plain_errors
from tests.making.extraction import HEAD, artifacts_in, damage


def test_probes_are_the_first_and_some_of_all():
    assert probes(np.arange(5)).tolist() == [0, 1, 2, 3, 4]
    some = probes(np.arange(10_000) * 2)
    assert some[:8].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert some[-1] == 19_998
    assert len(some) < 80


def test_sigterm_ends_it(folder, monkeypatch):
    """Lightning would take note and go on."""
    original = FeatureWriter.write

    def ask(self, rows, values):
        original(self, rows, values)
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the extraction went on")

    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "write", ask)
        with pytest.raises(SystemExit) as ended:
            execute(folder(*HEAD, "stage=features"))
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    execute(folder(*HEAD, "stage=features"))


# ---- several processes


@pytest.mark.slow
def test_an_error_in_one_of_several_processes_is_one_line(root, folder, capfd):
    damage(root)
    with pytest.raises(UserError, match=r"^\S.* cannot be read \(") as error:
        execute(folder(*HEAD, "stage=features", "features.devices=2", "features.on_bad_image=error"))
    assert len(str(error.value).splitlines()) == 1
    assert capfd.readouterr().err == ""


def test_errors_from_below_are_plain():
    wall = "\n\n-- Process 1 terminated:\nTraceback\niciia_exp.errors.UserError: Caught\niciia_exp.errors.{}: a=1: no\n"
    for kind in ("UserError", "ConfigError"):
        with pytest.raises(UserError, match="^a=1: no$"), plain_errors("devices"):
            raise RuntimeError(wall.format(kind))
    with pytest.raises(RuntimeError, match="^other$"), plain_errors("devices"):
        raise RuntimeError("other")
    with pytest.raises(ConfigError, match="^a=1: no$"), plain_errors("devices"):
        raise ConfigError("a", 1, "no")
    killed = torch.multiprocessing.ProcessExitedException(
        "process 1 terminated with signal SIGKILL", error_index=1, error_pid=1, exit_code=-9
    )
    message = "^features.devices=2: process 1 terminated with signal SIGKILL; "
    with pytest.raises(UserError, match=message), plain_errors("features.devices=2"):
        raise killed


@pytest.mark.parametrize(
    ("overrides", "started", "message"),
    [
        (
            ("features.devices=2",),
            4,
            "features.devices=2: torchrun or SLURM says 4 processes; devices times num_nodes must be",
        ),
        ((), 2, "features.devices=1: torchrun or SLURM says 2 processes"),
        (("features.num_nodes=2",), 1, "features.num_nodes=2: start the same command on each machine with torchrun"),
    ],
)
def test_processes_and_devices_must_agree(folder, monkeypatch, overrides, started, message, tmp_path):
    if started > 1:
        monkeypatch.setenv("WORLD_SIZE", str(started))
        monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=f"^{message}"):
        execute(folder(*overrides))
    assert not artifacts_in(tmp_path / "cache")


def test_more_devices_than_the_machine_has_is_one_line_before_any_work(folder, monkeypatch, tmp_path):
    from lightning.pytorch.accelerators import CUDAAccelerator

    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr("lightning.fabric.accelerators.cuda.num_cuda_devices", lambda: 1)
    with pytest.raises(ConfigError) as error:
        execute(folder("features.devices=3", "trainer=gpu"))
    assert str(error.value).startswith("features.devices=3: ")
    assert "machine only has: [0]" in str(error.value)
    assert "\n" not in str(error.value)
    assert not artifacts_in(tmp_path / "cache")


# ---- how long, how large


def test_the_estimate_leaves_out_the_slow_first_image(folder):
    stages = folder(*HEAD)
    backbone = stages.new_backbone().eval()
    calls = []

    def slow_at_first(images):
        calls.append(len(images))
        time.sleep(0.5 if len(calls) == 1 else 0.0)
        return torch.zeros(len(images), 16)

    backbone.features = slow_at_first
    assert (
        extract._estimate(stages.experiment.dataset, backbone, np.arange(81), 0) < 4.0
    )  # 81 images, an eighth of 0.5 s each: 5 s
    assert calls == [1, 8]


@pytest.mark.parametrize(("accelerator", "asked"), [("cpu", True), ("auto", False), ("gpu", False)])
def test_the_processor_is_not_asked_where_a_gpu_works(folder, monkeypatch, accelerator, asked, tmp_path):
    class Asked(Exception):
        pass

    def raise_it(*_):
        raise Asked

    stages = folder(*HEAD)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extract, "_estimate", raise_it)
    monkeypatch.setattr(extract, "extraction_trainer", lambda *_: 1 / 0)
    config = {**stages.experiment.config["trainer"], "accelerator": accelerator}
    with pytest.raises(Asked if asked else ZeroDivisionError):
        extract.extract(
            stages.experiment.dataset,
            stages.table,
            stages.new_backbone(),
            stages.experiment.extraction,
            tmp_path,
            config,
            {},
            with_head=False,
        )


def test_features_too_large_for_float16_are_seen_in_the_first_batch(folder, monkeypatch):
    writes = []
    original = FeatureWriter.write

    def count(self, rows, values):
        writes.append(rows)
        original(self, rows, {name: array * 1e6 for name, array in values.items()})

    monkeypatch.setattr(FeatureWriter, "write", count)
    with pytest.raises(UserError, match=r"does not fit float16; use features\.dtype=float32"):
        execute(folder(*HEAD, "features.dtype=float16"))
    assert len(writes) == 1
