"""Cloud samples: a client's device trains its classifier on labelled samples of other clients too.

The cloud holds the labelled train images of all clients. This is not federated learning: a device gets features and
labels of other clients. In a click task it can train the whole model, on rows of ids of other clients.

Legend: C clients, N samples of other clients, M candidates, D features, K classes.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from iciia_exp.data.batches import ClientBatch, ClientIndex
from iciia_exp.data.clients import Clients
from iciia_exp.data.views import CloudView
from iciia_exp.errors import ConfigError, NotApplicable, UserError, check_choice, check_int
from iciia_exp.ledger import Budget, Line, Link, Sizes
from iciia_exp.methods.base import Ask, Facts, Fit, Record
from iciia_exp.methods.tune.base import Learned
from iciia_exp.methods.tune.classifier import PersonalClassifier, sgd_recipe
from iciia_exp.models.backbones.recommender import ClickModel
from iciia_exp.models.fit_many import Fitted, fit_many
from iciia_exp.models.on_catalog import OnCatalog, is_table
from iciia_exp.models.stacked import Examples
from iciia_exp.tasks import CLICK, SINGLE_LABEL

__all__ = ["CloudSamples"]

#: Numbers of samples that some devices get together, at most, if they are several: 256 MiB.
_NUMBERS = 1 << 26


class CloudSamples(PersonalClassifier):
    """A linear classifier or a click model for every client, trained on samples of other clients as well.

    Args:
        facts: task, sizes, the backbone's classifier and network, where every client starts.
        trains: ``classifier``: the classifier on the features; ``backbone``: all tables and layers of a click model.
        lr: rate of SGD.
        batch_size: images of a step, in the order of the images.
        clip_norm: largest norm of a gradient.
        clip: ``dense``: the norm as PyTorch has it; ``rows``: every row of a table that is read counts by itself, as
            released.
        epochs: passes over samples of other clients.
        own_epochs: passes over the own images, afterwards.
        patience: passes over the own images without a better accuracy on the client's val images before training
            stops; the best is kept. None, or no val images: all of them, and the last is kept.
    """

    trainable = False
    tasks = (SINGLE_LABEL, CLICK)
    asks: ClassVar[frozenset[Ask]] = frozenset({Ask.CLIENT_LABELS, Ask.CLOUD_SAMPLES})

    def __init__(
        self,
        facts: Facts,
        trains: str,
        lr: float,
        batch_size: int,
        clip_norm: float,
        clip: str,
        epochs: int,
        own_epochs: int,
        patience: int | None,
    ) -> None:
        super().__init__(facts, sgd_recipe(lr, epochs, batch_size, clip_norm), patience)
        check_choice("trains", trains, ("classifier", "backbone"))
        self.clip_rows = check_choice("clip", clip, ("dense", "rows")) == "rows"
        self.model: OnCatalog | None = None
        if trains == "backbone":
            network = None if facts.network is None else facts.network()
            if not isinstance(network, ClickModel):
                problem = "is for backbone=recommender; train the classifier, or see method=full_finetune"
                raise ConfigError("trains", trains, problem)
            self.model, self.array, self.shape = network.net, "images", facts.arrays["images"]
            self.reads = self.reads_with({"trains": trains})
        elif self.clip_rows:
            raise ConfigError("clip", clip, "a classifier reads no tables; use clip=dense, or trains=backbone")
        self.own_recipe = sgd_recipe(lr, check_int("own_epochs", own_epochs, 1), batch_size, clip_norm)
        #: Numbers of clients and of their train images, for the budget.
        self.clients: Tensor
        self.samples: Tensor
        for name in ("clients", "samples"):
            self.register_buffer(name, torch.tensor(0))

    @classmethod
    def reads_with(cls, config: Mapping[str, Any]) -> frozenset[str]:
        """Return the features, and the rows of ids for a click model."""
        return frozenset({"features", "images"} if config.get("trains") == "backbone" else {"features"})

    @property
    def net(self) -> nn.Module:
        """The click model, or the classifier."""
        return self.head if self.model is None else self.model

    @property
    def tables(self) -> dict[str, Tensor]:
        """Those of the click model."""
        return {name: p for name, p in self.starting().items() if self.model and is_table(name)}

    @property
    def receives(self) -> bool:
        """Whether devices get samples of other clients."""
        return True

    def check_overlap(self, key: str, way: str) -> None:
        """Raise a `ConfigError` if clients of a click task are compared by items, which a classifier does not read."""
        if way == "overlap" and self.task == CLICK and self.model is None and self.receives:
            other = "nearest" if key == "matching" else "sample"
            raise ConfigError(key, way, f"compares items, which only trains=backbone reads; use {other} or random")

    def check_clients(self, clients: Clients) -> None:
        """Raise a `NotApplicable` where several clients have the same image, which is no sample of another client."""
        images = clients.train.values
        if self.receives and len(np.unique(images)) < len(images):
            problem = "gets samples of other clients, and this partition deals an image to several"
            raise NotApplicable("method", self.name, f"{problem}; use partition.deals=1")

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Count what the cloud holds; nothing is trained: its model is the backbone, or its classifier."""
        self.check_clients(cloud.clients)
        if self.model is not None:
            self.model.load_state_dict(cloud.backbone().net.state_dict())
        self.clients.fill_(int((cloud.clients.train.lengths > 0).sum()))
        self.samples.fill_(len(cloud.clients.train.values))
        self.eval()
        return {}

    @abstractmethod
    def most_held(self, cloud: CloudView, most: int) -> int:
        """Return how many samples are in memory at once for a device with ``most`` train images, at most."""

    @abstractmethod
    def learn_from(self, cloud: CloudView, own: Mapping[str, ClientBatch], link: Link) -> Learned:
        """Learn the states of some devices; arguments as of `personalise`."""

    def personalise(self, own: Mapping[str, ClientBatch], link: Link, cloud: CloudView | None) -> Learned:
        """Train on samples of others and on the own images, some devices at a time."""
        if cloud is None:
            problem = "trains on samples of other clients, and the cloud that holds them is not at hand"
            raise UserError(f"{self.name}: {problem}")
        lengths_C = own["train"].mask_CS.sum(1)
        order = lengths_C.argsort(stable=True, descending=True)
        sizes: list[int] = []
        while (at := sum(sizes)) < len(order):  # of about the same length, for little padding
            numbers = math.prod(self.shape) * self.most_held(cloud, int(lengths_C[order[at]]))
            sizes.append(min(max(1, _NUMBERS // (1 + numbers)), len(order) - at))
        parts = [
            self.learn_from(cloud, {role: batch.take(rows).cut() for role, batch in own.items()}, link)
            for rows in order.split(sizes)
        ]
        place = order.argsort()
        states = {name: torch.cat([part.states[name] for part in parts])[place] for name in parts[0].states}
        place = place.cpu()
        counts = {name: torch.cat([part.counts[name] for part in parts])[place] for name in parts[0].counts}
        return Learned(states, torch.cat([part.epochs_C for part in parts])[place], counts)

    def starts(self, clients: int) -> dict[str, Tensor]:
        """Return the cloud's network for some clients, [C, ...]."""
        return {name: p.expand(clients, *p.shape) for name, p in self.starting().items()}

    def down(self, cloud: CloudView, index_CN: np.ndarray, own: ClientBatch, link: Link) -> Examples:
        """Send some images and their labels, -1 for none, to the devices; return them as received."""
        batch = cloud[ClientIndex(index_CN, own.client_C.cpu().numpy())].moved(own.x_CSD.device)
        sent = self.read(batch)
        x, y_CN = torch.zeros_like(sent), torch.zeros_like(batch.y_CS)
        x[batch.mask_CS] = link.down(self.array, sent[batch.mask_CS], what="training")
        y_CN[batch.mask_CS] = link.down("labels", batch.y_CS[batch.mask_CS], what="training")
        return Examples(x, y_CN, batch.mask_CS)

    def pass_over(self, samples: Examples, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the networks after `epochs` on samples of others, [C, ...] each."""
        none, clip = samples.none(), self.clip_rows
        return fit_many(self.net, samples, none, self.task, self.recipe, starts=states, clip_rows=clip).states

    def finish(self, states: Mapping[str, Tensor], own: Mapping[str, ClientBatch]) -> Fitted:
        """Train on the own images, from the networks so far."""
        train, val, recipe = self.examples(own["train"]), self.examples(own["val"]), self.own_recipe
        return fit_many(self.net, train, val, self.task, recipe, self.patience, states, clip_rows=self.clip_rows)

    def payload(self) -> dict[str, Tensor]:
        """Return nothing: a device starts with the backbone."""
        return {}

    def sample_budget(
        self, sizes: Sizes, *, up: Mapping[str, int], macs: int, cloud_macs: int, judged: bool = False
    ) -> Budget:
        """Return the budget of a device that gets ``sizes.received`` samples.

        Args:
            sizes: of client and request.
            up: bytes that the device sends, by kind.
            macs: of the device, beside training on samples of others and on its own images (`device_budget`).
            cloud_macs: of finding the samples.
            judged: whether val images decide what is accepted.
        """
        served, size = self.device_budget(sizes, macs, judged=judged, sent="features" in up), 4 * math.prod(self.shape)
        received = (
            Line("client_once", "cloud", "training", macs=cloud_macs),
            *(Line("client_once", "device", "training", kind=kind, bytes=size) for kind, size in up.items()),
            Line("client_once", "cloud", "training", kind=self.array, bytes=size * sizes.received),
            Line("client_once", "cloud", "training", kind="labels", bytes=8 * sizes.received),
        )
        return Budget(served.lines + received, served.state_bytes)
