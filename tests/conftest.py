"""Shared fixtures: nothing outside a test's own folder is read or written, and nothing reaches a network."""

import copy
import functools
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported, as the command line does
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

_entry_points = importlib.metadata.entry_points


@functools.cache
def _of_lightning(group):
    return _entry_points(group=group)


def entry_points(**given):
    """Look for Lightning's plug-ins once, and not for every Trainer."""
    group = given.get("group", "")
    return _of_lightning(group) if group.startswith("lightning.") else _entry_points(**given)


importlib.metadata.entry_points = entry_points  # before Lightning imports it

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def own_environment(tmp_path, monkeypatch):
    """Every test has its own cache, output and working folder, and no wandb login."""
    monkeypatch.setenv("ICIIA_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ICIIA_EXP_OUTPUT", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setenv("ICIIA_EXP_PID", "0")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-own"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def spawn():
    """Start processes as `subprocess.Popen` does; whichever still runs when the test ends is killed."""
    started = []

    def popen(*arguments, **options):
        started.append(subprocess.Popen(*arguments, **options))
        return started[-1]

    yield popen
    for process in started:
        process.kill()
        process.wait()
        for stream in filter(None, (process.stdout, process.stderr)):
            stream.close()


@pytest.fixture
def command(spawn):
    """Start the command line in a process of its own."""
    run = [sys.executable, "-m", "iciia_exp"]
    return lambda *overrides: spawn([*run, *overrides], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@functools.cache
def _by_hydra(*overrides, hydra=False):
    """Compose the configuration with Hydra, which takes a quarter of a second."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from iciia_exp.config.paths import CONF_DIR

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=hydra)


@functools.cache
def _composed(*overrides, hydra=False):
    """Compose the configuration; choices of groups once, and other values set in a copy, as Hydra does last."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from iciia_exp.config.paths import CONF_DIR

    parsed = [] if hydra else OverridesParser.create().parse_overrides(list(overrides))
    by_hydra = [
        o for o in parsed if (CONF_DIR / o.key_or_group).is_dir() or o.is_sweep_override() or o.is_hydra_override()
    ]
    values = [o for o in parsed if o not in by_hydra]
    set_later = {o.input_line for o in values}
    config = copy.deepcopy(_by_hydra(*(o for o in overrides if o not in set_later), hydra=hydra))
    ConfigLoaderImpl._apply_overrides_to_config(values, config)
    OmegaConf.set_readonly(config, True)
    return config


@pytest.fixture
def compose():
    """Compose the configuration with overrides, in this process."""
    return _composed


@pytest.fixture
def few_passes(monkeypatch):
    """Let the perceptrons of `client_profile` and `iciia_stream` pass over their images four times, not a hundred."""
    monkeypatch.setattr("iciia_exp.models.perceptron._MOST_PASSES", 4)


@pytest.fixture
def stages(compose, few_passes):
    """Make the stages of an experiment on the smallest useful setting: seconds become a tenth of a second."""
    return _stages_of(compose, *SMALL)


def _stages_of(compose, *setting):
    from iciia_exp.config.experiment import Experiment
    from iciia_exp.engine.stages import Stages

    return lambda *overrides: Stages(Experiment.from_config(compose(*setting, *overrides)))


@pytest.fixture
def with_tokens(compose, few_passes):
    """Make the stages of such an experiment with a backbone that gives tokens."""
    small = [override for override in SMALL if not override.startswith("backbone.model.")]
    return _stages_of(compose, "backbone=small_vit", "backbone.model.dim=16", "backbone.model.depth=2", *small)


@pytest.fixture
def undrawn(monkeypatch):
    """Write empty pictures in place of plots, whose drawing takes longer than the rest of a small evaluation."""
    from PIL import Image

    from iciia_exp.artifacts import atomic_write
    from iciia_exp.engine.evaluation import evaluate

    def save(*args):
        path = args[-1]
        with atomic_write(path, "wb") as file:
            Image.new("L", (1, 1)).save(file, "PNG")
        return path

    of_runs = ("accuracy_vs_history", "accuracy_vs_overhead", "accuracy_vs_rounds", "gain_per_client")
    for name in (*of_runs, "draw_examples", "draw_routes", "quality_vs_share", "reliability_diagram"):
        monkeypatch.setattr(evaluate, name, save)


@pytest.fixture
def small():
    """Return the overrides of that smallest setting, for the command line."""
    return SMALL


@pytest.fixture(scope="session")
def reference():
    """Return the folder with the published method's test vectors and tables, or skip."""
    folder = SHARED / "reference"
    if not folder.is_dir():
        pytest.skip("the reference vectors and tables of the published method are not on this machine")
    return folder


#: A real but tiny main job.
SMALL = (
    "logger=csv",
    "trainer=cpu",
    "backbone.model.dim=32",
    "backbone.model.width=4",
    "backbone.recipe.epochs=2",
    "dataset.sizes={backbone: 100, train: 100, val: 60, test: 100}",
    "partition.deals=1",
    "training.recipe.epochs=3",
    "evaluation.history_orders=2",
    "optimizer.lr=0.003",
)
