"""From a composed configuration to objects and to the names of artifacts: the single place that instantiates.

A group's keys are the arguments of its ``_target_``; unknown ones are refused with the nearest valid name. Everything
that can change a number, and nothing else, goes into the digests that name backbones, features and runs.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iciia_exp.artifacts import resolve_cache_dir
from iciia_exp.config.hydra_errors import dotted_keys
from iciia_exp.data.backbone_split import reserve_for_backbone
from iciia_exp.data.client_mix import ClientMix
from iciia_exp.data.clients import Clients
from iciia_exp.data.dataset import ImageDataset, dense_labels
from iciia_exp.data.partitions import Partition
from iciia_exp.digest import digest, file_digest
from iciia_exp.errors import ConfigError, UserError, check_choice, check_int, first_line, nearest
from iciia_exp.machine import process_rank
from iciia_exp.methods.base import Method
from iciia_exp.models.backbones.base import Backbone, BackboneSpec

__all__ = ["STAGES", "Plan", "build", "check_keys", "identity", "parameters_of", "science"]

STAGES = ("all", "backbone", "features", "train", "evaluate")

GROUPS = (
    *("dataset", "backbone", "features", "partition", "method", "client_mix", "protocol", "retrieval", "trainer"),
    "logger",
)
TOP_LEVEL = (*GROUPS, "name", "seed", "num_layers", "heads", "groups", "data_dir", "stage", "output_dir", "cache_dir")

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


def identity(target: Any) -> str:
    """Return the stable name of a target: its ``name`` where it has one, else its own; never its module's.

    So a class can move without renaming what it made.
    """
    name = getattr(target, "name", None)
    return name if isinstance(name, str) else target.__name__


def science(node: Any) -> Any:
    """Return a configuration without the keys that change no number (``cosmetic`` of its target).

    A target counts by its `identity`.
    """
    if isinstance(node, list):
        return [science(v) for v in node]
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        return {k: science(v) for k, v in node.items()}
    target = get_object(node["_target_"])
    cosmetic = getattr(target, "cosmetic", frozenset())
    values = {k: science(v) for k, v in node.items() if k not in cosmetic and not k.startswith("_")}
    return {"_target_": identity(target), **values}


class Plan:
    """A checked configuration: the objects it describes, built on demand, and where their artifacts lie.

    Making a plan computes nothing and writes nothing; every error in the configuration shows here or when an object
    is first asked for, before the work that needs it.
    """

    def __init__(self, config: DictConfig) -> None:
        if process_rank() > 0:  # of several processes with this command, the first speaks
            logging.getLogger("iciia_exp").setLevel(logging.ERROR)
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
        self.dataset: ImageDataset = self._build("dataset")
        self.backbone_spec: BackboneSpec = self._build("backbone")
        self.partition: Partition = self._build("partition")
        self.extraction = self._build("features")
        self.protocol = self._build("protocol")
        self.client_mix: ClientMix = self._build("client_mix")
        self.retrieval = self._build("retrieval")
        self.tracking = self._build("logger")
        self.method_config = self._canonical_method()

    # ---- objects

    @cached_property
    def method_class(self) -> type[Method]:
        """The method's class."""
        return get_object(self.config["method"]["_target_"])

    def _build(self, group: str) -> Any:
        return self._named(lambda: build(self.config[group], group))

    def _named(self, function: Callable[[], Any], group: str | None = None) -> Any:
        """Call ``function``; errors name the key that the user types (``data_dir`` for ``dataset.root``)."""
        try:
            return function() if group is None else _call(group, function)
        except ConfigError as error:
            if error.key in self._aliases:
                raise ConfigError(self._aliases[error.key], error.value, error.problem) from error
            raise

    @cached_property
    def table(self) -> pd.DataFrame:
        """The dataset's table, with the images that only the backbone learns from set aside."""
        table = self._named(lambda: self.dataset.table, "dataset")
        return self._named(lambda: reserve_for_backbone(table, self.backbone_spec.reserve), "backbone")

    @cached_property
    def num_classes(self) -> int:
        """K of the dataset."""
        return self._named(lambda: self.dataset.num_classes, "dataset")

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels of all images: int64 [M], or uint8 [M, K] of a multi-label task."""
        return dense_labels(self.table["label"], self.dataset.task, self.num_classes)

    @cached_property
    def clients(self) -> Clients:
        """The dataset's images, assigned to clients."""
        return self._named(lambda: self.partition.assign(self.table, self.num_classes), "partition")

    @cached_property
    def backbone_rows(self) -> np.ndarray:
        """Numbers of the images that a backbone or its classifier trained here learns from.

        Those set aside for it, else the clients' train images; never a selection or test image.
        """
        reserved = np.flatnonzero(self.table["split"].to_numpy() == "backbone")
        return reserved if len(reserved) else np.unique(self.clients.train.values)

    def make_backbone(self) -> Backbone:
        """Build the backbone with the weights it starts from."""
        names, more = self.dataset.class_names, self.dataset.backbone_arguments()
        return self._named(lambda: self.backbone_spec.initial(names, **more), "backbone")

    @cached_property
    def dim(self) -> int:
        """D, before any feature exists."""
        if self.backbone_spec.dim is not None:
            return self.backbone_spec.dim
        more = self._named(self.dataset.backbone_arguments, "dataset")
        return (
            more.get("dim") or self._named(lambda: self.backbone_spec.fresh(self.num_classes, **more), "backbone").dim
        )

    def _canonical_method(self) -> dict[str, Any]:
        check_keys(self.config["method"], "method")
        config = {k: v for k, v in self.config["method"].items() if k != "_target_"}
        dim = self.dim  # not inside the call below: its errors are the backbone's
        canonical = self._named(lambda: self.method_class.canonical(config, dim), "method")
        if self.dataset.task not in self.method_class.tasks:
            problem = f"knows {' and '.join(self.method_class.tasks)} tasks; this dataset's is {self.dataset.task}"
            raise ConfigError("method", self.method_class.name, problem)
        return {"_target_": self.config["method"]["_target_"], **canonical}

    # ---- digests and places

    @cached_property
    def _trainer_science(self) -> dict[str, Any]:
        return {k: v for k, v in self.config["trainer"].items() if k not in _TRAINER_COSMETIC and not k.startswith("_")}

    @cached_property
    def _dataset_science(self) -> Any:
        """What the dataset is: its settings, and what its files say."""
        return [science(self.config["dataset"]), self._named(self.dataset.fingerprint, "dataset")]

    @cached_property
    def _teacher(self) -> Any:
        """What decides which images a backbone trained here learns from."""
        own = self.backbone_spec.reserve or self._named(lambda: self.dataset.has_backbone_images, "dataset")
        return [self._dataset_science, self.backbone_spec.reserve, None if own else science(self.config["partition"])]

    @property
    def _known_classes(self) -> str | None:
        """The classes that the starting weights know: the name of a list, or the digest of a file of names."""
        classes = self.backbone_spec.classes
        if classes is None or not (path := Path(classes).expanduser()).is_file():
            return classes
        return file_digest(path)

    @cached_property
    def weights_digest(self) -> str | None:
        """Digest of the file of weights that the backbone starts from, if it starts from one."""
        if self.backbone_spec.weights is None:
            return None
        path = Path(self.backbone_spec.weights).expanduser()
        if not path.is_file():
            raise ConfigError("backbone.weights", path, "no such file; give a .safetensors, .pt or .pth file")
        return file_digest(path)

    @cached_property
    def backbone_digest(self) -> str:
        """Names the network that gives the features: its weights, and how they are trained here if they are."""
        spec, backbone = self.backbone_spec, science(self.config["backbone"])
        parts: dict[str, Any] = {"format": FORMAT, "model": backbone["model"], "pretrained": spec.pretrained}
        if self.weights_digest is not None:
            parts["weights"] = self.weights_digest
        if spec.train == "all":
            if spec.started:
                parts["classes"] = self._known_classes  # rows of the classifier that training starts from
            parts |= {"teacher": self._teacher, "trainer": self._trainer_science, "seed": spec.seed}
            parts["recipe"] = backbone["recipe"]
        return digest(parts)

    @cached_property
    def features_digest(self) -> str:
        """Names the features of the dataset under the backbone."""
        spec, extraction = self.backbone_spec, science(self.config["features"])
        precision = extraction.pop("precision", None) or self._trainer_science.get("precision")
        # which rows of the weights' classifier the dataset keeps
        classes = self._known_classes if spec.train == "none" else None
        parts = [self.backbone_digest, self._dataset_science, extraction, precision, classes, spec.train == "head"]
        return digest(parts)

    @cached_property
    def head_digest(self) -> str:
        """Names the classifier that is fitted on the features (``train: head``)."""
        return digest([self.features_digest, self._teacher, self.backbone_spec.seed, "out of fold"])

    @property
    def base_digest(self) -> str:
        """Names features and classifier together: what every method starts from."""
        return self.head_digest if self.backbone_spec.train == "head" else self.features_digest

    @cached_property
    def run_digest(self) -> str:
        """Names the run. Of a method without training, neither recipe nor seed count."""
        protocol = science(self.config["protocol"])
        parts = {
            "format": FORMAT,
            "base": self.base_digest,
            "reserve": self.backbone_spec.reserve,
            "partition": science(self.config["partition"]),
            "method": science(self.method_config),
            "images": protocol["images"],
            "history": {key: value for key, value in protocol.items() if key.startswith(("history_", "kinds_"))},
        }
        if self.client_mix.unseen_kinds:  # what is read without training is read from the known kinds too
            parts["unseen_kinds"] = self.client_mix.unseen_kinds
        if self.method_class.trainable:
            parts |= {"protocol": protocol, "seed": self.seed, "trainer": self._trainer_science}
            parts["client_mix"] = None if self.client_mix.plain else science(self.config["client_mix"])
        return digest(parts)

    def _shared_dir(self, kind: str, digest_: str) -> Path:
        return self.cache_dir / kind / f"{self.backbone_spec.name}-{type(self.dataset).name}-{digest_}"

    @property
    def backbone_dir(self) -> Path:
        """Folder of what is trained here of the backbone: all of it, or its classifier."""
        head = self.backbone_spec.train == "head"
        return self._shared_dir("backbones", self.head_digest if head else self.backbone_digest)

    @property
    def features_dir(self) -> Path:
        """Folder of the feature store."""
        return self._shared_dir("features", self.features_digest)

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self.output_dir / self.name / f"{self.method_class.name}-{self.run_digest}"
