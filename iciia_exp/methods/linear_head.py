"""A new linear classifier and no attention: tells what the method's images alone are worth."""

from __future__ import annotations

from torch import Tensor, nn

from iciia_exp.methods.base import Method, copy_of

__all__ = ["LinearHead"]


class LinearHead(Method):
    """The backbone's classifier, trained further on the method's own images; each image is seen alone.

    It takes the place of the backbone's classifier, so it adds no cost and no parameters.
    """

    name = "linear_head"

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = copy_of(head)

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return the classifier's logits of every image by itself, [C, S, K]."""
        return self.head(x_CSD)

    def macs(self, images: int) -> int:
        """Nothing is added: the classifier replaces the backbone's."""
        return 0

    def streaming_macs(self, images: int) -> int | None:
        """Nothing is added, and no state is needed."""
        return 0

    def num_parameters(self) -> int:
        """The classifier replaces the backbone's."""
        return 0
