"""Every YAML of every group binds to the signature of its target; every experiment composes and says what it means."""

import inspect

import pytest
import yaml
from hydra.utils import get_object
from omegaconf import Container, OmegaConf

from iciia_exp.config.check import check_keys, parameters_of
from iciia_exp.config.experiment import GROUPS, TOP_LEVEL, Experiment
from iciia_exp.config.paths import CONF_DIR
from iciia_exp.errors import UserError
from tests.making.config import methods, targets

FILES = sorted(CONF_DIR.rglob("*.yaml"))
GROUP_FILES = [f for f in FILES if f.parent.name in GROUPS]
EXPERIMENTS = [f for f in FILES if f.parent.name == "experiment"]
SWEEPS = [f for f in FILES if f.parent.name == "sweep"]

#: Arguments that the engine provides.
RUNTIME = {"facts", "num_classes", "dim", "params", "optimizer", "T_max", "max_lr", "save_dir"}


def named(files):
    return pytest.mark.parametrize("path", files, ids=[str(f.relative_to(CONF_DIR)) for f in files])


def test_every_group_has_options():
    assert {f.parent.name for f in GROUP_FILES} == set(GROUPS)
    other = {"launcher", "network", "search", "wandb", "conf"}
    assert {f.parent.name for f in set(FILES) - {*GROUP_FILES, *EXPERIMENTS, *SWEEPS}} == other


@named(GROUP_FILES)
def test_group_file_binds_to_its_target(path, compose):
    config = compose(f"{path.parent.name}={path.stem}")
    node = OmegaConf.to_container(config[path.parent.name], resolve=False)
    assert list(targets(node)) or path.stem == "none"
    for part in targets(node):
        check_keys(part, path.parent.name)
        parameters = parameters_of(get_object(part["_target_"]))
        given = {k for k in part if not k.startswith("_")}
        required = {n for n, p in parameters.items() if p.default is inspect.Parameter.empty}
        assert required - given <= RUNTIME, f"{part['_target_']} needs {required - given - RUNTIME}"


@named([f for f in GROUP_FILES if f.parent.name == "method"])
def test_the_seed_is_that_of_the_experiment(path):
    """Else three runs with three seeds would draw the same."""
    assert yaml.safe_load(path.read_text()).get("seed", "${seed}") == "${seed}"


@named([f for f in GROUP_FILES if f.parent.name not in ("callbacks", "logger", "optimizer", "scheduler", "trainer")])
def test_a_list_or_dictionary_is_no_number_or_text(path, compose):
    config = compose(f"{path.parent.name}={path.stem}", "data_dir=nowhere")
    for name, value in config[path.parent.name].items():
        if not isinstance(value, Container) or "_target_" in value:
            continue
        for wrong in (5, True):
            plain = OmegaConf.to_container(config)
            plain[path.parent.name][name] = wrong
            with pytest.raises(UserError, match=rf"^{path.parent.name}\.{name}={wrong}: must be a "):
                Experiment.from_config(OmegaConf.create(plain))


#: Groups whose options are presets: values of one setting, where the constructor's default is no method of the tables.
PRESETS = {"backbone", "callbacks", "logger", "optimizer", "scheduler", "trainer"}


def is_default(path):
    """Whether an option is what its constructor builds by itself: all but presets of recipes and client mixes."""
    several = path.parent.name in ("training", "client_mix", "features")
    return path.parent.name not in PRESETS and (not several or path.stem in ("default", "natural"))


@named([path for path in GROUP_FILES if is_default(path)])
def test_the_values_of_a_default_are_the_constructors(path, compose):
    """So that a method built in a notebook is the method of the tables."""
    node = OmegaConf.to_container(compose(f"{path.parent.name}={path.stem}")[path.parent.name], resolve=False)
    parts = {key: value for key, value in node.items() if isinstance(value, dict) and "_partial_" in value}
    parts.pop("network", None)  # a preset
    for part in (node, *parts.values()):
        for key, parameter in parameters_of(get_object(part["_target_"])).items():
            value, default = part.get(key, parameter.default), parameter.default
            interpolated = isinstance(value, str) and value.startswith("${")
            if isinstance(value, dict) and "_partial_" in value:
                value = get_object(value["_target_"])
            if default is inspect.Parameter.empty or interpolated or isinstance(value, dict):
                continue
            assert value == (list(default) if isinstance(default, tuple) else default), key


@named(GROUP_FILES)
def test_group_file_says_what_it_is(path):
    assert path.read_text().startswith("# ")


@named(EXPERIMENTS)
def test_experiment_composes_without_a_stray_key(path, compose):
    """A misspelt key inside an experiment file would otherwise be added silently."""
    node = yaml.safe_load(path.read_text())
    assert path.read_text().startswith("# @package _global_")
    assert node["name"] == path.stem
    plain = OmegaConf.to_container(compose(), resolve=False)
    config = OmegaConf.to_container(compose(f"+experiment={path.stem}"), resolve=False)
    assert set(config) == set(TOP_LEVEL) == set(plain)
    for node in targets(config):
        check_keys(node, "")


@named(SWEEPS)
def test_sweep_runs_over_values_that_compose(path, compose):
    config = compose(f"+sweep={path.stem}", hydra=True)
    assert path.read_text().startswith("# @package _global_")
    assert config.hydra.mode.name == "MULTIRUN"
    swept = {key: str(values).split(",") for key, values in config.hydra.sweeper.params.items()}
    assert any(len(values) > 1 for values in swept.values())
    fixed = [f"{key}={values[0]}" for key, values in swept.items()]
    for key, values in swept.items():
        for value in values:
            job = compose(*[o for o in fixed if o.split("=")[0] != key], f"{key}={value}")
            for node in targets(OmegaConf.to_container(job, resolve=False)):
                check_keys(node, "")


@pytest.mark.parametrize("choice", ["launcher=joblib", "launcher=slurm", "search=optuna"])
def test_launchers_and_search_compose(choice, compose):
    """Hydra checks their keys against the plugins' own schemas."""
    hydra = compose(f"+{choice}", hydra=True).hydra
    assert OmegaConf.to_container(hydra.launcher, resolve=False)["_target_"].startswith("hydra")
    if choice == "search=optuna":
        assert hydra.sweeper.direction == "maximize"
        for key in hydra.sweeper.params:
            assert OmegaConf.select(compose(), key) is not None, key


def test_the_sweep_over_methods_has_them_all(compose):
    """All but those that train a network of their own, whose input is that of one dataset, and routers of prompts."""
    swept = compose("+sweep=methods", hydra=True).hydra.sweeper.params.method.split(",")
    assert sorted(swept) == methods("adapt", "tune")
    assert compose("+experiment=rivals", hydra=True).hydra.sweeper.params.method.split(",") == swept


def test_top_level_keys_are_those_the_engine_knows(compose):
    assert set(compose()) == set(TOP_LEVEL)


def test_conf_is_the_checkout_s_own():
    assert (CONF_DIR / "config.yaml").is_file()
