"""Prompt tuning: a learned vector for every client beside a shared classifier.

Source: a baseline of ICIIA (ACML 2024, PMLR 260:223-238), section 4: logits = W f + b + W_p e_u + b_p with e_u of
width D/2 for client u, W and b from the backbone's classifier, all trained together. It needs labelled images of the
test clients and is refused where they have none.

Legend: C clients, S images of a client, D features, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudData
from iciia_exp.errors import UserError, check_int
from iciia_exp.methods.base import Method, copy_of

__all__ = ["PromptTuning"]


class PromptTuning(Method):
    """A vector for every client of the partition.

    Args:
        head: the backbone's classifier, where the shared one starts.
        width: of the vectors; null is D/2, chosen in the paper among D/4 to 4 D.
    """

    name = "prompt_tuning"
    by_client = True
    sized = ("vectors",)

    def __init__(self, head: nn.Linear, width: int | None = None) -> None:
        super().__init__(head)
        self.width = max(1, self.dim // 2) if width is None else check_int("width", width, 1)
        self.head = copy_of(head, trained=True)
        self.prompt = nn.Linear(self.width, self.num_classes)
        self.vectors = nn.Parameter(torch.zeros(0, self.width))

    def study(self, data: CloudData) -> None:
        """Make a vector for every client."""
        data.require_own_labels(self.name)
        self.vectors = nn.Parameter(torch.randn(len(data.clients), self.width))

    def training_logits(self, batch: ClientBatch) -> Tensor:
        """Return the logits of a batch of the partition's own clients, [C, S, K]."""
        if (batch.client_C < 0).any():
            raise UserError(f"method={self.name}: trains vectors of the partition's clients; use client_mix=natural")
        return self.answers(batch)

    def answers(self, batch: ClientBatch) -> Tensor:
        """Return the logits with the vectors of the batch's clients, [C, S, K]."""
        return self.head(batch.x_CSD) + self.prompt(self.vectors[batch.client_C]).unsqueeze(1)

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Refuse: a vector belongs to a client."""
        raise UserError(f"{self.name}: has a vector for every client of its partition; it answers no others")

    def macs(self, images: int) -> int:
        """K D/2 for a client, however many images: its vector's part of the logits."""
        return self.num_classes * self.width

    def streaming_macs(self, images: int) -> int | None:
        """Nothing: that part is a bias, ready before the image."""
        return 0

    def state_bytes(self, images: int) -> int:
        """The client's vector, in float32."""
        return 4 * self.width

    def num_parameters(self) -> int:
        """The map of the vectors and one of them; the classifier takes the place of the backbone's."""
        return sum(p.numel() for p in self.prompt.parameters()) + self.width
