"""Inputs: what the makers of an experiment's artifacts read, of its configuration, its dataset and other artifacts."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from iciia_exp.config.build import build
from iciia_exp.config.check import target_of
from iciia_exp.config.experiment import Experiment
from iciia_exp.config.science import trainer_science, weights_digest
from iciia_exp.data.backbone_split import reserve_for_backbone
from iciia_exp.data.clients import Clients
from iciia_exp.data.dataset import MissingFiles, dense_labels
from iciia_exp.data.store import FeatureStore
from iciia_exp.engine.dataset_facts import DatasetFacts
from iciia_exp.engine.graph import Artifact
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.methods.base import Facts
from iciia_exp.models.backbones.base import Backbone
from iciia_exp.serving.run import Run

__all__ = ["Inputs"]

log = logging.getLogger(__name__)


class Inputs(ABC):
    """What makers read. Training and evaluation read the feature store: until it is there, the dataset's files.

    Args:
        experiment: the checked configuration; errors that need the dataset's sizes to be seen show here.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.facts = DatasetFacts(experiment)
        self.method_config = self._canonical_method()

    # ---- artifacts

    @property
    @abstractmethod
    def backbone(self) -> Artifact | None:
        """The network, where it is trained here (``backbone.train: all``)."""

    @property
    @abstractmethod
    def features(self) -> Artifact:
        """The features of the dataset under the network."""

    @property
    @abstractmethod
    def head(self) -> Artifact | None:
        """The classifier, where it is fitted on the features (``backbone.train: head``)."""

    @property
    @abstractmethod
    def run(self) -> Artifact:
        """The trained method."""

    @property
    @abstractmethod
    def evaluation(self) -> Artifact:
        """The results of a run; it lies in the run's folder."""

    @property
    def base(self) -> Artifact:
        """Features and classifier together: what every method starts from."""
        return self.head or self.features

    # ---- dataset and clients

    @cached_property
    def num_classes(self) -> int:
        """K of the dataset."""
        return len(self.facts.class_names)

    @cached_property
    def dim(self) -> int:
        """D, before any feature exists."""
        spec, more = self.experiment.backbone, self.facts.backbone_arguments
        if (given := spec.dim or more.get("dim")) is not None:
            return given
        return self.experiment.named(lambda: spec.fresh(self.num_classes, **more), "backbone").dim

    @cached_property
    def table(self) -> pd.DataFrame:
        """The dataset's table, with the images that only the backbone learns from set aside.

        It is the store's where there is one, else the dataset's own.
        """
        e = self.experiment
        if self.features.finished:
            table = FeatureStore.open(self.features.folder).table
        else:
            dataset = e.dataset
            table = e.named(lambda: dataset.table, "dataset")
        return e.named(lambda: reserve_for_backbone(table, e.backbone.reserve), "backbone")

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels of all images: int64 [M], or uint8 [M, K] of a multi-label task."""
        return dense_labels(self.table["label"], self.experiment.dataset_class.task, self.num_classes)

    @cached_property
    def clients(self) -> Clients:
        """The dataset's images, assigned to clients."""
        e, table = self.experiment, self.table  # not inside the call: their errors name other keys
        return e.named(lambda: e.partition.assign(table, self.num_classes), "partition")

    @cached_property
    def backbone_rows(self) -> np.ndarray:
        """Numbers of the images that a backbone or its classifier trained here learns from.

        Those set aside for it, else the clients' train images; never a val or test image.
        """
        reserved = np.flatnonzero(self.table["split"].to_numpy() == "backbone")
        return reserved if len(reserved) else np.unique(self.clients.train.values)

    def new_backbone(self) -> Backbone:
        """Build the backbone with the weights that it starts from."""
        e, names, more = self.experiment, self.facts.class_names, self.facts.backbone_arguments
        return e.named(lambda: e.backbone.initial(names, **more), "backbone")

    def open_store(self) -> FeatureStore:
        """Open the features; bad images are an error where the configuration says so."""
        store = FeatureStore.open(self.features.folder)
        bad = store.manifest.get("bad_images")
        if bad and self.experiment.extraction.on_bad_image == "error":
            what, count = f"{bad[0]['what']}: could not be read ({bad[0]['problem']})", f"one of {len(bad)} such images"
            hint = f"repair them and delete {store.path}, or leave them out with features.on_bad_image=skip"
            raise UserError(f"{what}, {count}; {hint}" if len(bad) > 1 else f"{what}; {hint}")
        return store

    def readable_clients(self, store: FeatureStore) -> Clients:
        """Return the clients without the images that could not be read."""
        return self.clients.without(store.bad) if store.bad.any() else self.clients

    def load_run(self, folder: Path) -> Run:
        """Load the run; what the configuration names may be loaded, be it a plug-in or not."""
        e = self.experiment
        network = target_of(e.config["backbone"]["model"], "backbone.model")
        return Run.load(folder, plugins=[e.method_class, network], cache_dir=e.cache_dir)  # type: ignore[list-item]

    @property
    def image(self) -> Any:
        """Gives an image of the dataset by number; None, said in a line, where its files are not there."""
        if isinstance(self.experiment.dataset_or_missing, MissingFiles):
            log.warning("examples without pictures: the dataset's files are not there")
            return None
        return self.experiment.dataset.__getitem__

    @cached_property
    def tracker(self) -> Any:
        """The loggers of the run, opened when they are first used."""
        from iciia_exp.engine.tracking import Tracker

        e = self.experiment
        return Tracker(
            e.tracking,
            self.run.folder,
            run_id=self.run.digest,
            name=self.run.folder.name,
            group=e.name,
            tags=[e.dataset_class.name, e.backbone.name, e.method_class.name],
            config={**e.config, "method": self.method_config},
        )

    @cached_property
    def trainer_science(self) -> dict[str, Any]:
        """Arguments of the trainer that change a number."""
        return trainer_science(self.experiment.config["trainer"])

    @cached_property
    def weights_digest(self) -> str | None:
        """Digest of the file of weights that the backbone starts from; a large file is read once."""
        return weights_digest(self.experiment.backbone)

    def _canonical_method(self) -> dict[str, Any]:
        e, method = self.experiment, self.experiment.method_class
        values = {k: v for k, v in e.config["method"].items() if k != "_target_"}
        dim = self.dim  # not inside the call below: its errors are the backbone's
        canonical = e.named(lambda: method.canonical(values, dim), "method")
        if e.dataset_class.task not in method.tasks:
            problem = f"knows {' and '.join(method.tasks)} tasks; this dataset's is {e.dataset_class.task}"
            raise ConfigError("method", method.name, problem)
        config = {"_target_": e.config["method"]["_target_"], **canonical}
        facts = Facts(e.dataset_class.task, nn.Linear(dim, self.num_classes), tuple(self.facts.class_names))
        with torch.random.fork_rng(devices=[]):  # built once to see that it can be, before hours of work
            build(config, "method", facts=facts)
        return config
