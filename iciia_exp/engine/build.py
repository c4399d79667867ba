"""From a composed configuration to objects and to the names of artifacts: the single place that instantiates.

A group's keys are the arguments of its ``_target_``; unknown ones are refused with the nearest valid name. Everything
that can change a number, and nothing else, goes into the digests that name backbones, features and runs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iciia_exp.data.clients import Clients
from iciia_exp.data.dataset import ImageDataset
from iciia_exp.data.partitions import Partition
from iciia_exp.digest import digest
from iciia_exp.engine.overrides import dotted_keys
from iciia_exp.engine.paths import resolve_cache_dir
from iciia_exp.errors import ConfigError, UserError, check_choice, check_int, first_line, nearest
from iciia_exp.methods.base import Method
from iciia_exp.models.backbone import Backbone, BackboneSpec

__all__ = ["STAGES", "Plan", "build", "check_keys", "parameters_of", "science"]

STAGES = ("all", "backbone", "features", "train", "evaluate")

GROUPS = ("dataset", "backbone", "features", "partition", "method", "protocol", "trainer", "logger")
TOP_LEVEL = (*GROUPS, "name", "seed", "heads", "groups", "stage", "output_dir", "cache_dir")

#: Bumped when the same configuration would give other numbers than before.
FORMAT = 1

#: Arguments of Lightning's Trainer that change no number; all others count.
_TRAINER_COSMETIC = frozenset(
    {
        *("accelerator", "devices", "num_nodes", "strategy"),
        *("logger", "callbacks", "default_root_dir", "profiler", "log_every_n_steps", "enable_autolog_hparams"),
        *("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "barebones"),
        *("detect_anomaly", "deterministic", "benchmark", "num_sanity_val_steps", "use_distributed_sampler"),
    }
)


def _target(node: dict[str, Any], path: str) -> Callable[..., Any]:
    try:
        return get_object(node["_target_"])
    except Exception as error:
        raise ConfigError(f"{path}._target_", node["_target_"], f"cannot be imported ({error})") from error


def parameters_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the named parameters of a target, ``self`` left out."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {n: p for n, p in inspect.signature(target).parameters.items() if p.kind in kinds}


def check_keys(node: dict[str, Any], path: str) -> None:
    """Refuse keys that the target's signature does not have, here and in nested targets."""
    if "_target_" not in node:
        raise ConfigError(path, node, "has no _target_; choose one of the group's options")
    known = parameters_of(_target(node, path))
    for key, value in node.items():
        if key not in known and key not in ("_target_", "_partial_", "_recursive_", "_convert_"):
            near = nearest(str(key), known)
            hint = f"did you mean {path}.{near}?" if near else f"valid: {', '.join(known)}"
            raise UserError(f"{path}.{key}: no such key; {hint}")
        if isinstance(value, dict) and "_target_" in value:
            check_keys(value, f"{path}.{key}")


def _call(path: str, function: Callable[[], Any]) -> Any:
    """Call a constructor; its `ConfigError` gets the path of its configuration in front of the key."""
    try:
        return function()
    except ConfigError as error:
        raise ConfigError(f"{path}.{error.key}", error.value, error.problem) from error
    except InstantiationException as error:
        cause = error.__cause__
        inner = re.search(r"full_key: (\S+)", str(error))
        where = path if inner is None else f"{path}.{inner.group(1)}"
        if isinstance(cause, ConfigError):
            raise ConfigError(f"{where}.{cause.key}", cause.value, cause.problem) from error
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(f"{where}: {first_line(cause or error)}") from error


def build(node: dict[str, Any], path: str, **runtime: Any) -> Any:
    """Instantiate a group's resolved configuration; ``runtime`` are arguments that the engine provides."""
    check_keys(node, path)
    return _call(path, lambda: instantiate(node, **runtime, _convert_="all"))


def science(node: Any) -> Any:
    """Return a configuration without the keys that change no number (``cosmetic`` of its target)."""
    if isinstance(node, list):
        return [science(v) for v in node]
    if not isinstance(node, dict):
        return node
    cosmetic: frozenset[str] = frozenset()
    if "_target_" in node:
        cosmetic = getattr(get_object(node["_target_"]), "cosmetic", cosmetic)
    return {k: science(v) for k, v in node.items() if k not in cosmetic and k != "_partial_"}


class Plan:
    """A checked configuration: the objects it describes, built on demand, and where their artifacts lie.

    Making a plan computes nothing and writes nothing; every error in the configuration shows here or when an object
    is first asked for, before the work that needs it.
    """

    def __init__(self, config: DictConfig) -> None:
        for key in map(str, config):
            if key not in TOP_LEVEL:
                near = nearest(key, [k for k in dotted_keys(config) if k != key])
                hint = f"did you mean {near}?" if near else f"valid: {', '.join(TOP_LEVEL)}"
                raise UserError(f"{key}: no such key; {hint}")
        for key in TOP_LEVEL:
            if key not in config or (key in GROUPS and config[key] is None):
                raise UserError(f"{key}: is missing; choose one of its options, or give it a value")
        try:
            self.config: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            raise UserError(first_line(error)) from error
        #: keys of groups that only repeat a top-level key, which is then the one to name in errors
        self._aliases = {
            f"{group}.{key}": match.group(1)
            for group in GROUPS
            for key, value in dict(OmegaConf.to_container(config[group], resolve=False)).items()  # type: ignore[arg-type]
            if isinstance(value, str) and (match := re.fullmatch(r"\$\{(\w+)\}", value))
        }
        self.name = str(self.config["name"])
        if not re.fullmatch(r"[\w.\-]+", self.name):
            raise ConfigError("name", self.name, "is a folder's name: letters, digits, '.', '_' and '-' only")
        self.seed = check_int("seed", self.config["seed"], 0)
        self.stage = check_choice("stage", self.config["stage"], STAGES)
        self.output_dir = Path(self.config["output_dir"]).expanduser().resolve()
        self.cache_dir = resolve_cache_dir(self.config["cache_dir"])
        # cheap: constructors check keys and values now, before any work. Not the trainer: Lightning takes seconds to
        # import, and `engine.training.make_trainer` checks it
        self.dataset: ImageDataset = build(self.config["dataset"], "dataset")
        self.backbone_spec: BackboneSpec = build(self.config["backbone"], "backbone")
        self.partition: Partition = build(self.config["partition"], "partition")
        self.extraction = build(self.config["features"], "features")
        self.protocol = build(self.config["protocol"], "protocol")
        self.tracking = build(self.config["logger"], "logger")
        self.method_config = self._canonical_method()

    # ---- objects

    @cached_property
    def method_class(self) -> type[Method]:
        """The method's class."""
        return get_object(self.config["method"]["_target_"])

    def make_backbone(self) -> Backbone:
        """Build the backbone with fresh weights."""
        return _call("backbone.model", lambda: self.backbone_spec.model(num_classes=self.dataset.num_classes))

    def assign_clients(self) -> Clients:
        """Assign the dataset's images to clients."""
        return _call("partition", lambda: self.partition.assign(self.dataset.table, self.dataset.num_classes))

    @cached_property
    def dim(self) -> int:
        """D, before any feature exists."""
        return self.make_backbone().dim

    def _canonical_method(self) -> dict[str, Any]:
        check_keys(self.config["method"], "method")
        config = {k: v for k, v in self.config["method"].items() if k != "_target_"}
        dim = self.dim
        try:
            canonical = self.method_class.canonical(config, dim)
        except ConfigError as error:
            key = f"method.{error.key}"
            raise ConfigError(self._aliases.get(key, key), error.value, error.problem) from error
        return {"_target_": self.config["method"]["_target_"], **canonical}

    # ---- digests and places

    @cached_property
    def _trainer_science(self) -> dict[str, Any]:
        return {k: v for k, v in self.config["trainer"].items() if k not in _TRAINER_COSMETIC and not k.startswith("_")}

    @cached_property
    def backbone_digest(self) -> str:
        """Names the trained backbone."""
        backbone = science(self.config["backbone"])
        backbone.pop("name", None)
        dataset = science(self.config["dataset"])
        return digest({"format": FORMAT, "dataset": dataset, "backbone": backbone, "trainer": self._trainer_science})

    @cached_property
    def features_digest(self) -> str:
        """Names the features of the dataset under the backbone."""
        extraction = science(self.config["features"])
        precision = self._trainer_science.get("precision")
        dataset = science(self.config["dataset"])
        return digest(
            {"backbone": self.backbone_digest, "dataset": dataset, "features": extraction, "precision": precision}
        )

    @cached_property
    def run_digest(self) -> str:
        """Names the run. Of a method without training, neither recipe nor seed count."""
        protocol = science(self.config["protocol"])
        parts = {
            "format": FORMAT,
            "features": self.features_digest,
            "partition": science(self.config["partition"]),
            "method": science(self.method_config),
            "images": protocol["images"],
        }
        if self.method_class.trainable:
            parts |= {"protocol": protocol, "seed": self.seed, "trainer": self._trainer_science}
        return digest(parts)

    @property
    def backbone_dir(self) -> Path:
        """Folder of the trained backbone."""
        dataset = type(self.dataset).name
        return self.cache_dir / "backbones" / f"{self.backbone_spec.name}-{dataset}-{self.backbone_digest}"

    @property
    def features_dir(self) -> Path:
        """Folder of the feature store."""
        dataset = type(self.dataset).name
        return self.cache_dir / "features" / f"{self.backbone_spec.name}-{dataset}-{self.features_digest}"

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self.output_dir / self.name / f"{self.method_class.name}-{self.run_digest}"
