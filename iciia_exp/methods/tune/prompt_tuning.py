"""Prompt tuning: a learned vector for every client beside a shared classifier.

Source: a baseline of ICIIA (ACML 2024, PMLR 260:223-238), section 4: logits = W f + b + W_p e_u + b_p with e_u of
width D/2 for client u, W and b initialised from the backbone's classifier, all trained together. It needs labelled
images of the test clients and is refused where they have none.

Everything is trained together, so the cloud trains on features and labels of all clients, and each device gets the
vector of its client.

Legend: C clients, S images of a client, n train and m val images, D features, K classes.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import UserError, check_int
from iciia_exp.ledger import Budget, Line, Link, Sizes, payload_bytes, serve
from iciia_exp.methods.base import Ask, Facts, Fit, Record, copy_of, resize_on_load
from iciia_exp.methods.tune.base import Learned, Personal
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["PromptTuning"]


class PromptTuning(Personal):
    """A vector for every client of the partition.

    Args:
        facts: task, sizes, and the backbone's classifier, from which the shared one is initialised.
        width: of the vectors; null is D/2, which the paper chose among D/4 to 4 D.
    """

    name = "prompt_tuning"
    asks: ClassVar[frozenset[Ask]] = frozenset({Ask.CLIENT_LABELS})

    def __init__(self, facts: Facts, width: int | None = None) -> None:
        super().__init__(facts)
        self.width = max(1, self.dim // 2) if width is None else check_int("width", width, 1, 65_536)
        self.head = copy_of(facts.head, trained=True)
        self.prompt = nn.Linear(self.width, self.num_classes)
        self.vectors = nn.Parameter(torch.zeros(0, self.width))
        resize_on_load(self, "vectors")

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Train a vector for every client, and with them the shared classifier."""
        self.vectors = nn.Parameter(torch.randn(len(cloud.clients), self.width))
        return fit(self)

    def training_loss(self, batch: ClientBatch) -> Tensor:
        """Return the mean loss over the images of a batch of the partition's own clients."""
        if (batch.client_C < 0).any():
            raise UserError(f"method={self.name}: trains vectors of the partition's clients; use client_mix=natural")
        return self.task.loss(self.logits(batch)[batch.mask_CS], batch.y_CS[batch.mask_CS])

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """A vector [D/2]."""
        return {"vector": (self.width,)}

    def personalise(self, own: Mapping[str, ClientBatch], link: Link, cloud: CloudView | None) -> Learned:
        """Receive the vectors that the cloud has trained on the devices' features and labels."""
        client_C = own["train"].client_C
        if ((client_C < 0) | (client_C >= len(self.vectors))).any():
            problem = "trains its clients together, in the cloud; a new client needs a new training"
            raise UserError(f"{self.name}: {problem}, or method=finetune")
        for role in ("train", "val"):
            batch = own[role]
            link.up("features", batch.x_CSD[batch.mask_CS], what="training")
            link.up("labels", batch.y_CS[batch.mask_CS], what="training")
        vectors_CE = link.down("states", self.vectors[client_C])
        return Learned({"vector": vectors_CE}, torch.zeros(len(client_C), dtype=torch.int64))

    def states_of(self, client_C: Tensor) -> dict[str, Tensor]:
        """Return the clients' vectors; in training those that are trained."""
        return {"vector": self.vectors[client_C]} if self.states is None else super().states_of(client_C)

    def classify(self, batch: ClientBatch, states: Mapping[str, Tensor]) -> Tensor:
        """Return the logits with the clients' vectors, [C, S, K]."""
        return self.head(batch.x_CSD) + self.prompt(states["vector"]).unsqueeze(1)

    def payload(self) -> dict[str, Tensor]:
        """Return the shared tensors; a device gets its own vector alone."""
        return {name: tensor for name, tensor in super().payload().items() if name != "vectors"}

    def budget(self, sizes: Sizes) -> Budget:
        """K D/2 MACs for all images of a client together: its vector's part of the logits. It is a bias, computed
        before the image arrives: nothing for one more.

        Up go the features and labels of the n + m images, down comes the vector.
        """
        macs = self.num_classes * self.width if sizes.together else 0
        weights, state_bytes = payload_bytes(self.payload()), self.state_bytes()
        served = serve(sizes, self.num_classes, macs=macs, weights=weights, state_bytes=state_bytes)
        images, label = sizes.train + sizes.val, 8 if self.task == SINGLE_LABEL else self.num_classes
        own = None if sizes.backbone_macs is None else images * sizes.backbone_macs
        learned = (
            Line("client_once", "device", "backbone", macs=own),
            Line("client_once", "device", "training", kind="features", bytes=4 * images * self.dim),
            Line("client_once", "device", "training", kind="labels", bytes=images * label),
            Line("client_once", "cloud", "method", kind="states", bytes=state_bytes),
        )
        return Budget(served.lines + learned, state_bytes)

    def num_parameters(self) -> int:
        """Those of the map and of one vector; the classifier replaces the backbone's."""
        return sum(p.numel() for p in self.prompt.parameters()) + self.width
