"""Inputs: configuration, dataset and artifacts of an experiment, as training and evaluation read them."""

import logging
import re
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from iciia_exp.config.build import build
from iciia_exp.config.check import callbacks_science, flatten, science, target_of, trainer_science
from iciia_exp.config.experiment import Experiment
from iciia_exp.data.backbone_split import class_numbers, reserve_for_backbone, without_classes
from iciia_exp.data.batches import FeatureBatches
from iciia_exp.data.clients import ROLES, Clients
from iciia_exp.data.dataset import MissingFiles, dense_labels
from iciia_exp.data.images import readable
from iciia_exp.data.readers.files import few
from iciia_exp.data.store import FeatureStore
from iciia_exp.digest import digest, file_digest
from iciia_exp.engine.dataset_facts import DatasetFacts
from iciia_exp.engine.graph import Artifact
from iciia_exp.engine.training.processes import training_processes
from iciia_exp.errors import ConfigError, NotApplicable, UserError
from iciia_exp.methods.base import Facts, Method
from iciia_exp.models.backbones.base import Backbone
from iciia_exp.serving.run import Run

__all__ = ["Inputs"]

log = logging.getLogger(__name__)


class Inputs:
    """What training and evaluation read. Labels and owners come from the feature store once it is there.

    Args:
        experiment: the checked configuration.
    """

    #: Artifacts (`iciia_exp.engine.stages.Stages`): None for a backbone or classifier that is not trained here, and for
    #: states where devices learn nothing, and for rounds where nothing is trained together.
    backbone: Artifact | None
    features: Artifact
    head: Artifact | None
    run: Artifact
    states: Artifact | None
    rounds: Artifact | None
    evaluation: Artifact

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.facts = DatasetFacts(experiment)
        self.method_config = self._canonical_method()

    @property
    def base(self) -> Artifact:
        """Features with their classifier, from which every method starts."""
        return self.head or self.features

    # ---- dataset and clients

    @cached_property
    def num_classes(self) -> int:
        """K of the dataset."""
        return len(self.facts.class_names)

    @cached_property
    def dim(self) -> int:
        """D, known before the features exist."""
        spec, more = self.experiment.backbone, self.facts.backbone_arguments
        if (given := spec.dim or more.get("dim")) is not None:
            return given
        return self.experiment.named(lambda: spec.fresh(self.num_classes, **more), "backbone").dim

    @cached_property
    def table(self) -> pd.DataFrame:
        """The table of store or dataset; images reserved for the backbone are a split of their own."""
        e = self.experiment
        if self.features.finished:
            table = FeatureStore.open(self.features.folder).table
        else:
            dataset = e.dataset
            table = e.named(lambda: dataset.table, "dataset")
        if (unseen := self.unseen_classes) is not None:
            return e.named(lambda: without_classes(table, unseen), "backbone")
        return e.named(lambda: reserve_for_backbone(table, e.backbone.reserve), "backbone")

    @cached_property
    def unseen_classes(self) -> list[int] | None:
        """Numbers of the classes that the backbone does not learn from; None if none are set apart."""
        e, given, names = self.experiment, self.experiment.backbone.unseen_classes, self.facts.class_names
        return None if given is None else e.named(lambda: class_numbers(given, names), "backbone")

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels of all images: int64 [M], or uint8 [M, K] in a multi-label task."""
        return dense_labels(self.table["label"], self.experiment.dataset_class.task, self.num_classes)

    @cached_property
    def clients(self) -> Clients:
        """The partition of the dataset's images."""
        e, table = self.experiment, self.table  # outside the call: its errors name other keys
        return e.named(
            lambda: _checked(e.partition.assign(table.copy(), self.num_classes), e.partition, table), "partition"
        )

    @cached_property
    def backbone_rows(self) -> np.ndarray:
        """Numbers of the backbone's or its classifier's train images: the reserved, else the clients' ones."""
        reserved = np.flatnonzero(self.table["split"].to_numpy() == "backbone")
        return reserved if len(reserved) else np.unique(self.clients.train.values)

    @property
    def reads(self) -> frozenset[str]:
        """Names of the arrays that the method reads: the features, and others beside them."""
        return self.experiment.method_class.reads_with(self.method_config) | {"features"}

    @property
    def stored(self) -> frozenset[str]:
        """Names of the stored arrays: what the method reads, and what the backbone stores for all methods."""
        return self.reads | self.backbone_class.stored_with(self.experiment.config["backbone"]["model"])

    @property
    def backbone_class(self) -> type[Backbone]:
        """Class of the backbone."""
        return target_of(self.experiment.config["backbone"]["model"], "backbone.model")  # type: ignore[return-value]

    @cached_property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored arrays for one image, known before they exist.

        Raises a `ConfigError` if the backbone does not give what the method reads.
        """
        if len(self.reads) == 1:
            return {"features": (self.dim,)}
        if self.features.finished:
            store = FeatureStore.open(self.features.folder)
            return {name: store.array(name).shape[1:] for name in sorted(self.reads)}
        from iciia_exp.engine.training.extract import probes  # late: it imports Lightning

        e, more = self.experiment, self.facts.backbone_arguments
        spec, method = e.backbone, e.method_class.name
        if "logits" in self.reads and spec.train == "head":
            problem = "reads logits, but with backbone.train=head the classifier is fitted after they would be stored"
            raise NotApplicable("method", method, f"{problem}; use backbone.train=all or none")
        backbone = e.named(lambda: spec.fresh(self.num_classes, **more), "backbone").eval()
        _, example = readable(e.dataset, backbone.transform, probes(np.arange(len(e.dataset))))
        try:
            return backbone.output_shapes(example, self.reads)
        except UserError as error:
            problem = f"cannot work with backbone {spec.name}: {error}; choose a backbone that gives what it reads"
            raise NotApplicable("method", method, problem) from error

    def new_backbone(self) -> Backbone:
        """Build the backbone with its initial weights."""
        e, names, more = self.experiment, self.facts.class_names, self.facts.backbone_arguments
        return e.named(lambda: e.backbone.initial(names, **more), "backbone")

    def new_method(self, head: nn.Linear) -> Method:
        """Build the method behind a classifier, with fresh weights."""
        e, names, more = self.experiment, tuple(self.facts.class_names), self.facts.backbone_arguments
        network = None if e.dataset_class.vectors else partial(e.backbone.fresh, self.num_classes, **more)
        facts = Facts(e.dataset_class.task, head, names, self.array_shapes, network)
        return build(self.method_config, "method", facts=facts)

    def untrained_method(self) -> Method:
        """Build the method behind any classifier, which draws no random number of the caller's."""
        with torch.random.fork_rng(devices=[]):
            return self.new_method(nn.Linear(self.dim, self.num_classes))

    def open_store(self) -> FeatureStore:
        """Open the features; with ``features.on_bad_image=error`` unreadable images raise."""
        store = FeatureStore.open(self.features.folder)
        bad = store.manifest.get("bad_images")
        if bad and self.experiment.extraction.on_bad_image == "error":
            names = few(f"{image['what']}: {image['problem']}" for image in bad)
            hint = f"repair them and delete {store.path}, or leave them out with features.on_bad_image=skip"
            raise UserError(f"{len(bad):,} of {store.manifest['images']:,} images could not be read ({names}); {hint}")
        return store

    def batches(self, store: FeatureStore) -> FeatureBatches:
        """Return client batches of the arrays that the method reads."""
        arrays = {name: store.array(name) for name in sorted(self.reads - {"features"})}
        return FeatureBatches(store.array(), self.labels, arrays=arrays)

    def readable_clients(self, store: FeatureStore) -> Clients:
        """Return the clients without the images that could not be read."""
        return self.clients.without(store.bad) if store.bad.any() else self.clients

    @cached_property
    def known_clients(self) -> Clients:
        """The readable clients, of which those of unseen types have no train and val images."""
        return self.experiment.client_mix.known(self.readable_clients(self.open_store()))

    @cached_property
    def cloud_rows(self) -> np.ndarray:
        """Numbers of the images that the backbone alone has learned from, and that could be read."""
        return np.flatnonzero((self.table["split"].to_numpy() == "backbone") & ~self.open_store().bad)

    def load_run(self, folder: Path) -> Run:
        """Load the run; the classes that the configuration names count as plug-ins."""
        e = self.experiment
        network = target_of(e.config["backbone"]["model"], "backbone.model")
        return Run.load(folder, plugins=[e.method_class, network], cache_dir=e.cache_dir)  # type: ignore[list-item]

    @property
    def image(self) -> Any:
        """Function from an image's number to the image; None, with a warning, where the dataset's files are missing."""
        if isinstance(self.experiment.dataset_or_missing, MissingFiles):
            log.warning("examples without pictures: the dataset's files are not there")
            return None
        return self.experiment.dataset.__getitem__

    @cached_property
    def tracker(self) -> Any:
        """The loggers of the run, opened on first use."""
        from iciia_exp.engine.tracking import Tracker

        e = self.experiment
        return Tracker(
            e.config["logger"],
            self.run.folder,
            run_id=self.run.digest,
            name=self.run.folder.name,
            group=e.name,
            tags=[e.dataset_class.name, e.backbone.name, e.method_class.name],
            config={**e.config, "method": self.method_config},
        )

    @cached_property
    def processes(self) -> int:
        """Number of processes that train together, over all machines."""
        return training_processes(self.experiment.config["trainer"])

    @cached_property
    def trainer_science(self) -> dict[str, Any]:
        """Arguments of the trainer that can change a number, and the number of processes if there are several.

        Each process draws other dropout masks.
        """
        science = trainer_science(self.experiment.config["trainer"])
        return science | ({"processes": self.processes} if self.processes > 1 else {})

    @cached_property
    def weights_digest(self) -> str | None:
        """Digest of the file of initial weights, if there is one; the file is read once."""
        if (weights := self.experiment.backbone.weights) is None:
            return None
        path = Path(weights).expanduser()
        if not path.is_file():
            raise ConfigError("backbone.weights", path, "no such file; give a .safetensors, .pt or .pth file")
        return file_digest(path)

    @property
    def files(self) -> dict[str, Any]:
        """Digests of the content of all files that features are made of, by their keys."""
        weights = {"backbone.weights": self.weights_digest, "backbone.classes": self.weights_classes}
        return {"data_dir": self.facts.fingerprint, **weights}

    @cached_property
    def weights_classes(self) -> str | list[str] | None:
        """Classes of the initial weights: the name of a list, the digest of a file of names, or the names."""
        classes = self.experiment.backbone.classes
        if not isinstance(classes, str):
            return None if classes is None else list(classes)
        path = Path(classes).expanduser()
        return file_digest(path) if path.is_file() else classes

    @property
    def trained_with(self) -> frozenset[str]:
        """What of the configuration the training of the method uses (`Method.trained_with`)."""
        method = self.experiment.method_class
        return method.trained_with if method.trainable else frozenset()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting that can change a number, flat, with dotted names.

        They differ between two runs that differ in `Artifact.setting`, and otherwise in seeds only.
        """
        e = self.experiment
        spec = e.backbone
        groups = ("dataset", "backbone", "features", "partition", "evaluation")
        config: dict[str, Any] = {group: science(e.config[group]) for group in groups}
        config["dataset"]["content"] = None if self.facts.fingerprint is None else digest(self.facts.fingerprint)
        weights = {"weights": self.weights_digest, "pretrained": spec.pretrained, "classes": self.weights_classes}
        config["backbone"] |= weights
        del config["backbone"]["name"]  # a label
        if self.unseen_classes is not None:
            config["backbone"]["unseen_classes"] = self.unseen_classes
        config["features"]["precision"] = e.extraction.precision or self.trainer_science.get("precision")
        config["evaluation"] |= {"images": e.images, "cost_images": e.cost_images}
        config["training"] = {"images": e.training.images}
        if spec.train == "all":
            config["backbone"]["trainer"] = self.trainer_science
        if e.method_class.trainable:
            config["trainer"] = self.trainer_science
        training = science(e.config["training"]) | {"train_images": e.training.train_images}
        recipe = training.pop("recipe")
        if "recipe" in self.trained_with:
            config |= {name: recipe.pop(name) for name in ("optimizer", "scheduler")}
            config["training"]["recipe"] = recipe
        if "clients" in self.trained_with:
            config["training"] |= training
            nodes = {name: callbacks_science({name: node}) for name, node in e.config["callbacks"].items()}
            config["callbacks"] = {name: found[0] for name, found in nodes.items() if found}
            if not e.client_mix.plain:
                config["client_mix"] = science(e.config["client_mix"])
        if e.client_mix.unseen_types:
            config.setdefault("client_mix", {"unseen_types": e.client_mix.unseen_types})
        settings = flatten(config | {"method": science(self.method_config)})
        # of these the class is a setting: `optimizer` is SGD
        named = {k: re.sub(r"((?:optimizer|scheduler)|callbacks\.\w+)\._target_$", r"\1", k) for k in settings}
        return {named[k]: v for k, v in settings.items() if not named[k].endswith("_target_")}

    def _canonical_method(self) -> dict[str, Any]:
        e, method = self.experiment, self.experiment.method_class
        values = {k: v for k, v in e.config["method"].items() if k != "_target_"}
        dim = self.dim  # outside the call below: its errors are the backbone's
        canonical = e.named(lambda: method.canonical(values, dim), "method")
        if e.dataset_class.task not in method.tasks:
            problem = f"knows {' and '.join(method.tasks)} tasks; this dataset's is {e.dataset_class.task}"
            raise NotApplicable("method", method.name, problem)
        return {"_target_": e.config["method"]["_target_"], **canonical}


def _checked(clients: Any, partition: Any, table: pd.DataFrame) -> Clients:
    """Return what a partition has assigned; raises a `ConfigError` if it is no partition of the table's images."""
    problem = None
    if not isinstance(clients, Clients):
        problem = f"assign must return Clients, got {type(clients).__name__}"
    elif not pd.Index(clients.ids).is_unique:
        problem = "two clients have the same id"
    elif any(((v < 0) | (v >= len(table))).any() for v in (clients[role].values for role in ROLES)):
        problem = f"images are numbered 0 to {len(table) - 1}, and a client has another number"
    elif not len(clients.test.values):
        problem = "no client has test images"
    if problem is not None:
        raise ConfigError("_target_", type(partition).__name__, problem)
    return clients
