"""Personal classifiers: a linear classifier for every client, in the place of the backbone's.

Legend: C clients, S images of a client, D features, K classes.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from iciia_exp.cost import training_bytes
from iciia_exp.data.batches import ClientBatch
from iciia_exp.errors import check_float, check_int
from iciia_exp.ledger import Budget, Line, Sizes, serve
from iciia_exp.methods.base import Facts, copy_of
from iciia_exp.methods.tune.base import Personal
from iciia_exp.models.fit_many import linear_logits
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
        patience: epochs on the own images without a better accuracy on the client's val images before training stops;
            the best is kept. None: all of them, and the last is kept.
    """

    def __init__(self, facts: Facts, recipe: Recipe, patience: int | None) -> None:
        super().__init__(facts)
        self.recipe = recipe
        self.patience = None if patience is None else check_int("patience", patience, 1)
        self.head = copy_of(facts.head, trained=False)

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """A classifier: weight [K, D] and bias [K]."""
        return {"weight": (self.num_classes, self.dim), "bias": (self.num_classes,)}

    def classify(self, batch: ClientBatch, states: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of the clients' classifiers, [C, S, K]."""
        return linear_logits(states, batch.x_CSD)

    def device_budget(self, sizes: Sizes, macs: int = 0) -> Budget:
        """Return the budget of a classifier that replaces the backbone's.

        Training takes 2 D K MACs for a train image and epoch, logits and gradient, the same for a sample of others and
        pass, and with ``patience`` D K for the val images of every epoch and the start.

        Args:
            sizes: of client and request.
            macs: of the device's training beside these.
        """
        served = serve(sizes, self.num_classes, macs=0, weights=0, state_bytes=self.state_bytes())
        images = 2 * (sizes.passed + sizes.epochs * sizes.train)
        if self.patience is not None:
            images += (sizes.epochs + 1) * sizes.val
        own = None if sizes.backbone_macs is None else (sizes.train + sizes.val) * sizes.backbone_macs
        learned = (
            Line("client_once", "device", "backbone", macs=own),
            Line("client_once", "device", "training", macs=macs + images * self.dim * self.num_classes),
        )
        return Budget(served.lines + learned, served.state_bytes)

    def training_bytes(self) -> int:
        """Return the memory of a client's classifier in training with plain SGD."""
        with torch.device("meta"):
            classifier = nn.Linear(self.dim, self.num_classes)
        return training_bytes(classifier, (self.dim,), self.recipe.batch_size, moments=0)

    def num_parameters(self) -> int:
        """Those of one client's classifier."""
        return self.num_classes * (self.dim + 1)
