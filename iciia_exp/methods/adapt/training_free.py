"""Training-free methods: the backbone's own classifier, calibrated on val clients (`calibration`).

Legend: C clients, S images of a client, D features, K classes.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.methods.adapt.base import Adaptive, in_parts, real_images
from iciia_exp.methods.adapt.calibration import VAL_IMAGES, Calibrator, choose, mean_log_loss
from iciia_exp.methods.base import Facts, Fit, Record, copy_of

__all__ = ["TrainingFree", "WholeChunks"]


class TrainingFree(Adaptive):
    """The backbone's classifier, frozen and calibrated; a subclass adapts its logits to the images of a client.

    Args:
        facts: task, sizes, and the backbone's classifier.
        calibrator: ``none``, ``temperature`` or ``bcts``.
    """

    trainable = False

    def __init__(self, facts: Facts, calibrator: str = "none") -> None:
        super().__init__(facts)
        self.head = copy_of(facts.head, trained=False)
        self.calibrator = Calibrator(facts, calibrator)
        #: Values to try of hyper-parameters that are chosen on val clients.
        self.grids: dict[str, Sequence[float]] = {}

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Read the cloud's statistics, then calibrate on val clients."""
        self.calibrator.read(cloud)
        self.read(cloud)
        self.eval()
        chosen = self.calibrate(list(cloud.chunks("val", most_images=VAL_IMAGES)))
        return {"calibration": chosen} if chosen else {}

    def read(self, cloud: CloudView) -> None:
        """Read statistics of the cloud's images beside calibration; by default none."""

    def calibrated(self, x: Tensor) -> Tensor:
        """Return the classifier's calibrated logits of images [..., D] by themselves, [..., K]."""
        return self.calibrator(self.head(x))

    @torch.inference_mode()
    def calibrate(self, batches: Sequence[ClientBatch]) -> Record:
        """Fit the calibrator, then choose `grids` by log-loss, both on val clients."""
        if not batches:
            return {}
        record = self.calibrator.fit(self.head, batches)
        return record | choose(self, self.grids, lambda: mean_log_loss(self.task, self.logits, batches))

    def num_parameters(self) -> int:
        """What was read from val and training clients; the classifier is the backbone's."""
        return sum(b.numel() for b in self.buffers())


class WholeChunks(TrainingFree):
    """A `TrainingFree` whose logits depend on all images of a client together, so that one more changes all.

    Features and calibrated logits of an image are kept; the rest is computed again.
    """

    @abstractmethod
    def together(self, x_CSD: Tensor, real_CS: Tensor, b_CSK: Tensor) -> Tensor:
        """Return the logits [C, S, K] from features, 1 where an image is real, and calibrated logits."""

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return the logits of `together`, [C, S, K]."""
        parts = x_CSD, real_images(x_CSD, mask_CS), self.calibrated(x_CSD)
        return in_parts(self.together, *parts)

    @property
    def state_width(self) -> int:
        """Features and calibrated logits: D + K."""
        return self.dim + self.num_classes

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of one more image, [C, K], and its features and calibrated logits, [C, E]."""
        own_CE = torch.cat([x_CD, self.calibrated(x_CD)], 1)
        x_CSD, b_CSK = torch.cat([past_CPE, own_CE.unsqueeze(1)], 1).split([self.dim, self.num_classes], dim=2)
        mask_CS = None if mask_CP is None else F.pad(mask_CP, (0, 1), value=True)
        return self.together(x_CSD, real_images(x_CSD, mask_CS), b_CSK)[:, -1], own_CE

    def streaming_macs(self, images: int) -> int | None:
        """The same as of the whole sequence."""
        return self.macs(images)
