"""The frozen backbone by itself: what every method is compared with."""

from __future__ import annotations

from torch import Tensor, nn

from iciia_exp.methods.base import Method, copy_of

__all__ = ["BackboneOnly"]


class BackboneOnly(Method):
    """The backbone's own classifier on each image alone."""

    name = "backbone"
    trainable = False

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = copy_of(head).requires_grad_(False)

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return the classifier's logits of every image by itself, [C, S, K]."""
        return self.head(x_CSD)

    def macs(self, images: int) -> int:
        """Nothing is added."""
        return 0

    def streaming_macs(self, images: int) -> int | None:
        """Nothing is added, and no state is needed."""
        return 0

    def num_parameters(self) -> int:
        """The classifier is the backbone's own."""
        return 0
