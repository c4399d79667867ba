"""Method: the interface of every way for cloud and device to work together.

Legend: C clients, S images of a client, D features, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import ConfigError, within
from iciia_exp.ledger import Budget, Sizes
from iciia_exp.named import Named
from iciia_exp.recipe import Recipe
from iciia_exp.tasks import QUALITY, SINGLE_LABEL, TASKS, Task

__all__ = [
    *("Ask", "Facts", "Fit", "Method", "Part", "Record", "copy_of", "make_part", "resize_on_load", "without_seed"),
]

_Made = TypeVar("_Made")

#: What learning leaves in ``training.json``.
Record = dict[str, Any]


class Fit(Protocol):
    """Trains modules by gradients on what the cloud may read; the one door for all of them."""

    def __call__(
        self,
        module: nn.Module,
        rows: np.ndarray | None = None,
        recipe: Recipe | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> Record:
        """Train a module and leave it in evaluation mode, without gradients; return the record of the training.

        Args:
            module: a method, trained by its ``training_loss`` on batches of the clients that the configuration says;
                or, with ``rows``, a network trained by its ``loss(x_BD, y)`` on single images. If it has ``reads``,
                names of arrays, they are further arguments of its loss.
            rows: numbers of the images, of train or val.
            recipe: how the network is trained; by default as the configuration says. With ``rows`` the last epoch is
                kept, and the configuration's callbacks are not used.
            arrays: further arrays of these images, [len(rows), ...], by the names in the network's ``reads``.
        """


class Ask(Enum):
    """What a method must know of a client beside its images; such a method serves the partition's clients alone."""

    CLIENT_LABELS = "labels of the client's own train images"
    CLOUD_SAMPLES = "labelled train images of other clients, which the cloud holds and sends"
    TEST_LABELS = "labels of the images it is tested on: an oracle, shown apart and never ranked"


class Facts:
    """What a method's constructor is told, once. (Not a dataclass: Hydra would make a dictionary of one.)

    Args:
        task: single-label or multi-label.
        head: the backbone's frozen classifier, K x D.
        class_names: names of the K classes; may be empty.
        arrays: shape of each array that the method reads beside the features, for one image, by name.
        network: builds the backbone, with fresh weights; None if only its features are known.
    """

    def __init__(
        self,
        task: Task,
        head: nn.Linear,
        class_names: tuple[str, ...] = (),
        arrays: Mapping[str, tuple[int, ...]] | None = None,
        network: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.task, self.head, self.class_names, self.network = task, head, class_names, network
        self.num_classes, self.dim = head.out_features, head.in_features
        #: Shapes of the stored arrays for one image, by name: ``{"features": (D,), "tokens": (n, d)}``.
        self.arrays: Mapping[str, tuple[int, ...]] = {**(arrays or {}), "features": (self.dim,)}

    @classmethod
    def of(
        cls,
        head: nn.Linear,
        task: str = SINGLE_LABEL,
        arrays: Mapping[str, tuple[int, ...]] | None = None,
        network: Callable[[], nn.Module] | None = None,
    ) -> Facts:
        """Return the facts of a classifier, for use without an experiment."""
        return cls(TASKS[task], head, arrays=arrays, network=network)


def copy_of(head: nn.Linear, trained: bool) -> nn.Linear:
    """Return a copy of the backbone's classifier for a method, with gradients if it is ``trained``."""
    own = nn.Linear(head.in_features, head.out_features)
    own.load_state_dict(head.state_dict())
    own.of_backbone = not trained  # type: ignore[assignment]  # `Method.payload` leaves it out
    return own.requires_grad_(trained)


#: A part of a method before it is told the facts: a class, or ``functools.partial`` of one with its settings. A method
#: names the classes of its parts in ``parts``, by argument, so that a run can be loaded.
Part = Callable[[Facts], _Made]


def make_part(key: str, part: Part[_Made], facts: Facts) -> _Made:
    """Build a part of a method; a `ConfigError` of it gets the part's key in front."""
    if not callable(part):
        raise ConfigError(key, part, "must be a part of the method: a node with a _target_ and _partial_: true")
    return within(key, lambda: part(facts))


def resize_on_load(module: nn.Module, *names: str) -> None:
    """Let buffers and parameters whose size depends on the data take their size from the loaded weights."""

    def resize(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for name in names:
            if f"{prefix}{name}" in state:
                empty = torch.empty_like(state[f"{prefix}{name}"])
                setattr(module, name, nn.Parameter(empty) if name in module._parameters else empty)

    module.register_load_state_dict_pre_hook(resize)


def without_seed(config: dict[str, Any]) -> dict[str, Any]:
    """Return a method's settings without the seed, for settings that draw nothing; see `Method.canonical`."""
    return {key: value for key, value in config.items() if key != "seed"}


class Method(Named, nn.Module, ABC):
    """A way to classify a client's images together. Built by the engine as ``Method(facts, **config)``.

    Every method states its cost: `budget` is abstract. `logits` must not change the module: an evaluation calls it from
    several threads.
    """

    #: Stable name: its identity in digests, ``run.json`` and tables. A class of the user's without one has its own.
    name: ClassVar[str]
    #: Tasks that it supports; by default those with labels.
    tasks: ClassVar[tuple[Task, ...]] = tuple(task for task in TASKS.values() if task != QUALITY)
    #: Names of the stored arrays that it reads, in `ClientBatch.arrays`; the features are always there.
    reads: frozenset[str] = frozenset({"features"})
    #: What it must know of a client.
    asks: ClassVar[frozenset[Ask]] = frozenset()
    #: Whether it is trained by gradients: `learn` calls ``fit``.
    trainable: ClassVar[bool] = True
    #: What ``fit`` then uses of the configuration, which counts in the digest: the ``recipe``, unless the method gives
    #: its own; the training ``clients`` and the callbacks, unless it trains on single images.
    trained_with: ClassVar[frozenset[str]] = frozenset({"recipe", "clients"})
    #: Where requests are served: ``device``, ``cloud`` or ``both``; None: where the configuration says.
    site: ClassVar[str | None] = None
    #: Whether `logits` can use the images before each image as its context, in one pass.
    causal: bool = False

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.task, self.dim, self.num_classes = facts.task, facts.dim, facts.num_classes

    @classmethod
    def canonical(cls, config: dict[str, Any], dim: int) -> dict[str, Any]:
        """Return ``config`` with every value in the form that names a run (``groups: max`` becomes D).

        Called before anything is computed; raises `ConfigError` for values that do not fit D.
        """
        return config

    @classmethod
    def reads_with(cls, config: Mapping[str, Any]) -> frozenset[str]:
        """Return the names of the stored arrays that it reads with a configuration; by default `reads`."""
        return cls.reads

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Learn on the cloud, once, and return the record of it. By default ``fit`` trains the whole module.

        Args:
            cloud: what the cloud may read.
            fit: trains modules by gradients; afterwards they are in evaluation mode.
        """
        return fit(self)

    @abstractmethod
    def logits(self, batch: ClientBatch, causal: bool = False) -> Tensor:
        """Return the logits that an evaluation counts, [C, S, K].

        Args:
            batch: images of clients. One client is never another's context.
            causal: the context of an image are the images before it, not all others; only where `causal`.
        """

    @abstractmethod
    def budget(self, sizes: Sizes) -> Budget:
        """Return the computations and payloads of a client and of a request, in closed form."""

    def payload(self) -> dict[str, Tensor]:
        """Return the tensors that a device with the backbone needs to run the method."""
        shared = [f"{name}." for name, module in self.named_modules() if getattr(module, "of_backbone", False)]
        return {k: t for k, t in self.state_dict().items() if not k.startswith(tuple(shared))}

    def num_parameters(self) -> int:
        """Return the number of parameters in addition to the backbone and its classifier."""
        return sum(p.numel() for p in self.parameters())
