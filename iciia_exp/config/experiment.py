"""Experiment: a checked configuration as typed objects. Building one computes and writes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iciia_exp.artifacts import resolve_cache_dir
from iciia_exp.config.build import build, with_path
from iciia_exp.config.check import check_keys, check_nodes, class_of, flatten, of_library, target_of
from iciia_exp.config.hydra_errors import dotted_keys, override_key
from iciia_exp.config.settings import Evaluation, Extraction, Training
from iciia_exp.config.trainer import check_trainer
from iciia_exp.data.client_mix import ClientMix
from iciia_exp.data.dataset import ImageDataset, MissingFiles
from iciia_exp.data.partitions import Partition
from iciia_exp.errors import ConfigError, UserError, check_choice, check_int, did_you_mean, first_line
from iciia_exp.methods.base import Method
from iciia_exp.models.backbones.base import BackboneSpec

__all__ = ["GROUPS", "STAGES", "TOP_LEVEL", "Experiment"]

STAGES = ("all", "check", "backbone", "features", "train", "evaluate")

GROUPS = (
    *("dataset", "backbone", "features", "partition", "method", "client_mix", "optimizer", "scheduler", "callbacks"),
    *("training", "evaluation", "trainer", "logger"),
)
TOP_LEVEL = (*GROUPS, "name", "seed", "num_layers", "heads", "groups", "data_dir", "stage", "output_dir", "cache_dir")

_CLASSES: dict[str, type] = {
    "dataset": ImageDataset,
    "backbone": BackboneSpec,
    "features": Extraction,
    "partition": Partition,
    "client_mix": ClientMix,
    "training": Training,
    "evaluation": Evaluation,
}

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Experiment:
    """The objects of a configuration; wrong keys and values raise when it is built.

    Trainer, callbacks and loggers are not among them: importing Lightning takes seconds, and a finished run does not
    need it. The engine builds and checks them before the first computation.
    """

    #: The whole configuration, resolved.
    config: dict[str, Any]
    #: The overrides that it was composed with, as on the command line.
    overrides: tuple[str, ...]
    name: str
    seed: int
    stage: str
    output_dir: Path
    cache_dir: Path
    #: The dataset, or the error of its missing files, without which later stages run.
    dataset_or_missing: ImageDataset | MissingFiles
    dataset_class: type[ImageDataset]
    backbone: BackboneSpec
    extraction: Extraction
    partition: Partition
    client_mix: ClientMix
    training: Training
    evaluation: Evaluation
    method_class: type[Method]
    #: Keys of groups that repeat a top-level key, and that key, which errors name (``dataset.root``: ``data_dir``).
    aliases: dict[str, str]

    @classmethod
    def from_config(cls, config: DictConfig, overrides: Sequence[str] = ()) -> Experiment:
        """Check a composed configuration and build its objects; raises `UserError`.

        Args:
            config: the composed configuration.
            overrides: that it was composed with; they are only recorded.
        """
        _check_top_level(config)
        try:
            plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            if match := re.search(r"Error trying to access ([\w.]+): node `([\w.]+)` is not a container", str(error)):
                inner, key = match.groups()
                raise ConfigError(key, OmegaConf.select(config, key), f"holds several settings; set {inner}") from error
            key = f"{error.full_key}: " if error.full_key else ""
            raise UserError(key + first_line(error)) from error
        check_nodes(plain)
        given = set(map(override_key, overrides))  # the user's own are no aliases
        aliases = {
            key: match.group(1)
            for key, value in flatten(OmegaConf.to_container(config, resolve=False)).items()  # type: ignore[arg-type]
            if isinstance(value, str) and (match := re.fullmatch(r"\$\{(\w+)\}", value)) and key not in given
        }

        def built(group: str) -> Any:
            node, wanted = plain[group], _CLASSES[group]
            _refuse_partial(node, group)
            made = _named(aliases, lambda: build(node, group))
            if not isinstance(made, wanted):
                target = node.get("_target_")
                raise ConfigError(f"{group}._target_", target, f"must be a class of the package's {wanted.__name__}")
            return made

        def dataset() -> ImageDataset | MissingFiles:
            try:
                return built("dataset")
            except MissingFiles as error:
                return error

        name = str(plain["name"])
        if not re.fullmatch(r"[\w.\-]+", name) or not name.strip("."):
            raise ConfigError("name", name, "is a folder's name: letters, digits, '.', '_' and '-' only")
        for group in ("method", "optimizer", "scheduler"):
            if not isinstance(plain[group], dict):
                raise ConfigError(group, plain[group], "must be one of the group's options")
            if group == "method":
                class_of(plain[group], group, Method, "a method (iciia_exp.methods.base.Method)")  # type: ignore[type-abstract]
            check_keys(plain[group], group)
        _refuse_partial(plain["method"], "method")
        for key in ("output_dir", "cache_dir", "data_dir"):
            given = plain[key]
            if not (isinstance(given, str) and given.strip()) and not (given is None and key != "output_dir"):
                raise ConfigError(key, given, "must be the path of a folder")
        for group in ("callbacks", "logger"):
            _check_nodes(plain[group], group)
        if isinstance(plain["trainer"], dict):
            check_trainer(plain["trainer"])  # of a finished run as well, which builds none
        return cls(
            config=plain,
            overrides=tuple(overrides),
            name=name,
            seed=check_int("seed", plain["seed"], 0),
            stage=check_choice("stage", plain["stage"], STAGES),
            output_dir=Path(plain["output_dir"]).expanduser().resolve(),
            cache_dir=resolve_cache_dir(plain["cache_dir"]),
            dataset_or_missing=dataset(),
            dataset_class=target_of(plain["dataset"], "dataset"),  # type: ignore[arg-type]
            backbone=built("backbone"),
            extraction=built("features"),
            partition=built("partition"),
            client_mix=built("client_mix"),
            training=built("training"),
            evaluation=built("evaluation"),
            method_class=target_of(plain["method"], "method"),  # type: ignore[arg-type]
            aliases=aliases,
        )

    @property
    def dataset(self) -> ImageDataset:
        """The dataset; raises if its files are missing."""
        if isinstance(self.dataset_or_missing, MissingFiles):
            raise self.dataset_or_missing
        return self.dataset_or_missing

    def named(self, function: Callable[[], _Made], group: str) -> _Made:
        """Call ``function``; errors name the key to change (``data_dir`` for ``dataset.root``)."""
        return _named(self.aliases, lambda: with_path(group, function))

    @property
    def images(self) -> int:
        """S, images of a chunk in evaluation."""
        return self.evaluation.images or self.training.images

    @property
    def cost_images(self) -> int:
        """Length of the sequence whose cost is reported."""
        return self.evaluation.cost_images or self.images


def _named(aliases: dict[str, str], function: Callable[[], _Made]) -> _Made:
    try:
        return function()
    except ConfigError as error:
        for key, alias in aliases.items():
            if error.key == key or error.key.startswith(f"{key}."):
                raise error.at(alias + error.key.removeprefix(key)) from error
        raise


def _refuse_partial(node: Any, group: str) -> None:
    if isinstance(node, dict) and node.get("_partial_"):
        raise ConfigError(f"{group}._partial_", True, "cannot be set here")


def _check_nodes(nodes: Any, group: str) -> None:
    """Raise unless a group is a dictionary of nodes, each with a target."""
    if not isinstance(nodes, dict):
        raise ConfigError(group, nodes, f"must hold objects by name; choose one of its options, or {group}=none")
    for name, node in nodes.items():
        if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
            raise ConfigError(f"{group}.{name}", node, f"has no _target_; leave it out with ~{group}.{name}")
        if not of_library(node["_target_"]):
            target_of(node, f"{group}.{name}")


def _check_top_level(config: DictConfig) -> None:
    for key in map(str, config):
        if key == "experiment":
            raise UserError("experiment: its file is empty, or its first line is not # @package _global_")
        if "." in key and key.partition(".")[0] in TOP_LEVEL:
            nested = " {".join(f"{part}:" for part in key.split("."))
            raise UserError(f"{key}: keys are nested in a file, {nested} ...{'}' * key.count('.')}")
        if key not in TOP_LEVEL:
            hint = did_you_mean(key, [k for k in dotted_keys(config) if k != key], f"valid: {', '.join(TOP_LEVEL)}")
            raise UserError(f"{key}: no such key; {hint}")
    for key in TOP_LEVEL:
        if key not in config or (key in GROUPS and config[key] is None):
            raise UserError(f"{key}: is missing; choose one of its options, or give it a value")
