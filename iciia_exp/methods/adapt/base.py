"""Adaptive methods: one module for all clients, from the features of a client's images to their logits.

Legend: C clients, S images of a client, P images of its past, n new images, E numbers kept of a past image, D features,
K classes.
"""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from iciia_exp.data.batches import ClientBatch
from iciia_exp.ledger import Budget, Sizes, payload_bytes, serve
from iciia_exp.methods.base import Method

__all__ = ["Adaptive", "PerImage", "full_precision", "in_parts", "real_images"]


def real_images(x_CSD: Tensor, mask_CS: Tensor | None) -> Tensor:
    """Return 1 where an image is real and 0 where it is padding, float [C, S]."""
    return x_CSD.new_ones(x_CSD.shape[:2]) if mask_CS is None else mask_CS.to(x_CSD.dtype)


#: Numbers of one tensor that are computed together, 2 MiB; fewer cost more calls than they save reading.
_NUMBERS = 1 << 19


def in_parts(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return ``function`` of some clients at a time, concatenated: what is read often stays in the cache."""
    if torch.compiler.is_exporting():  # for any number of clients
        return function(*tensors)
    clients = max(16, _NUMBERS // max(1, *(t[0].numel() for t in tensors if len(t))))
    if len(tensors[0]) <= clients:
        return function(*tensors)
    return torch.cat([function(*part) for part in zip(*(t.split(clients) for t in tensors), strict=True)])


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Return a context without autocast on the device of ``x``: likelihoods of many images need float32."""
    exporting = torch.compiler.is_exporting()  # in float32 anyway
    return nullcontext() if exporting else torch.autocast(x.device.type, enabled=False)


class Adaptive(Method):
    """A method for any client: it computes on unlabelled images, and no client trains anything."""

    @abstractmethod
    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return logits [C, S, K]; ``mask_CS`` is True where an image is real, None when all are.

        One client is never another's context: a client's logits are those of running it alone.
        """

    def stream(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return every image's logits after the images before it alone, [C, S, K]; only where `causal`."""
        if not self.causal:
            raise ValueError(f"{self.name}: an image's logits depend on later ones; use forward on each past")
        return self(x_CSD, mask_CS)

    def logits(self, batch: ClientBatch, causal: bool = False) -> Tensor:
        """Return those of `forward`, or of `stream`."""
        return (self.stream if causal else self)(batch.x_CSD, batch.mask_CS)

    def training_loss(self, batch: ClientBatch) -> Tensor:
        """Return the task's mean loss over the real images of a batch."""
        return self.task.loss(self(batch.x_CSD, batch.mask_CS)[batch.mask_CS], batch.y_CS[batch.mask_CS])

    def attention_weights(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor | None:
        """Return the share of every image in each image's logits, [C, S, S], rows of sum 1, for inspection.

        None if the method has no attention (`iciia_exp.engine.evaluation.attribution`).
        """
        return None

    @abstractmethod
    def macs(self, images: int) -> int:
        """Return the MACs that the method adds to backbone and classifier on a sequence of ``images``."""

    @abstractmethod
    def streaming_macs(self, images: int) -> int | None:
        """Return the MACs of one more image when state of the other ``images - 1`` is kept; None if it cannot be."""

    def budget(self, sizes: Sizes) -> Budget:
        """Return the budget of serving: in a request, all images together, or one more by `step`."""
        one_more = self.macs(sizes.images) if sizes.together else self.streaming_macs(sizes.images)
        return serve(
            sizes,
            self.num_classes,
            macs=self.macs(sizes.images) if one_more is None else one_more,
            again=one_more is None,
            weights=payload_bytes(self.payload()),
            state_bytes=self.state_bytes(sizes.images - 1),
        )

    @property
    def state_width(self) -> int:
        """E, numbers that `step` keeps of every past image; by default its features, D."""
        return self.dim

    def state_bytes(self, images: int) -> int:
        """Return what a client's state of so many images takes, in bytes."""
        return 4 * images * self.state_width

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits [C, K] of one more image of each client, and what to keep of it, [C, E].

        Equal to the last logits of `stream`, or of `forward` without one, on past and image together; by default
        computed by `forward`.

        Args:
            x_CD: the images.
            past_CPE: kept of each client's past images, in their order.
            mask_CP: True where a past image is real; None where all are.
        """
        x_CSD = torch.cat([past_CPE, x_CD[:, None]], 1)
        mask_CS = None if mask_CP is None else nn.functional.pad(mask_CP, (0, 1), value=True)
        return self.newest(x_CSD, mask_CS), x_CD

    def newest(self, x_CSD: Tensor, mask_CS: Tensor | None) -> Tensor:
        """Return the logits of the last image of each client, [C, K]; by default those of `forward`."""
        return self(x_CSD, mask_CS)[:, -1]

    @property
    def takes_steps(self) -> bool:
        """Whether `step_all` is there."""
        return False

    def step_all(self, x_CnD: Tensor, memory_CSE: Tensor, visible_CnS: Tensor | None) -> Tensor:
        """Return the logits of some more images of each client, [C, n, K]: `step` for each, in one pass.

        Args:
            x_CnD: the images.
            memory_CSE: kept of each client's past images; what is to be kept of the new ones is written into the last
                n places.
            visible_CnS: True where an image, of the last n, sees a place, its own always; None where each sees all.
        """
        raise ValueError(f"{self.name}: one image at a time; use step")


class PerImage(Adaptive):
    """A method that classifies every image by itself; nothing is kept."""

    causal = True

    @property
    def state_width(self) -> int:
        """0: nothing is kept."""
        return 0

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of one image, [C, K], and nothing to keep, [C, 0]."""
        return self(x_CD.unsqueeze(1))[:, 0], x_CD[:, :0]

    def streaming_macs(self, images: int) -> int | None:
        """The cost of one image."""
        return self.macs(1)
