"""The interface of a method: features of a client's images in, logits out, and a cost in closed form.

Legend: C clients, S images of a client, P images of its past, E numbers kept of a past image, D features, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from iciia_exp import tasks
from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudData

__all__ = ["Method", "copy_of"]


def copy_of(head: nn.Linear, trained: bool) -> nn.Linear:
    """Return a classifier of a method's own that starts as the backbone's, and stays so unless it is ``trained``."""
    own = nn.Linear(head.in_features, head.out_features)
    own.load_state_dict(head.state_dict())
    return own.requires_grad_(trained)


class Method(nn.Module, ABC):
    """A way to use a client's images together. Built by the engine as ``Method(head, **config)``.

    ``head`` is the backbone's classifier; its sizes give D and K. A method without a cost cannot exist: `macs` and
    `streaming_macs` are abstract. Answering leaves the module as it is: an evaluation asks from several threads.
    """

    #: Short name for folders and tables.
    name: ClassVar[str]
    #: Whether the method is trained on the cloud by gradients; others only `study` and `calibrate`.
    trainable: ClassVar[bool] = True
    #: The tasks it can do.
    tasks: ClassVar[tuple[str, ...]] = tasks.TASKS
    #: Whether it must know which client of the partition it answers; it answers no other then (`answers`).
    by_client: ClassVar[bool] = False
    #: Whether it knows what no method can know: a bound, shown apart and never ranked.
    bound: ClassVar[bool] = False
    #: Buffers and parameters whose size depends on what was studied; loading takes that of the weights.
    sized: ClassVar[tuple[str, ...]] = ()

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.dim, self.num_classes = head.in_features, head.out_features

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self.sized:
            if f"{prefix}{name}" in state_dict:
                empty = torch.empty_like(state_dict[f"{prefix}{name}"])
                setattr(self, name, nn.Parameter(empty) if name in self._parameters else empty)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @classmethod
    def canonical(cls, config: dict[str, Any], dim: int) -> dict[str, Any]:
        """Return ``config`` with every value in the one form that names a run (``groups: max`` becomes D).

        Raises `ConfigError` for values that do not fit D; called before anything is computed.
        """
        return config

    @abstractmethod
    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return logits [C, S, K]; ``mask_CS`` is True where an image is real, None when all are.

        One client is never another's context: a client's logits are those of running it alone.
        """

    @property
    def causal(self) -> bool:
        """Whether `stream` gives the logits after every length of the past in one pass."""
        return False

    def stream(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return every image's logits after the images before it alone, [C, S, K]; only where `causal`."""
        if not self.causal:
            raise ValueError(f"{self.name}: an image's logits depend on later ones; use forward on each past")
        return self(x_CSD, mask_CS)

    def prepare(self, task: str) -> None:
        """Learn which of `iciia_exp.tasks.TASKS` it is for; called before training."""

    def study(self, data: CloudData) -> None:
        """Read what is wanted of the cloud's data beside the batches of training; called before those."""

    def answers(self, batch: ClientBatch) -> Tensor:
        """Return the logits that an evaluation counts, [C, S, K]: those of `forward`, but for `by_client` methods."""
        return self(batch.x_CSD, batch.mask_CS)

    def retrieval_weights(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor | None:
        """Return how much of every image is in each one's answer, [C, S, S], rows summing to one, to be looked at.

        None if the method attends to none (`iciia_exp.engine.evaluation.attribution`).
        """
        return None

    def training_logits(self, batch: ClientBatch) -> Tensor:
        """Return the logits whose loss is trained, [C, S, K]: those of `forward`, by default."""
        return self(batch.x_CSD, batch.mask_CS)

    def calibrate(self, batches: Iterable[ClientBatch]) -> dict[str, Any]:
        """Choose what is chosen on selection clients after training; return what to record of it.

        Args:
            batches: of selection clients: drawn like the training clients, or for a method without training in chunks.
        """
        return {}

    @property
    def state_width(self) -> int:
        """E, numbers that `step` wants kept of every past image; by default its features."""
        return self.dim

    def state_bytes(self, images: int) -> int:
        """Return what a client's state of so many images takes, in float32."""
        return 4 * images * self.state_width

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits [C, K] of one more image of each client, and what to keep of it, [C, E].

        Equal to the last place of `stream`, or of `forward` where there is none, on past and image together. By default
        `forward` is computed.

        Args:
            x_CD: the images.
            past_CPE: what was kept of each client's past images, in their order.
            mask_CP: True where a past image is real; None where all are.
        """
        x_CSD = torch.cat([past_CPE, x_CD[:, None]], 1)
        mask_CS = None if mask_CP is None else nn.functional.pad(mask_CP, (0, 1), value=True)
        return self(x_CSD, mask_CS)[:, -1], x_CD

    def loss(self, logits_CSK: Tensor, y_CS: Tensor, mask_CS: Tensor) -> Tensor:
        """Return the task's mean loss over the real images of the batch; of a multi-label task labels are [C, S, K]."""
        return tasks.loss(logits_CSK[mask_CS], y_CS[mask_CS])

    @abstractmethod
    def macs(self, images: int) -> int:
        """Return what the method adds to backbone and classifier on a sequence of ``images``, in MACs."""

    @abstractmethod
    def streaming_macs(self, images: int) -> int | None:
        """Return what one more image adds when state is kept for the other ``images - 1``; None if it cannot be."""

    def num_parameters(self) -> int:
        """Return the number of parameters that come on top of the backbone and its classifier."""
        return sum(p.numel() for p in self.parameters())
