"""Per-image classifier: the backbone's logits of an image by itself, and an ensemble with a perceptron of its own.

The perceptron (`iciia_exp.models.perceptron`) is fitted on the clients' train images; its weight beside the backbone's
classifier is chosen on val images.

Legend: M images, D features, K classes, W hidden units.
"""

import numpy as np
import torch
from torch import Tensor, nn

from iciia_exp.data.views import CloudView
from iciia_exp.errors import check_int
from iciia_exp.methods.adapt.calibration import VAL_IMAGES, among_known, of_images
from iciia_exp.methods.base import Facts, Fit, copy_of
from iciia_exp.models.perceptron import Perceptron, ensemble_weights
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["ImageClassifier", "keep_unknown"]


def keep_unknown(b: Tensor, both: Tensor, known_K: Tensor) -> Tensor:
    """Return the logits ``both`` [..., K], with the backbone's ``b`` for classes without train images.

    These classes keep the probability that the backbone gives them.
    """
    known_b, known_both = (part.masked_fill(~known_K, -torch.inf) for part in (b, both))
    both = both + known_b.logsumexp(-1, keepdim=True) - known_both.logsumexp(-1, keepdim=True)
    return torch.where(known_K, both, b)


class ImageClassifier(nn.Module):
    """The backbone's classifier, or a weighted sum of its logits and a perceptron's.

    Shapes: features [..., D] to logits [..., K].

    Args:
        facts: task, sizes, and the backbone's classifier; it stays as it is.
        perceptron: W, width of the perceptron; 0 for the backbone's classifier alone.
    """

    ensemble_weight: Tensor
    known_classes: Tensor

    def __init__(self, facts: Facts, perceptron: int = 512) -> None:
        super().__init__()
        self.task, width = facts.task, check_int("perceptron", perceptron, 0, 65_536)
        self.head = copy_of(facts.head, trained=False)
        self.perceptron = Perceptron(facts.dim, facts.num_classes, width) if width else None
        if width:
            self.register_buffer("ensemble_weight", torch.tensor([1.0, 0.0]))  # of backbone and perceptron
            self.register_buffer("known_classes", torch.ones(facts.num_classes, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits; in training the backbone's alone: the perceptron is too sure of the train images."""
        b = self.head(x)
        if self.training or self.perceptron is None:
            return b
        both = self.ensemble_weight[0] * b + self.ensemble_weight[1] * self.perceptron(x)
        if self.task == SINGLE_LABEL:
            return keep_unknown(b, both, self.known_classes)
        return torch.where(self.known_classes, both, b)

    def learn(self, cloud: CloudView, fit: Fit) -> None:
        """Train the perceptron on the clients' train images, and weigh it on val images."""
        rows = np.unique(cloud.clients.train.values)
        if self.perceptron is None or not len(rows):
            return
        fit(self.perceptron, rows, Perceptron.recipe(len(rows)))
        self.known_classes.copy_(torch.from_numpy(cloud.class_counts("train").any(0)))
        if val := list(cloud.chunks("val", most_images=VAL_IMAGES)):
            x_MD, y = of_images(val, lambda batch: batch.x_CSD)
            with torch.no_grad():
                logits = [self.head(x_MD), self.perceptron(x_MD)]
            if self.task == SINGLE_LABEL:
                y, logits = among_known(torch.from_numpy(cloud.known_classes()), y, *logits)
            self.ensemble_weight.copy_(ensemble_weights(self.task, y, *logits))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image beside the backbone's classifier: W (D + K)."""
        return 0 if self.perceptron is None else self.perceptron.macs
