"""Stages: the graph of an experiment's artifacts, from the backbone to the evaluation.

    backbone (where it is trained here) -> features -> head (where it is fitted) -> run
    run -> states (where devices learn) or rounds (where they train together) -> evaluation

Everything that can change a number, and nothing else, goes into the ``science`` of an artifact.
"""

import shutil
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from iciia_exp.config.check import callbacks_science, science
from iciia_exp.config.experiment import Experiment
from iciia_exp.engine import devices, rounds
from iciia_exp.engine.graph import Artifact
from iciia_exp.engine.inputs import Inputs
from iciia_exp.engine.training import train_backbone, train_method
from iciia_exp.engine.training.processes import in_processes
from iciia_exp.errors import UserError
from iciia_exp.machine import process_rank
from iciia_exp.methods.cotrain.base import CoTrained
from iciia_exp.methods.tune.base import Personal
from iciia_exp.results.labels import REPORTED

__all__ = ["Stages"]


class Stages(Inputs):
    """The artifacts of an experiment. Building the graph computes nothing and raises errors of the configuration."""

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self.backbone = self._backbone()
        self.features = self._features()
        self.head = self._head()
        self.run = self._run()
        self.states, self.rounds = self._states(), self._rounds()
        self.evaluation = self._evaluation()

    def _backbone(self) -> Artifact | None:
        """The trained backbone; None unless ``backbone.train: all``."""
        if self.experiment.backbone.train != "all":
            return None
        make = partial(in_processes, self, "backbone", train_backbone.train_backbone)
        return self._shared("backbone", self._network, make, report=train_backbone.report_backbone)

    def _features(self) -> Artifact:
        """The features of the dataset's images."""
        spec, extraction = self.experiment.backbone, science(self.experiment.config["features"])
        parts = {
            "network": None if self.backbone else self._network,
            "dataset": self._dataset,
            "extraction": extraction,
            "precision": extraction.pop("precision", None) or self.trainer_science.get("precision"),
            # rows of the pre-trained classifier for the dataset's classes
            "classes": self.weights_classes if spec.train == "none" else None,
            "fitted head": spec.train == "head",
        }
        if len(self.stored) > 1:  # a store of its own; that of features alone keeps its digest
            parts["arrays"] = sorted(self.stored)
        if self.reads & {"tokens", "levels"}:
            model = science(self.experiment.config["backbone"]["model"])
            parts["gather"] = {k: v for k, v in model.items() if k.startswith("gather_")}
        needs = () if self.backbone is None else (self.backbone,)
        make, report = partial(train_backbone.make_features, self), partial(train_backbone.report_features, self)
        return self._shared("features", parts, make, needs, report)

    def _head(self) -> Artifact | None:
        """The classifier fitted on the features; None unless ``backbone.train: head``."""
        if self.experiment.backbone.train != "head":
            return None
        parts = {"teacher": self._teacher, "seed": self.experiment.backbone.seed, "fitted": "out of fold"}
        make, report = partial(train_backbone.fit_head, self), partial(train_backbone.report_head, self)
        return self._shared("head", parts, make, (self.features,), report)

    def _run(self) -> Artifact:
        """The trained method. Without training by gradients neither recipe nor seed is part of its digest."""
        e, training = self.experiment, self.experiment.training
        unseen_types = e.client_mix.unseen_types
        parts = {
            "reserve": e.backbone.reserve,
            "partition": science(e.config["partition"]),
            "method": science(self.method_config),
            "images": training.images,
            # statistics are read from the seen client types alone; formerly, val clients had unseen types as well
            "unseen_types": [unseen_types, "val"] if unseen_types else 0.0,
        }
        if self.unseen_classes is not None:
            parts["unseen classes"] = self.unseen_classes
        if issubclass(e.method_class, Personal):
            parts["states"] = True  # formerly, such runs kept answers to test images
        if issubclass(e.method_class, CoTrained):
            parts["rounds"] = 2  # formerly, the cloud trained alone without answers, and with FedProx's term
        if e.method_class.trainable:
            parts |= {"trainer": self.trainer_science, "seed": e.seed}
        if "recipe" in self.trained_with:
            parts["recipe"] = science(e.config["training"]["recipe"])
        if "clients" in self.trained_with:
            parts |= {
                "train_images": training.train_images,
                "shuffle_images": training.shuffle_images,
                "client_mix": None if e.client_mix.plain else science(e.config["client_mix"]),
                "callbacks": callbacks_science(e.config["callbacks"]),
            }
        return Artifact(
            "run",
            e.method_class.name,
            parts,
            partial(in_processes, self, "run", train_method.train_method)
            if e.method_class.trainable
            else partial(train_method.train_method, self),
            e.output_dir / e.name,
            (self.base,),
            last="weights.safetensors",
            in_place=True,
            report=train_method.report_run,
        )

    def _states(self) -> Artifact | None:
        """What the clients' devices have learned, in the run's folder; None if they learn nothing."""
        if not issubclass(self.experiment.method_class, Personal):
            return None
        make = partial(devices.personalise, self)
        return Artifact(
            "states",
            "states",
            None,
            make,
            self.run.folder,
            (self.run,),
            in_place=True,
            together=True,
            report=devices.report_devices,
        )

    def _rounds(self) -> Artifact | None:
        """The rounds of cloud and devices, in the run's folder; None if they train nothing together."""
        if not issubclass(self.experiment.method_class, CoTrained):
            return None
        make, root = partial(rounds.cotrain, self), self.run.folder
        report = rounds.report_rounds
        return Artifact("rounds", "rounds", None, make, root, (self.run,), in_place=True, report=report)

    def _evaluation(self) -> Artifact:
        """The results of the run, in the run's folder."""

        def make(folder: Path) -> None:
            from iciia_exp.engine.evaluation.evaluate import evaluate  # late: it imports Lightning and Matplotlib

            evaluate(self, folder)

        e = self.experiment
        values = vars(e.evaluation) | {"images": e.images, "cost_images": e.cost_images}
        values["prefix"] = "every client"  # formerly, those with as many images as the history
        if drawn := e.evaluation.drawn_clients:
            values["drawn_clients"] = [drawn, "distinct"]  # formerly, an image could be drawn twice
        return Artifact(
            "evaluation",
            "evaluation",
            values,
            make,
            self.run.folder,
            (self.states or self.rounds or self.run,),
            last="results.json",
            in_place=True,
            shown={key.removeprefix("evaluation.") for key in REPORTED},
        )

    @cached_property
    def _dataset(self) -> Any:
        """Science of the dataset: its settings and its fingerprint."""
        return [science(self.experiment.config["dataset"]), self.facts.fingerprint]

    @cached_property
    def _teacher(self) -> Any:
        """Science of the images that a backbone trained here learns from."""
        reserve = self.experiment.backbone.reserve
        if self.unseen_classes is not None:
            return [self._dataset, "unseen classes", self.unseen_classes]
        own = reserve or self.facts.has_backbone_images
        return [self._dataset, reserve, None if own else science(self.experiment.config["partition"])]

    @cached_property
    def _network(self) -> dict[str, Any]:
        """Science of the backbone: its initial weights, and its training if it is trained here."""
        spec, config = self.experiment.backbone, science(self.experiment.config["backbone"])
        model = {k: v for k, v in config["model"].items() if not k.startswith("gather_")}  # of the tokens alone
        parts = {"model": model, "pretrained": spec.pretrained, "weights": self.weights_digest}
        if (content := self.backbone_class.content(self.experiment.config["backbone"]["model"])) is not None:
            parts["content"] = content
        if spec.train == "all":
            parts |= {"teacher": self._teacher, "trainer": self.trainer_science, "seed": spec.seed}
            # rows of the initial classifier
            parts |= {"recipe": config["recipe"], "classes": self.weights_classes if spec.started else None}
        return parts

    def _shared(
        self, kind: str, parts: Any, make: Any, needs: tuple[Artifact, ...] = (), report: Any = None
    ) -> Artifact:
        """Return an artifact of the cache."""
        folder = "features" if kind == "features" else "backbones"
        label = f"{self.experiment.backbone.name}-{self.experiment.dataset_class.name}"
        if kind != "head":
            make = partial(self._make_of_files, make)
        return Artifact(kind, label, parts, make, self.experiment.cache_dir / folder, needs, report=report)

    def _make_of_files(self, make: Callable[[Path], None], folder: Path) -> None:
        """Make an artifact of the dataset's and the weights' files; if these have changed meanwhile, nothing is kept.

        Its digest is that of the files before, and it may have been made of others.
        """
        before = self.files
        make(folder)
        if process_rank() > 0:
            return
        try:
            now = Inputs(self.experiment).files
        except UserError as error:  # they are gone
            now = dict.fromkeys(before, str(error))
        except BaseException:  # not compared, so not finished
            (folder / "manifest.json").unlink(missing_ok=True)
            raise
        if lost := [key for key, content in before.items() if now[key] != content]:
            shutil.rmtree(folder)
            spec = self.experiment.backbone
            given = {"backbone.weights": spec.weights, "backbone.classes": spec.classes}
            names = " and ".join(f"{key}={given.get(key, self.experiment.config['data_dir'])}" for key in lost)
            raise UserError(f"{names}: changed while it was read; nothing made of it is kept; repeat the command")
