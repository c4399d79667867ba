"""Oracle: the backbone's classifier restricted to the classes of the client; shown apart and never ranked.

Legend: C clients, S images of a client, K classes.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.ledger import Budget, Link, Sizes, serve
from iciia_exp.methods.base import Ask, Facts, Fit, Record, copy_of
from iciia_exp.methods.tune.base import Learned, Personal, class_counts
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["OracleClasses"]

#: Logit of the other classes; finite, so that the log-loss is.
FORBIDDEN = -30.0


class OracleClasses(Personal):
    """The backbone's classifier, restricted to the classes of the client's test images.

    Args:
        facts: task, sizes, and the backbone's classifier.
    """

    name = "oracle_classes"
    tasks = (SINGLE_LABEL,)
    asks: ClassVar[frozenset[Ask]] = frozenset({Ask.TEST_LABELS})
    trainable = False

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.head = copy_of(facts.head, trained=False)

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Nothing."""
        self.eval()
        return {}

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """1 for the client's classes, 0 for others, [K]."""
        return {"has": (self.num_classes,)}

    def personalise(self, own: Mapping[str, ClientBatch], link: Link, cloud: CloudView | None) -> Learned:
        """Read the labels of the test images."""
        has_CK = class_counts(own["test"], self.num_classes).clamp(max=1)
        return Learned({"has": has_CK}, torch.zeros(len(has_CK), dtype=torch.int64))

    def classify(self, batch: ClientBatch, states: Mapping[str, Tensor]) -> Tensor:
        """Return the backbone's logits, those of other classes than the client's replaced, [C, S, K]."""
        return self.head(batch.x_CSD).masked_fill(states["has"][:, None] == 0, FORBIDDEN)

    def budget(self, sizes: Sizes) -> Budget:
        """Nothing in addition to the backbone."""
        return serve(sizes, self.num_classes, macs=0, weights=0, state_bytes=self.state_bytes())

    def num_parameters(self) -> int:
        """0."""
        return 0
