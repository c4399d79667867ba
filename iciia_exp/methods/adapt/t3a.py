"""T3A: class prototypes from the classifier's weights and the client's pseudo-labelled images.

Source: Iwasawa and Matsuo 2021, "Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization". The
supports of a class are its weight vector and the images that the classifier assigns to it, all of length 1. The mean of
the M supports of lowest entropy (of the classifier's posterior), normalised to length 1, is its prototype. The logits
are the image's products with the prototypes, times a scale that is fitted on val clients for the log-loss; the paper
has none.

The prototypes of a client are never formed, only their products with its images: those with the weights and with each
other.

Legend: C clients, S images of a client, D features, K classes, M supports.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from iciia_exp.data.batches import ClientBatch
from iciia_exp.errors import check_int
from iciia_exp.methods.adapt.calibration import fit_calibrator, of_images
from iciia_exp.methods.adapt.training_free import WholeChunks
from iciia_exp.methods.base import Facts, Record
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["T3A"]


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


class T3A(WholeChunks):
    """Test-time templates adjustment.

    Args:
        facts: task, sizes, and the backbone's classifier.
        supports: M, supports of a class.
    """

    name = "t3a"
    tasks = (SINGLE_LABEL,)

    log_scale: Tensor
    entropy: Tensor

    def __init__(self, facts: Facts, supports: int = 20) -> None:
        super().__init__(facts)
        self.supports = check_int("supports", supports, 1)
        self.register_buffer("log_scale", torch.zeros(()))
        # entropy of the weights as supports of their class, as in the paper
        self.register_buffer("entropy", _entropy(self.head(self.head.weight)).detach())

    def together(self, x_CSD: Tensor, real_CS: Tensor, b_CSK: Tensor) -> Tensor:
        """Return the products with each client's prototypes, scaled, [C, S, K]."""
        weight_KD = self.head.weight
        length_K = weight_KD.norm(dim=1).clamp(min=1e-12)
        x_CSD = x_CSD * real_CS.unsqueeze(2)
        length_CS1 = x_CSD.norm(dim=2, keepdim=True).clamp(min=1e-12)
        # products of images with unit weights, and with unit images
        with_weights_CSK = (b_CSK - self.head.bias) / length_K
        with_images_CSS = torch.bmm(x_CSD, (x_CSD / length_CS1).transpose(1, 2))
        label_CS = b_CSK.argmax(-1)
        keep_CS, keep_CK = real_CS, None
        # else no class has more of them; exported, it must not depend on their number
        if torch.compiler.is_exporting() or x_CSD.shape[1] + 1 > self.supports:
            keep_CS, keep_CK = self._surest(_entropy(b_CSK), label_CS, real_CS)
        one_hot_CSK = F.one_hot(label_CS, self.num_classes).to(x_CSD.dtype) * keep_CS.unsqueeze(2)
        if keep_CK is not None:
            with_weights_CSK = with_weights_CSK * keep_CK.unsqueeze(1)
        product_CSK = with_weights_CSK + torch.bmm(with_images_CSS, one_hot_CSK)
        # squared length of each sum of supports: every support's product with the sum
        of_images_CSK = (product_CSK / length_CS1) * one_hot_CSK
        own_weight = 1.0 if keep_CK is None else keep_CK
        unit_CSK = with_weights_CSK / length_CS1 * one_hot_CSK
        square_CK = of_images_CSK.sum(1) + unit_CSK.sum(1) + own_weight
        return product_CSK * square_CK.clamp(min=1e-12).rsqrt().unsqueeze(1) * self.log_scale.exp()

    def _surest(self, entropy_CS: Tensor, label_CS: Tensor, real_CS: Tensor) -> tuple[Tensor, Tensor]:
        """Return which images, [C, S], and which weights, [C, K], are among the surest supports of their class."""
        surer_CSS = entropy_CS.unsqueeze(1) < entropy_CS.unsqueeze(2)  # j before i
        tie_CSS = entropy_CS.unsqueeze(1) == entropy_CS.unsqueeze(2)
        earlier_SS = torch.ones_like(tie_CSS[0]).tril(-1)
        same_CSS = (label_CS.unsqueeze(1) == label_CS.unsqueeze(2)) & (real_CS > 0).unsqueeze(1)
        before_CS = ((surer_CSS | (tie_CSS & earlier_SS)) & same_CSS).sum(2)
        warm_CS = self.entropy[label_CS]
        before_CS = before_CS + (warm_CS <= entropy_CS)
        keep_CS = real_CS * (before_CS < self.supports)
        surer_CS = ((entropy_CS < warm_CS) & (real_CS > 0)).to(real_CS.dtype)
        before_CK = real_CS.new_zeros(real_CS.shape[0], self.num_classes).scatter_add_(1, label_CS, surer_CS)
        return keep_CS, (before_CK < self.supports).to(real_CS.dtype)

    @torch.inference_mode()
    def calibrate(self, batches: Sequence[ClientBatch]) -> Record:
        """Fit the scale of the logits on val clients."""
        self.log_scale.zero_()
        if not batches:
            return {}
        logits_TK, y_T = of_images(batches, self.logits)
        log_temperature, _ = fit_calibrator(self.task, logits_TK, y_T, "temperature")
        self.log_scale.copy_(-log_temperature)
        return {"images": len(y_T), "scale": round(float(self.log_scale.exp()), 4)}

    def num_parameters(self) -> int:
        """The scale."""
        return 1

    def macs(self, images: int) -> int:
        """S^2 (D + K): products of images with each other, summed by pseudo-label."""
        return images * images * (self.dim + self.num_classes)
