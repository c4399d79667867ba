"""Run: a trained method with its results, rebuilt from its directory.

    config.yaml           the whole configuration, resolved; overrides.yaml: those of the command; run.log
    run.json              name and arguments of the method, task, classes
    partition.parquet     the images of each client
    weights.safetensors   the trained method and the backbone's classifier (written last)
    training.json         epochs, best epoch, seconds
    rounds-<digest>/      the network after each round, where cloud and devices train it together
    states-<digest>/      states of the clients, where their devices learn (`iciia_exp.data.states`)
    csv/, wandb/          metrics by epoch, offline wandb run
    evaluation-<digest>/  a folder for each evaluation:
      results.json        one flat row (written last)
      clients.parquet     one row per test client
      history.parquet     one row per test client and length of history; drawn_clients.parquet for drawn clients
      attribution.parquet examples of targets with their most influential images
      rounds.parquet      accuracy by round, where cloud and devices train together
      routes.parquet      one row per test prompt of a router, and shares.parquet: quality by share in the cloud;
                          route_examples.parquet: some with both pictures and the tokens that decided
      plots/              PNG

Loading runs no code of the files' choosing (`iciia_exp.config.stored`) and reads nothing outside of the directory and
the cache.

Legend: C clients, S images of a client, D features, K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from iciia_exp.artifacts import load_tensors, read_json, read_parquet, resolve_cache_dir, save_tensors, write_json
from iciia_exp.checksums import verify
from iciia_exp.config.stored import Plugins, imported, restore, store
from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.clients import Clients
from iciia_exp.data.rounds import read_round
from iciia_exp.data.states import ClientStates
from iciia_exp.data.store import FeatureStore
from iciia_exp.digest import digest, file_digest
from iciia_exp.errors import UserError, first_line, nearest
from iciia_exp.methods.adapt.base import Adaptive
from iciia_exp.methods.base import Facts, Method
from iciia_exp.methods.cotrain.base import CoTrained
from iciia_exp.methods.tune.base import Personal
from iciia_exp.models.backbones.base import Backbone, BackboneSpec
from iciia_exp.models.backbones.weights import listed_classes
from iciia_exp.results.tables import read_table
from iciia_exp.seeding import derive_seed
from iciia_exp.serving import hub
from iciia_exp.serving.features import as_arrays, as_features, as_mask, check_answers
from iciia_exp.serving.run_info import FORMAT, checked_info
from iciia_exp.tasks import TASKS

__all__ = ["Run", "save_method"]


def save_method(folder: Path, method: Method, head: nn.Linear, config: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write ``run.json`` and, last, ``weights.safetensors``, the files of `Run.load`.

    Args:
        folder: of the run.
        method, head: the trained method and the backbone's classifier.
        config: the method's configuration.
        facts: further keys of ``run.json``: ``task``, ``class_names``, ``images``, ``features``, ``backbone``, and
            ``arrays``.
    """
    sizes = {"dim": head.in_features, "num_classes": head.out_features}
    write_json(folder / "run.json", {"format": FORMAT, "method": store(config), **sizes, **facts})
    save_tensors(folder / "weights.safetensors", _tensors(method, head))


def _tensors(method: Method, head: nn.Linear) -> dict[str, Tensor]:
    """Return the weights as they are stored."""
    tensors = {f"method.{name}": t for name, t in method.state_dict().items()}
    return tensors | {f"head.{name}": t for name, t in head.state_dict().items()}


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
    #: Contents of ``run.json``.
    info: dict[str, Any]
    #: Folder of an evaluation; None if there is none.
    evaluation: Path | None
    #: Folder of the features and backbones that runs share.
    cache_dir: Path
    plugins: Plugins = ()
    #: Compiled steps of its sessions, by backend and length of history.
    programs: dict[tuple[str, int], Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def load(cls, path: str | Path, plugins: Plugins = (), cache_dir: str | Path | None = None) -> Run:
        """Rebuild the method from a run directory; raises `UserError` if a file is missing or wrong.

        Args:
            path: the run's directory, with its newest evaluation, or the folder of another evaluation in it.
            plugins: classes, modules or names of modules with methods or backbones of your own. Installed plug-ins
                (entry points ``iciia_exp.methods`` and ``iciia_exp.backbones``) need not be named.
            cache_dir: folder of features and backbones; by default ICIIA_EXP_CACHE or the user's cache directory.
        """
        path, plugins = Path(path), imported((plugins,) if isinstance(plugins, str) else plugins)
        if not path.is_dir():
            raise UserError(f"{path}: no such run directory")
        path = path.absolute()  # files are read later, too, from another working directory
        evaluation: Path | None
        if path.name.startswith("evaluation-") and (path.parent / "run.json").is_file():
            path, evaluation = path.parent, path
        else:
            evaluation = _last_finished(path)
        described, weights = path / "run.json", path / "weights.safetensors"
        if not described.is_file() and (path / hub.CONFIG).is_file():  # as `save_pretrained` writes it
            described, weights = path / hub.CONFIG, path / hub.WEIGHTS
            evaluation = path if (path / hub.RESULTS).is_file() else None
        for file in (described, weights):
            if not file.is_file():
                raise UserError(f"{path}: not a trained run ({file.name} is missing); repeat its command to finish it")
        info = checked_info(read_json(described), described)
        tensors = load_tensors(weights)
        shape = list(tensors["head.weight"].shape) if "head.weight" in tensors else None
        if shape != [info["num_classes"], info["dim"]]:  # before anything of that size is allocated
            raise UserError(f"{weights}: its classifier is {shape}, not what {described.name} describes")
        head = nn.Linear(info["dim"], info["num_classes"])
        arrays = {name: tuple(sizes) for name, sizes in info.get("arrays", {}).items()}
        stored = info["backbone"]
        network = None if stored is None else partial(_network, stored, plugins, num_classes=head.out_features)
        facts = Facts(TASKS[info["task"]], head, tuple(info["class_names"]), arrays, network)
        try:
            method = restore(info["method"], Method, plugins, facts=facts)  # type: ignore[type-abstract]
        except UserError as error:
            raise UserError(f"{described}: method: {error}") from error
        for prefix, module in (("head.", head), ("method.", method)):
            part = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            _load_weights(module, part, weights)
        method.eval().requires_grad_(False)
        if isinstance(method, Personal) and (made := _folder_of(path, "states-*/manifest.json")) is not None:
            method.states = ClientStates(made, method.state_shapes, method.tables)
        if isinstance(method, CoTrained) and (made := _folder_of(path, "rounds-*/manifest.json")) is not None:
            method.load(read_round(made, method.rounds)[0])
        place = resolve_cache_dir(str(cache_dir) if cache_dir else os.environ.get("ICIIA_EXP_CACHE"))
        return cls(path, method, head.requires_grad_(False), info["images"], info, evaluation, place, plugins)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, revision: str | None = None, plugins: Plugins = (), **options: Any
    ) -> Run:
        """Load a run that `save_pretrained` or `push_to_hub` has written.

        Args:
            name: path of a folder, or ``user/name`` of the hub.
            revision: branch, tag or commit.
            plugins: as of `load`.
            options: of `huggingface_hub.snapshot_download`: ``token``, ``cache_dir``, ``local_files_only``.
        """
        return cls.load(hub.download(str(name), revision, **options), plugins)

    def save_pretrained(self, folder: str | Path, backbone: Backbone | None = None, license: str | None = None) -> Path:
        """Write the run as a repository (`iciia_exp.serving.hub`): weights, configuration, results, model card."""
        return hub.save_pretrained(self, folder, backbone, license)

    def push_to_hub(
        self, repo_id: str, backbone: Backbone | None = None, license: str | None = None, **options: Any
    ) -> str:
        """Upload the run to the hub and return its address; see `iciia_exp.serving.hub.push_to_hub`."""
        return hub.push_to_hub(self, repo_id, backbone, license, **options)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights of method and classifier, as they are stored."""
        return _tensors(self.method, self.head)

    @cached_property
    def identity(self) -> str:
        """Digest of what it computes with: ``run.json`` and the weights. A repository has that of its run."""
        weights = {
            name: [
                str(t.dtype),
                list(t.shape),
                hashlib.sha256(t.reshape(-1).view(torch.uint8).numpy().data).hexdigest(),
            ]
            for name, t in self.tensors.items()
        }
        return digest([self.info, weights])

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of `predict`'s last axis."""
        return self.info["class_names"]

    def _evaluated(self, name: str) -> Path:
        """Return the path of one of the evaluation's files."""
        if self.evaluation is None:
            raise UserError(f"{self.path}: trained but not evaluated; repeat its command")
        return self.evaluation / name

    @property
    def is_repository(self) -> bool:
        """Whether it is a folder that `save_pretrained` has written, and not the run itself."""
        return (self.path / hub.CONFIG).is_file() and not (self.path / "run.json").is_file()

    @cached_property
    def results(self) -> dict[str, Any]:
        """The flat row of ``results.json``."""
        return read_json(self._evaluated("results.json"))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The whole configuration of the run."""
        import yaml

        path = self.path / "config.yaml"
        verify(path)
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
        if not isinstance(config, dict):
            raise UserError(f"{path}: is not the configuration of a run")
        return config

    @cached_property
    def clients(self) -> pd.DataFrame:
        """One row per test client: images, classes, correct decisions and log-loss sums of backbone and method."""
        self._needs_clients()
        return read_parquet(self._evaluated("clients.parquet"))

    @cached_property
    def attribution(self) -> pd.DataFrame:
        """Examples of targets with the most influential images of their clients."""
        table = read_table(self._evaluated("attribution.parquet"))
        return pd.DataFrame() if table is None else table

    @cached_property
    def partition(self) -> Clients:
        """The images of each client."""
        self._needs_clients()
        return Clients.load(self.path / "partition.parquet")

    def _needs_clients(self) -> None:
        if self.is_repository:
            raise UserError(f"{self.path}: a repository has no clients; they are in the run that it was made from")

    @cached_property
    def features(self) -> FeatureStore:
        """The features that the run was trained on, from the cache."""
        return FeatureStore.open(self.cache_dir / "features" / self.info["features"])

    def load_backbone(self, weights: str | Path | None = None) -> Backbone:
        """Rebuild the network of the features, for images: ``features(transform(image)[None])``.

        Its weights come from the library or, if it was trained here, from the cache.

        Args:
            weights: the file of initial weights, if it was not trained here but loaded from one.
        """
        stored = self.info["backbone"]
        if stored is None:
            raise UserError(f"{self.path}: its features were made elsewhere; there is no backbone to load")
        folder, file, shipped = stored["folder"], stored["weights"], self.path / hub.BACKBONE
        needed = folder is None and file is not None and not shipped.is_file()
        if weights is not None and not needed:
            where = "those of the library" if folder is None else "in the cache"
            where = "in the repository" if shipped.is_file() else where
            raise UserError(f"{weights}: is not needed; the backbone's weights are {where}")
        if needed:
            if weights is None:
                hint = f"load_backbone(weights=...) with the file {file['file']}"
                raise UserError(f"{self.path}: the backbone's weights are in a file of their own; {hint}")
            if not Path(weights).is_file() or file_digest(Path(weights)) != file["digest"]:
                raise UserError(f"{weights}: not the file that the features were made with ({file['file']})")

        network = partial(_network, stored, self.plugins)
        torch.manual_seed(derive_seed("backbone", 0))  # as when the features were made
        classes = stored["classes"]
        try:
            if folder is not None or shipped.is_file():
                backbone = network(num_classes=len(self.class_names))
            else:
                names = listed_classes(classes) if isinstance(classes, str) else classes
                file = None if file is None else str(weights)
                spec = BackboneSpec(stored["name"], network, stored["train"], stored["pretrained"], file, names)
                backbone = spec.initial(self.class_names)
        except UserError as error:
            raise UserError(f"{self.path}/run.json: backbone: {error}") from error
        if shipped.is_file():
            _load_weights(backbone, load_tensors(shipped), shipped)
        elif folder is not None:
            path = self.cache_dir / "backbones" / folder / "weights.safetensors"
            if not path.is_file():
                hint = "repeat the run's command with stage=backbone, or give Run.load its cache_dir"
                if self.is_repository:
                    hint = "the repository was written without its backbone; write it --with-backbone"
                raise UserError(f"{path}: is not there; {hint}")
            _load_weights(backbone, load_tensors(path), path)
        return backbone.eval().requires_grad_(False)

    def client_number(self, client: str) -> int:
        """Return the number of one of the partition's clients; raises a `UserError` that names a similar one."""
        if not isinstance(client, str):
            raise UserError(f"{self.path}: clients have names, texts as in run.partition.ids; got {client!r}")
        found = np.flatnonzero(self.partition.ids == client)
        if not len(found):
            near = nearest(client, self.partition.ids.tolist())
            raise UserError(f"{self.path}: has no client {client}" + (f"; did you mean {near}?" if near else ""))
        return int(found[0])

    @torch.inference_mode()
    def predict(
        self,
        features: Any,
        mask: Any = None,
        clients: str | Iterable[str] | None = None,
        arrays: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Return probabilities over `class_names` for the images of one client, [S, D], or of several, [C, S, D].

        Args:
            features: of the images, numbers as a tensor, array or lists. All images of a client see each other.
            mask: True where an image is real, [C, S]; None where all are.
            clients: name of the client, or names of the C clients, in the partition; read by methods with a state for
                every client.
            arrays: what the method reads beside the features (``method.reads``), by name: ``{"tokens": [S, n, d]}``.
        """
        dim = self.head.in_features
        x = as_features(features, "predict", shape := f"[S, {dim}] or [C, S, {dim}]")
        if x.ndim not in (2, 3) or x.shape[-1] != dim or not x.numel():
            raise UserError(f"predict: features are {shape}, got {list(x.shape)}")
        x_CSD = x if x.ndim == 3 else x[None]
        mask = None if mask is None else as_mask(mask, x_CSD)
        real = x_CSD if mask is None else x_CSD[mask]
        if not real.isfinite().all():
            raise UserError("predict: features are not finite numbers")
        more = as_arrays(arrays or {}, self.method, self.info.get("arrays", {}), x_CSD)
        if isinstance(self.method, Adaptive):
            logits_CSK = self.method(x_CSD, mask)
        else:
            names = [clients] if isinstance(clients, str) else [] if clients is None else list(clients)
            if isinstance(self.method, Personal) and len(names) != len(x_CSD):
                problem = f"has a state for every client; {len(x_CSD)} clients and {len(names)} names"
                raise UserError(f"{self.method.name}: {problem}: give clients=, as in run.partition.ids")
            numbers_C = torch.tensor([self.client_number(name) for name in names], dtype=torch.int64)
            mask_CS = torch.ones(x_CSD.shape[:2], dtype=torch.bool) if mask is None else mask
            y_CS = torch.zeros(x_CSD.shape[:2], dtype=torch.int64)
            logits_CSK = self.method.logits(ClientBatch(x_CSD, y_CS, mask_CS, numbers_C, arrays=more))
        probabilities = self.method.task.probabilities(logits_CSK)
        check_answers("predict", probabilities if mask is None else probabilities[mask])
        return probabilities if x.ndim == 3 else probabilities[0]


def _network(stored: Mapping[str, Any], plugins: Plugins, **arguments: Any) -> Backbone:
    """Build the network that ``backbone`` of ``run.json`` describes, with fresh weights."""
    more = {**stored.get("arguments", {}), **arguments}
    return restore(stored["model"], Backbone, plugins, **more)  # type: ignore[type-abstract]


def _last_finished(path: Path) -> Path | None:
    """Return the folder of a run's newest evaluation, by what it says itself: a copy has other times."""
    found = []
    for file in sorted(path.glob("evaluation-*/results.json")):
        finished = ""  # of a damaged one, which is an error when it is read; there may be others
        with contextlib.suppress(UserError):
            finished = str(read_json(file).get("finished"))
        found.append((finished, file.stat().st_mtime, file.parent))
    return max(found)[-1] if found else None


def _folder_of(path: Path, pattern: str) -> Path | None:
    """Return the folder of the file that a pattern finds; a run has one such folder at most."""
    return next((file.parent for file in path.glob(pattern)), None)


def _load_weights(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(tensors)
    except (RuntimeError, TypeError) as error:
        problem = "its weights do not fit what run.json describes; repeat its command into another output_dir"
        raise UserError(f"{path}: {problem} ({first_line(error)})") from error
