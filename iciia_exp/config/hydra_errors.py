"""Hydra errors: one line that names the nearest valid key or option."""

import re
import sys
from collections.abc import Iterator

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig

from iciia_exp.config.paths import CONF_DIR
from iciia_exp.errors import UserError, did_you_mean, first_line

__all__ = ["dotted_keys", "explain", "option_names"]


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


def option_names(group: str) -> list[str]:
    """Return the options of a configuration group."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def dotted_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys of a configuration, groups included."""
    for key in map(str, config):
        yield f"{prefix}{key}"
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            yield from dotted_keys(node, f"{prefix}{key}.")


def _groups() -> list[str]:
    return sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir() and any(path.glob("*.yaml")))


def _keys() -> list[str]:
    """Return all dotted keys of the configuration with the options of the command line."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    choices = {}
    for argument in sys.argv[1:]:
        group, _, option = argument.partition("=")
        if option in option_names(group.lstrip("+")) and group.lstrip("+") in _groups():
            choices[group] = argument
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("config", overrides=list(choices.values()))
    return list(dotted_keys(config))


def _did_you_mean(word: str, choices: list[str], listed: str) -> str:
    return did_you_mean(word, choices, f"{listed}: {', '.join(choices)}")


def explain(error: Exception) -> str:
    """Return one line that says what is wrong and what would be right."""
    if isinstance(error, UserError):
        return str(error)
    text = str(error)
    if isinstance(error, MissingConfigException):
        if error.missing_cfg_file is None:
            return first_line(text)
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group in ("hydra/launcher", "hydra/sweeper"):
            return f"{group}={option}: is not installed; pip install 'iciia_exp[sweeps]'"
        options = [o for o in (error.options or option_names(group)) if o]
        if options:
            return f"{group}={option}: no such option; {_did_you_mean(option, options, 'valid')}"
        return f"{group}: no such group; {_did_you_mean(group, _groups(), 'valid')}"
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match.group(1)
        for old, new in _RENAMED.items():
            if f"{key}.".startswith(f"{old}."):
                return f"{key}: no such key; {old} is now {new}"
        if key in _groups():  # a group that is not in the defaults list
            return f"{key}: add a plus sign, +{key}=NAME; valid: {', '.join(option_names(key))}"
        if re.search(r"No match in the defaults list", text):
            return f"{key}: no such key; {_did_you_mean(key, _groups(), 'the groups are')}"
        return f"{key}: no such key; {did_you_mean(key, _keys(), 'see python -m iciia_exp --help')}"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match.group(1)}: several values are a sweep; add -m (or write key=[a,b] for a list)"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not of the form key=value ({first_line(error.message)}); quote special characters"
    if "No trials are completed" in text:
        return "no trial of the search succeeded; see the errors above"
    if isinstance(error, ValueError):
        return f"{first_line(text)}: a group cannot be null; choose one of its options"
    if isinstance(error, ConfigCompositionException) and error.__cause__ is not None:
        return f"{first_line(text)} ({first_line(str(error.__cause__))})"
    return first_line(text)
