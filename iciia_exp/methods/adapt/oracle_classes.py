"""A bound: the backbone, told which classes the client has. No method can know, so it is shown apart, never ranked.

Legend: C clients, S images of a client, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iciia_exp import tasks
from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudData
from iciia_exp.errors import UserError
from iciia_exp.methods.adapt.training_free import TrainingFree

__all__ = ["OracleClasses"]

#: What is left of a forbidden class's logit: no class is impossible, so that log-loss stays a number.
FORBIDDEN = -30.0


class OracleClasses(TrainingFree):
    """The backbone's classifier without the classes that none of the client's test images has.

    Args:
        head: the backbone's classifier.
        calibrator: ``none``, ``temperature`` or ``bcts``.
    """

    name = "oracle_classes"
    tasks = (tasks.SINGLE_LABEL,)
    sized = ("has",)
    by_client = True
    bound = True

    has: Tensor

    def __init__(self, head: nn.Linear, calibrator: str = "none") -> None:
        super().__init__(head, calibrator)
        self.register_buffer("has", torch.zeros(0, self.num_classes, dtype=torch.bool))

    def study(self, data: CloudData) -> None:
        """Read the labels of the test images."""
        self.has = torch.from_numpy(data.class_counts("test") > 0)

    def answers(self, batch: ClientBatch) -> Tensor:
        """Return the backbone's logits, other classes than the client's own all but forbidden, [C, S, K]."""
        b_CSK = self.calibrated(batch.x_CSD)
        has_CK = self.has.to(b_CSK.device)[batch.client_C]
        # a client without test images is not told anything
        return b_CSK.masked_fill(~(has_CK | ~has_CK.any(1, keepdim=True)).unsqueeze(1), FORBIDDEN)

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Refuse: nobody knows the classes of a client."""
        raise UserError(f"{self.name}: is told the classes of the partition's clients; it answers no others")

    def macs(self, images: int) -> int:
        """Nothing is added."""
        return 0

    def streaming_macs(self, images: int) -> int | None:
        """Nothing is added."""
        return 0

    def state_bytes(self, images: int) -> int:
        """Nothing is kept: it has been told."""
        return 0

    def num_parameters(self) -> int:
        """Nothing is added."""
        return 0
