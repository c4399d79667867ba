"""Prompt tuning: a learned vector for every client beside a shared classifier.

Source: a baseline of ICIIA (ACML 2024, PMLR 260:223-238), section 4: logits = W f + b + W_p e_u + b_p with e_u of
width D/2 for client u, W and b initialised from the backbone's classifier, all trained together. It needs labelled
images of the test clients and is refused where they have none.

Legend: C clients, S images of a client, D features, K classes.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import UserError, check_int
from iciia_exp.methods.base import Ask, Facts, Fit, Record, copy_of, resize_on_load
from iciia_exp.methods.tune.base import Personal

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
        self.width = max(1, self.dim // 2) if width is None else check_int("width", width, 1)
        self.head = copy_of(facts.head, trained=True)
        self.prompt = nn.Linear(self.width, self.num_classes)
        self.vectors = nn.Parameter(torch.zeros(0, self.width))
        resize_on_load(self, "vectors")

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Train a vector for every client, and with them the shared classifier."""
        self.vectors = nn.Parameter(torch.randn(len(cloud.devices), self.width))
        return fit(self)

    def training_loss(self, batch: ClientBatch) -> Tensor:
        """Return the mean loss over the images of a batch of the partition's own clients."""
        if (batch.client_C < 0).any():
            raise UserError(f"method={self.name}: trains vectors of the partition's clients; use client_mix=natural")
        return self.task.loss(self.logits(batch)[batch.mask_CS], batch.y_CS[batch.mask_CS])

    def logits(self, batch: ClientBatch, causal: bool = False) -> Tensor:
        """Return the logits with the vectors of the batch's clients, [C, S, K]."""
        return self.head(batch.x_CSD) + self.prompt(self.vectors[batch.client_C]).unsqueeze(1)

    def macs(self, images: int) -> int:
        """K D/2 for a client, however many images: its vector's part of the logits."""
        return self.num_classes * self.width

    def streaming_macs(self, images: int) -> int | None:
        """0: that part is a bias, computed before the image arrives."""
        return 0

    def state_bytes(self, images: int) -> int:
        """The client's vector, in float32."""
        return 4 * self.width

    def num_parameters(self) -> int:
        """Those of the map and of one vector; the classifier replaces the backbone's."""
        return sum(p.numel() for p in self.prompt.parameters()) + self.width
