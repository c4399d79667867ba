"""Hydra errors: one line that names the nearest valid key or option."""

import functools
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig

from iciia_exp.config.paths import CONF_DIR
from iciia_exp.errors import UserError, did_you_mean, first_line, nearest, printable

__all__ = [
    *("check_choices", "check_hidden", "dotted_keys", "explain", "of_yaml", "option_names", "override_key"),
    "own_folder",
]


#: Groups and keys of earlier releases, and their replacements.
_RENAMED = {
    "training.recipe.lr": "optimizer.lr",
    "training.recipe.weight_decay": "optimizer.weight_decay",
    "training.recipe.momentum": "optimizer.momentum",
    "training.recipe.optimizer": "the group optimizer (optimizer=sgd)",
    "training.recipe.schedule": "the group scheduler (scheduler=onecycle)",
    "training.recipe.patience": "training.patience",
    "logger.mode": "logger.wandb.mode",
    "protocol": "training (recipe, images, shuffle_images) and evaluation (history_..., drawn_clients, cost_images)",
    "retrieval": "part of evaluation (examples, neighbours, pixels)",
}


#: Groups that take several options at once.
_SEVERAL = ("callbacks", "logger", "experiment")


def option_names(group: str, own: Path | None = None) -> list[str]:
    """Return the options of a configuration group, those in a folder of the user's included."""
    return sorted({path.stem for folder in (CONF_DIR, own) if folder for path in (folder / group).glob("*.yaml")})


def own_folder(arguments: Sequence[str]) -> Path | None:
    """Return the folder of ``--config-dir``, if it is among the arguments of a command."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument in ("--config-dir", "-cd"):
            return Path(following)
        if argument.startswith("--config-dir="):
            return Path(argument.partition("=")[2])
    return None


def check_hidden(own: Path) -> None:
    """Raise a `UserError` for an option in a folder of the user's that the package's of the same name hides."""
    for path in sorted(own.glob("*/*.yaml")):
        hidden_by = CONF_DIR / path.relative_to(own)
        if hidden_by.is_file() and hidden_by.read_bytes() != path.read_bytes():
            raise UserError(f"{path}: is hidden by the package's option of this name; give the file another name")


def dotted_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys of a configuration, groups included."""
    for key in map(str, config):
        yield f"{prefix}{key}"
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            yield from dotted_keys(node, f"{prefix}{key}.")


def _groups() -> list[str]:
    return sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir() and any(path.glob("*.yaml")))


def _keys(overrides: Sequence[str]) -> list[str]:
    """Return all dotted keys of the configuration with the options of the overrides."""
    choices = {}
    for argument in overrides:
        group, _, option = argument.partition("=")
        if option in option_names(group.lstrip("+")) and group.lstrip("+") in _groups():
            choices[group] = argument
    return list(_keys_of(*choices.values()))


@functools.cache
def _keys_of(*choices: str) -> tuple[str, ...]:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("config", overrides=list(choices))
    return tuple(dotted_keys(config))


def _did_you_mean(word: str, choices: list[str], listed: str) -> str:
    return did_you_mean(word, choices, f"{listed}: {', '.join(choices)}")


def _nearest_key(key: str, keys: list[str]) -> str:
    """Return the advice for a key that is not there: the nearest one, or a plus sign for a further argument."""
    parent = key.rpartition(".")[0]
    if parent.partition(".")[0] not in keys:
        return did_you_mean(key, keys, "see python -m iciia_exp --help")
    leaves = [
        k for k in keys if not k.rpartition(".")[2].startswith("_") and not any(o.startswith(f"{k}.") for o in keys)
    ]
    beside = [k for k in leaves if k.rpartition(".")[0] == parent]
    if near := nearest(key.rpartition(".")[2], beside):
        return f"did you mean {near}?"
    if parent in keys:
        return f"an argument that is not listed gets a plus sign: +{key}=..."
    return did_you_mean(key, leaves, f"what is not listed gets a plus sign: +{key}=...")


def override_key(override: str) -> str:
    """Return the key that an override sets.

    >>> override_key("++trainer.max_steps=3")
    'trainer.max_steps'
    """
    return override.lstrip("+").partition("=")[0]


def _not_parsed(override: str) -> str:
    """Return the error of an override that Hydra's grammar does not have, with the way to write its value."""
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[+~]*[\w.@/]+", key):
        return f"{override}: not of the form key=value"
    text = value.strip("'\"").replace("\\", "\\\\").replace('"', '\\"')
    right = shlex.quote(f'{key}="{text}"')
    return f"{override}: not of the form key=value; in a value with special characters, quote twice: {right}"


def check_choices(overrides: Sequence[str]) -> None:
    """Raise a `UserError` for a group that is set to something else than names; Hydra raises a TypeError for it."""
    groups = _groups()
    for override in overrides:
        key, equals, written = override.partition("=")
        group = key.lstrip("+").partition("@")[0]
        if not equals or group not in groups or written in option_names(group):
            continue
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException:
            continue  # Hydra says what is wrong
        value = parsed.value()
        chosen = value if isinstance(value, list) else [value]
        if parsed.is_sweep_override():
            continue
        if not all(isinstance(option, str) for option in chosen):
            valid = ", ".join(option_names(group, own_folder(overrides)))
            raise UserError(f"{group}={written}: no such option; valid: {valid}")
        if isinstance(value, list) and group not in _SEVERAL:
            raise UserError(
                f"{group}={written}: takes one option; for a run of each, -m {group}={','.join(map(str, chosen))}"
            )


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """Return one line that says what is wrong and what would be right.

    Args:
        error: of Hydra, of OmegaConf or of the project.
        overrides: of the command.
    """
    return str(error) if isinstance(error, UserError) else printable(_explained(error, overrides), lines=False)


def of_yaml(error: yaml.YAMLError) -> str:
    """Return one line for a file that is no YAML, with its place."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    place = "a file of the configuration" if mark is None else f"{mark.name}:{mark.line + 1}"
    return printable(f"{place}: is not YAML ({problem or first_line(error)})", lines=False)


def _explained(error: Exception, overrides: Sequence[str]) -> str:
    text = str(error)
    if isinstance(error, MissingConfigException):
        if error.missing_cfg_file is None:
            return first_line(text)
        group, _, option = error.missing_cfg_file.rpartition("/")
        if not group:
            return f"--config-name={option}: no such configuration; leave it out (an experiment is +experiment=NAME)"
        if group in ("hydra/launcher", "hydra/sweeper"):
            return f"{group}={option}: is not installed; pip install 'iciia_exp[sweeps]'"
        options = [o for o in (error.options or option_names(group)) if o]
        if options:
            return f"{group}={option}: no such option; {_did_you_mean(option, options, 'valid')}"
        return f"{group}: no such group; {_did_you_mean(group, _groups(), 'valid')}"
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match.group(1)
        if place := re.search(r"In '([^']+)': Could not override '[^']+@", text):
            return f"{place.group(1)}: the first line of its file must be # @package _global_"
        for old, new in _RENAMED.items():
            if f"{key}.".startswith(f"{old}."):
                return f"{key}: no such key; {old} is now {new}"
        if key in _groups():  # a group that is not in the defaults list
            return f"{key}: add a plus sign, +{key}=NAME; valid: {', '.join(option_names(key, own_folder(overrides)))}"
        if re.search(r"No match in the defaults list", text):
            return f"{key}: no such key; {_did_you_mean(key, _groups(), 'the groups are')}"
        varied = any(o.lstrip("+").startswith("search=") for o in overrides)
        if varied and not any(o.lstrip("+~").startswith(f"{key}=") for o in overrides):
            own = "copy conf/search/optuna.yaml to search/NAME.yaml in a folder of yours (--config-dir)"
            return f"{key}: no such key; the search varies it, but this method has none: {own} and change its params"
        return f"{key}: no such key; {_nearest_key(key, _keys(overrides))}"
    if match := re.search(r"Could not append to config. An item is already at '([^']+)'", text):
        return f"+{match.group(1)}: is there already; leave the plus sign out: {match.group(1)}=..."
    if match := re.search(r"Could not delete from config. '([^']+)' does not exist", text):
        key, keys = match.group(1), _keys(overrides)
        if key in keys:  # Hydra takes null for nothing
            return f"~{key}: is null already; leave it out"
        return f"~{key}: no such key; {did_you_mean(key, keys, 'see python -m iciia_exp --help')}"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match.group(1)}: several values are a sweep; add -m (or write key=[a,b] for a list)"
    if isinstance(error, OverrideParseException):
        return _not_parsed(error.override)
    if match := re.search(r"Error resolving interpolation '([^']+)'", text):
        blamed = [override for override in overrides if match.group(1) in override]
        return f"{blamed[0] if blamed else match.group(1)}: cannot be resolved; the groups are: {', '.join(_groups())}"
    if "No trials are completed" in text:
        return "no trial of the search succeeded; see the errors above"
    if isinstance(error, ConfigCompositionException) and error.__cause__ is not None:
        return f"{first_line(text)} ({first_line(str(error.__cause__))})"
    return first_line(text)
