"""Fine-tuning: every client's own linear classifier, trained on its own labelled images.

Source: a baseline of ICIIA (ACML 2024, PMLR 260:223-238), section 4: from the backbone's classifier, SGD, batches of
16, rate 0.01, gradients clipped at 5, stopped when the accuracy on the client's own val images has not improved for 10
epochs. It needs labels, which clients are not asked for, and is refused where test clients have none.

Legend: C clients, S images of a client, n train and m val images, D features, K classes.
"""

from collections.abc import Mapping
from typing import ClassVar

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import check_int
from iciia_exp.ledger import Budget, Link, Sizes
from iciia_exp.methods.base import Ask, Facts, Fit, Record
from iciia_exp.methods.tune.base import Learned
from iciia_exp.methods.tune.classifier import PersonalClassifier, sgd_recipe
from iciia_exp.models.fit_many import fit_many
from iciia_exp.tasks import CLICK, SINGLE_LABEL

__all__ = ["FineTune"]


class FineTune(PersonalClassifier):
    """A linear classifier for every client.

    Args:
        facts: task, sizes, and the backbone's classifier, where every client starts.
        lr: rate of SGD.
        batch_size: images of a step, in the order of the client's images.
        clip_norm: largest norm of a gradient.
        epochs: at most.
        patience: epochs without a better accuracy on the client's val images before training stops; the best is kept.
            Without val images, the last of all epochs.
    """

    name = "finetune"
    trainable = False
    tasks = (SINGLE_LABEL, CLICK)
    asks: ClassVar[frozenset[Ask]] = frozenset({Ask.CLIENT_LABELS})

    def __init__(
        self,
        facts: Facts,
        lr: float = 0.01,
        batch_size: int = 16,
        clip_norm: float = 5.0,
        epochs: int = 100,
        patience: int = 10,
    ) -> None:
        super().__init__(facts, sgd_recipe(lr, epochs, batch_size, clip_norm), check_int("patience", patience, 1))

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Nothing: the cloud has the backbone's classifier."""
        self.eval()
        return {}

    def personalise(self, own: Mapping[str, ClientBatch], link: Link, cloud: CloudView | None) -> Learned:
        """Train every client's classifier on its train images; its val images choose the epoch."""
        train, val = self.examples(own["train"]), self.examples(own["val"])
        fitted = fit_many(self.head, train, val, self.task, self.recipe, self.patience)
        return Learned(fitted.states, fitted.epochs_C)

    def budget(self, sizes: Sizes) -> Budget:
        """Nothing in a request: the client's classifier replaces the backbone's, and nothing is sent."""
        return self.device_budget(sizes)
