"""Personal methods: a client's device learns a state from the client's own labels, which serves that client alone.

Legend: C clients, S images of a client, K classes.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.states import ClientStates
from iciia_exp.data.views import CloudView
from iciia_exp.errors import UserError
from iciia_exp.ledger import Link
from iciia_exp.methods.base import Ask, Method

__all__ = ["Learned", "Personal", "class_counts"]

#: Bytes of states that are in memory at once to classify, if they are those of several sequences: 256 MiB.
_AT_ONCE = 1 << 28


class Learned(NamedTuple):
    """What some devices have learned."""

    states: dict[str, Tensor]  # float32, [C, ...], with the shapes of `Personal.state_shapes`
    epochs_C: Tensor  # int64 [C], passes over the train images; 0 where the device trains nothing
    counts: Mapping[str, Tensor] = {}  # what else was counted of every device, int64 [C] by name; see `Sizes`


class Personal(Method):
    """A method with a state for every client, learned on the client's device.

    The cloud learns once (`learn`), then `personalise` is called for some devices at a time, in an order of the
    engine's choice. A device's state depends on its own images and on what the cloud sends it.
    """

    site = "device"
    #: An image's logits depend on its client, not on other images.
    causal = True
    #: States by client number; None before the devices have learned.
    states: ClientStates | None = None

    @property
    def learns_alone(self) -> bool:
        """Whether a device learns from its own images alone, so that a new client can at any time."""
        return Ask.CLOUD_SAMPLES not in self.asks

    @property
    @abstractmethod
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one client's state, by name; all float32."""

    @property
    def tables(self) -> dict[str, Tensor]:
        """States [V, w] of which a client changes few rows, by name, as they are before; shards have changed rows."""
        return {}

    @abstractmethod
    def personalise(self, own: Mapping[str, ClientBatch], link: Link, cloud: CloudView | None) -> Learned:
        """Learn the states of C devices.

        Args:
            own: all images of the devices with their labels, padded, a device a row: ``train`` and ``val``; of an
                oracle also ``test``.
            link: every payload between a device and the cloud passes it, and is in the method's `budget`.
            cloud: what the cloud may read, for a method that asks for its samples; None where it is not at hand.
        """

    @abstractmethod
    def classify(self, batch: ClientBatch, states: Mapping[str, Tensor]) -> Tensor:
        """Return logits [C, S, K], with the states of the batch's clients, [C, ...] each."""

    def logits(self, batch: ClientBatch, causal: bool = False) -> Tensor:
        """Return those of `classify` with the stored states, which are read for some sequences at a time."""
        sequences = len(batch.client_C)
        size = sequences if self.states is None else max(1, _AT_ONCE // max(1, _bytes(self.states.shapes)))
        if sequences <= size:
            return self.classify(batch, self.states_of(batch.client_C))
        parts = (batch.take(slice(at, at + size)) for at in range(0, sequences, size))
        return torch.cat([self.classify(part, self.states_of(part.client_C)) for part in parts])

    def states_of(self, client_C: Tensor) -> dict[str, Tensor]:
        """Return the stored states of some clients; raises a `UserError` for one that has none."""
        if self.states is None:
            raise UserError(f"{self.name}: its devices have learned nothing yet; repeat the run's command")
        return {name: state.to(client_C.device) for name, state in self.states.of(client_C).items()}

    def state_bytes(self) -> int:
        """Return the size of a client's state, in bytes."""
        return _bytes(self.state_shapes)

    def training_bytes(self) -> int | None:
        """Return the memory that a device needs to train (`iciia_exp.cost.training_bytes`); None: no gradients."""
        return None


def _bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return 4 * sum(torch.Size(shape).numel() for shape in shapes.values())


def class_counts(batch: ClientBatch, classes: int) -> Tensor:
    """Return how many images of each class every client of a batch has, float32 [C, K]."""
    counts_CK = torch.zeros(len(batch.y_CS), classes, device=batch.y_CS.device)
    return counts_CK.scatter_add_(1, batch.y_CS, batch.mask_CS.float())
