"""Personal classifiers: a linear classifier for every client, in the place of the backbone's.

Legend: C clients, S images of a client, D features, K classes.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from iciia_exp.cost import training_bytes
from iciia_exp.data.batches import ClientBatch
from iciia_exp.errors import check_float
from iciia_exp.methods.base import Facts, copy_of
from iciia_exp.methods.tune.base import Personal
from iciia_exp.recipe import Recipe

__all__ = ["PersonalClassifier", "sgd_recipe"]


def sgd_recipe(lr: float, epochs: int, batch_size: int, clip_norm: float) -> Recipe:
    """Return the recipe of plain SGD at a constant rate."""
    sgd = partial(torch.optim.SGD, lr=check_float("lr", lr, 0.0, open_low=True))
    return Recipe(sgd, None, epochs, batch_size, check_float("clip_norm", clip_norm, 0.0, open_low=True))


class PersonalClassifier(Personal):
    """A linear classifier for every client, trained by plain SGD from the backbone's.

    Args:
        facts: task, sizes, and the backbone's classifier.
        recipe: of a device's training.
    """

    def __init__(self, facts: Facts, recipe: Recipe) -> None:
        super().__init__(facts)
        self.recipe = recipe
        self.head = copy_of(facts.head, trained=False)

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """A classifier: weight [K, D] and bias [K]."""
        return {"weight": (self.num_classes, self.dim), "bias": (self.num_classes,)}

    def classify(self, batch: ClientBatch, states: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of the clients' classifiers, [C, S, K]."""
        return torch.baddbmm(states["bias"][:, None], batch.x_CSD, states["weight"].transpose(1, 2))

    def training_bytes(self) -> int:
        """Return the memory of a client's classifier in training with plain SGD."""
        with torch.device("meta"):
            classifier = nn.Linear(self.dim, self.num_classes)
        return training_bytes(classifier, (self.dim,), self.recipe.batch_size, moments=0)

    def num_parameters(self) -> int:
        """Those of one client's classifier."""
        return self.num_classes * (self.dim + 1)
