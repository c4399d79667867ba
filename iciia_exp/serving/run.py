"""A finished run, rebuilt from its directory alone.

    config.yaml           the whole configuration, resolved
    run.json              what rebuilds the method: class, arguments, D, K, chunk length
    partition.parquet     which images belong to which client
    weights.safetensors   the trained method and the backbone's classifier
    training.json         epochs, best epoch, seconds
    results.json          one flat row (written last: a run without it is unfinished)
    clients.parquet       one row per test client
    history.parquet       and by images seen before; kinds.parquet: of clients unlike the partition's
    retrieval.parquet     examples of targets, with the images that count most
    csv/, plots/, wandb/  metrics by epoch, PNG, offline wandb run

Legend: C clients, S images of a client, D features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from iciia_exp import tasks
from iciia_exp.artifacts import atomic_write, read_json, write_json
from iciia_exp.data.clients import Clients
from iciia_exp.data.store import FeatureStore
from iciia_exp.errors import UserError, first_line
from iciia_exp.methods.base import Method
from iciia_exp.models.backbones.base import Backbone, BackboneSpec
from iciia_exp.results.tables import read_table
from iciia_exp.seeding import derive_seed

__all__ = ["Run", "save_method"]

FORMAT = 1


def save_method(
    folder: Path,
    method: Method,
    head: nn.Linear,
    config: dict[str, Any],
    features: Path,
    images: int,
    facts: dict[str, Any],
) -> None:
    """Write ``run.json`` and ``weights.safetensors``: all that `Run.load` needs.

    ``facts`` are the task and the names of the classes, and for `Run.load_backbone` where the backbone is.
    """
    from safetensors.torch import save

    tensors = {f"method.{name}": t for name, t in method.state_dict().items()}
    tensors |= {f"head.{name}": t for name, t in head.state_dict().items()}
    write_json(
        folder / "run.json",
        {
            "format": FORMAT,
            "method": config,
            "dim": head.in_features,
            "num_classes": head.out_features,
            "images": images,
            "features": str(features),
            **facts,
        },
    )
    with atomic_write(folder / "weights.safetensors", "wb") as file:
        file.write(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))


@dataclass(frozen=True)
class Run:
    """A trained method with its results.

    >>> run = Run.load("outputs/digits/iciia-0123456789ab")  # doctest: +SKIP
    >>> run.predict(features_of_one_client)                  # doctest: +SKIP
    """

    path: Path
    #: The trained method, in evaluation mode on the CPU.
    method: Method
    #: The backbone's frozen classifier.
    head: nn.Linear
    #: S, images of a chunk in training.
    images: int
    info: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Rebuild the method from a run directory; a `UserError` says what is missing."""
        from safetensors.torch import load_file

        path = Path(path)
        if not path.is_dir():
            raise UserError(f"{path}: no such run directory")
        for name in ("run.json", "weights.safetensors"):
            if not (path / name).is_file():
                raise UserError(f"{path}: not a trained run ({name} is missing); repeat its command to finish it")
        info = read_json(path / "run.json")
        if info.get("format") != FORMAT:
            raise UserError(f"{path}/run.json: format {info.get('format')}, this version reads {FORMAT}")
        try:
            tensors = load_file(path / "weights.safetensors")
        except Exception as error:
            raise UserError(f"{path}/weights.safetensors: cannot be read ({error})") from error
        head = nn.Linear(info["dim"], info["num_classes"])
        method = instantiate(info["method"], head=head, _convert_="all")
        for prefix, module in (("head.", head), ("method.", method)):
            part = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            try:
                module.load_state_dict(part)
            except RuntimeError as error:
                problem = "its weights do not fit this version's method; repeat its command into another output_dir"
                raise UserError(f"{path}/weights.safetensors: {problem} ({first_line(error)})") from error
        method.eval().requires_grad_(False)
        return cls(path, method, head.requires_grad_(False), info["images"], info)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of `predict`'s last axis."""
        return self.info["class_names"]

    @cached_property
    def results(self) -> dict[str, Any]:
        """The flat row of ``results.json``."""
        if not (self.path / "results.json").is_file():
            raise UserError(f"{self.path}: trained but not evaluated; repeat its command")
        return read_json(self.path / "results.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The whole configuration of the run."""
        import yaml

        return yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))

    @cached_property
    def clients(self) -> pd.DataFrame:
        """One row per test client: images, classes, hits and log-loss sums of backbone and method."""
        return pd.read_parquet(self.path / "clients.parquet")

    @cached_property
    def retrieval(self) -> pd.DataFrame:
        """Examples of targets and the images of their client that count most (`iciia_exp.engine.evaluation.attribution`)."""
        table = read_table(self.path / "retrieval.parquet")
        return pd.DataFrame() if table is None else table

    @cached_property
    def partition(self) -> Clients:
        """Which images belong to which client."""
        return Clients.load(self.path / "partition.parquet")

    @cached_property
    def features(self) -> FeatureStore:
        """The features the run was trained on, if they are still in the cache."""
        return FeatureStore.open(Path(self.info["features"]))

    def load_backbone(self) -> Backbone:
        """Rebuild the network that made the features, for images: ``features(transform(image)[None])``.

        Its weights come from where the run's came from: by name, from a file, or from the cache if it was trained here.
        """
        from iciia_exp.config.build import build

        spec: BackboneSpec = build(self.config["backbone"], "backbone")
        if self.info.get("backbone_arguments"):
            raise UserError(f"{self.path}: its features were made elsewhere; there is no backbone to load")
        torch.manual_seed(derive_seed("backbone", 0))  # as when the features were made
        backbone = spec.initial(self.class_names)
        if spec.train == "all":
            from safetensors.torch import load_file

            weights = Path(self.info["backbone"]) / "weights.safetensors"
            if not weights.is_file():
                raise UserError(f"{weights}: is not there any more; repeat the run's command with stage=backbone")
            backbone.load_state_dict(load_file(weights))
        return backbone.eval().requires_grad_(False)

    @torch.inference_mode()
    def predict(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return probabilities for the images of one client [S, D] or of several [C, S, D], over `class_names`.

        Of a multi-label task every attribute has its own. All images of a client see each other.
        ``mask`` [C, S] is True where an image is real.
        """
        if features.ndim not in (2, 3) or features.shape[-1] != self.head.in_features or not features.numel():
            raise ValueError(
                f"features are [S, {self.head.in_features}] or [C, S, {self.head.in_features}], "
                f"got {list(features.shape)}"
            )
        x_CSD = features.float() if features.ndim == 3 else features.float()[None]
        probabilities = tasks.probabilities(self.method(x_CSD, mask), self.info["task"])
        return probabilities if features.ndim == 3 else probabilities[0]
