"""Adaptive methods: one module for all clients."""

from __future__ import annotations

from torch import Tensor, nn

from iciia_exp.methods.base import Method, copy_of

__all__ = ["HeadMethod", "PerImage"]


class PerImage(Method):
    """A method that answers every image by itself: nothing is kept."""

    @property
    def causal(self) -> bool:
        """Every image stands alone."""
        return True

    @property
    def state_width(self) -> int:
        """Nothing is kept."""
        return 0

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of one image, [C, K], and nothing to keep, [C, 0]."""
        return self(x_CD.unsqueeze(1))[:, 0], x_CD[:, :0]

    def streaming_macs(self, images: int) -> int | None:
        """The cost of one image."""
        return self.macs(1)


class HeadMethod(PerImage):
    """A method that is a linear classifier on each image alone, in place of the backbone's: no cost, no state."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head)
        self.head = copy_of(head, trained=True)

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return the classifier's logits of every image by itself, [C, S, K]."""
        return self.head(x_CSD)

    def macs(self, images: int) -> int:
        """Nothing is added: the classifier takes the place of the backbone's."""
        return 0

    def num_parameters(self) -> int:
        """Nothing is added."""
        return 0
