"""Head methods: a linear classifier on each image alone, the backbone's own or one that is trained further."""

from torch import Tensor

from iciia_exp.data.views import CloudView
from iciia_exp.methods.adapt.base import PerImage
from iciia_exp.methods.base import Facts, Fit, Record, copy_of

__all__ = ["BackboneOnly", "LinearHead"]


class HeadMethod(PerImage):
    """A linear classifier on each image alone that replaces the backbone's; it adds no cost and no state."""

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.head = copy_of(facts.head, trained=self.trainable)

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return the classifier's logits of every image by itself, [C, S, K]."""
        return self.head(x_CSD)

    def macs(self, images: int) -> int:
        """0: the classifier replaces the backbone's."""
        return 0

    def num_parameters(self) -> int:
        """0, as `macs`."""
        return 0


class LinearHead(HeadMethod):
    """The backbone's classifier, trained further on the method's own images."""

    name = "linear_head"


class BackboneOnly(HeadMethod):
    """The backbone's own classifier on each image alone."""

    name = "backbone"
    trainable = False

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Learn nothing."""
        self.eval()
        return {}
