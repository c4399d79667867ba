"""Oracle: the backbone's classifier restricted to the classes of the client; shown apart and never ranked.

Legend: C clients, S images of a client, K classes.
"""

from typing import ClassVar

import torch
from torch import Tensor

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.methods.base import Ask, Facts, Fit, Record, copy_of, resize_on_load
from iciia_exp.methods.tune.base import Personal
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

    has: Tensor

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.head = copy_of(facts.head, trained=False)
        self.register_buffer("has", torch.zeros(0, self.num_classes, dtype=torch.bool))
        resize_on_load(self, "has")

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Read the labels of the test images."""
        self.eval()
        self.has = torch.from_numpy(cloud.test_class_counts() > 0)
        return {}

    def logits(self, batch: ClientBatch, causal: bool = False) -> Tensor:
        """Return the backbone's logits, those of other classes than the client's replaced, [C, S, K]."""
        b_CSK = self.head(batch.x_CSD)
        has_CK = self.has.to(b_CSK.device)[batch.client_C]
        # a client without test images keeps all classes
        return b_CSK.masked_fill(~(has_CK | ~has_CK.any(1, keepdim=True)).unsqueeze(1), FORBIDDEN)

    def macs(self, images: int) -> int:
        """0."""
        return 0

    def streaming_macs(self, images: int) -> int | None:
        """0."""
        return 0

    def state_bytes(self, images: int) -> int:
        """0: nothing is kept."""
        return 0

    def num_parameters(self) -> int:
        """0."""
        return 0
