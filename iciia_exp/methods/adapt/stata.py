"""StatA: a Gaussian mixture on the client's features, its statistics anchored to the cloud's.

Source: Zanella, Fuchs, De Vleeschouwer and Ben Ayed 2025, "Realistic Test-Time Adaptation of Vision-Language Models".
In the paper the anchors come from text, here from the training clients: means mu'_k of the classes and a shared
diagonal variance s' of features of length 1. With the backbone's posteriors p, a graph w of similar images, and
assignments z,

    z_i    ~  p_i exp(log N(f_i; mu, s) + sum over j of w_ij z_j)
    mu_k   =  (sum over i of z_ik f_i + alpha mu'_k) / (n_k + alpha)          n_k = sum over i of z_ik
    s      =  (sum over i, k of z_ik (f_i - mu_k)^2 + alpha sum over k of (s' + (mu'_k - mu_k)^2)) / (S + alpha K)

in turn. This minimises the paper's objective, in which alpha weighs the divergence of each class's Gaussian from its
anchor. The means of a client are never formed: only their products with its images are needed, which follow from z.

Legend: C clients, S images of a client, D features, K classes, I iterations, J steps of the assignments in each.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from iciia_exp.data.views import CloudView
from iciia_exp.errors import check_float, check_int
from iciia_exp.methods.adapt.lame import nearest_neighbours
from iciia_exp.methods.adapt.training_free import WholeChunks
from iciia_exp.methods.base import Facts
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["StatA"]

#: Largest number of training images for the anchors.
_ANCHOR_IMAGES = 300_000


class StatA(WholeChunks):
    """Anchored Gaussian statistics.

    Args:
        facts: task, sizes, and the backbone's classifier.
        calibrator: ``none`` (published), ``temperature`` or ``bcts``.
        anchor: alpha.
        neighbours: number of similar images of each image in the graph.
        iterations: I; enough to converge wherever the Gaussians do not dominate the classifier.
        steps: J.
        sharpness: factor of log N; 1 is published. The log-density of many features dominates any classifier; null
            chooses the factor on val clients.
    """

    name = "stata"
    tasks = (SINGLE_LABEL,)

    means: Tensor
    variance: Tensor
    sharpness: Tensor

    def __init__(
        self,
        facts: Facts,
        calibrator: str = "none",
        anchor: float = 1.0,
        neighbours: int = 3,
        iterations: int = 5,
        steps: int = 5,
        sharpness: float | None = None,
    ) -> None:
        super().__init__(facts, calibrator)
        self.anchor = check_float("anchor", anchor, 0.0, open_low=True)
        self.neighbours = check_int("neighbours", neighbours, 0)
        self.iterations, self.steps = (
            check_int("iterations", iterations, 1, 10_000),
            check_int("steps", steps, 1, 10_000),
        )
        given = 1.0 if sharpness is None else check_float("sharpness", sharpness, 0.0)
        self.register_buffer("sharpness", torch.tensor(given))
        if sharpness is None:
            self.grids = {"sharpness": (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)}
        # without training images: the weights, and even features
        self.register_buffer("means", F.normalize(self.head.weight, dim=-1).detach().clone())
        self.register_buffer("variance", torch.full((self.dim,), 1 / self.dim))

    def read(self, cloud: CloudView) -> None:
        """Read the classes' means and the shared variance from training clients."""
        count_K = torch.zeros(self.num_classes, dtype=torch.float64)
        sum_KD = torch.zeros(self.num_classes, self.dim, dtype=torch.float64)
        square_D = torch.zeros(self.dim, dtype=torch.float64)
        for batch in cloud.chunks("train", most_images=_ANCHOR_IMAGES):
            f_TD, y_T = F.normalize(batch.x_CSD[batch.mask_CS], dim=-1).double(), batch.y_CS[batch.mask_CS]
            count_K.index_add_(0, y_T, torch.ones(len(y_T), dtype=torch.float64))
            sum_KD.index_add_(0, y_T, f_TD)
            square_D += f_TD.square().sum(0)
        seen_K = count_K > 0
        if not seen_K.any():
            return
        mean_KD = sum_KD[seen_K] / count_K[seen_K, None]
        self.means[seen_K] = mean_KD.float()
        within_D = square_D - (count_K[seen_K, None] * mean_KD.square()).sum(0)
        freedom = max(1.0, float(count_K.sum() - seen_K.sum()))
        self.variance.copy_((within_D / freedom).clamp(min=1e-6 / self.dim))

    def together(self, x_CSD: Tensor, real_CS: Tensor, b_CSK: Tensor) -> Tensor:
        """Return the logarithms of the assignments, [C, S, K]."""
        log_p_CSK = b_CSK.log_softmax(-1)
        f_CSD = F.normalize(x_CSD * real_CS.unsqueeze(2), dim=-1)
        edges_CSS = nearest_neighbours(x_CSD, real_CS, self.neighbours)
        if self.neighbours:
            edges_CSS = edges_CSS * torch.bmm(f_CSD, f_CSD.transpose(1, 2)).clamp(min=0)
        z_CSK = log_p_CSK.exp() * real_CS.unsqueeze(2)
        squares_KD = self.means.square()
        n_CK = z_CSK.new_zeros(z_CSK.shape[0], self.num_classes)
        share_CSK, inverse_CD = torch.zeros_like(z_CSK), (1 / self.variance).expand(z_CSK.shape[0], -1)
        logits_CSK = log_p_CSK
        for i in range(self.iterations):
            if i:  # statistics from assignments; the first ones are the anchors
                n_CK = z_CSK.sum(1)
                share_CSK = z_CSK / (n_CK + self.anchor).unsqueeze(1)
                inverse_CD = 1 / self._variance(f_CSD, z_CSK, share_CSK, n_CK, squares_KD)
            density_CSK = self._log_density(f_CSD, inverse_CD, share_CSK, n_CK, squares_KD)
            unary_CSK = log_p_CSK + self.sharpness * density_CSK
            for _ in range(self.steps):
                logits_CSK = torch.baddbmm(unary_CSK, edges_CSS, z_CSK)
                z_CSK = logits_CSK.softmax(-1) * real_CS.unsqueeze(2)
        return logits_CSK

    def _variance(self, f_CSD: Tensor, z_CSK: Tensor, share_CSK: Tensor, n_CK: Tensor, squares_KD: Tensor) -> Tensor:
        """Return s of every client, [C, D].

        Its numerator is sum f^2 + alpha K s' + alpha sum mu'^2 - sum over k of (n_k + alpha) mu_k^2, and with the sums
        A_k of a class's images the last is the sum of A^2, 2 alpha A mu' and alpha^2 mu'^2, each over (n_k + alpha).
        """
        alpha = self.anchor
        own_CSS = torch.bmm(z_CSK, share_CSK.transpose(1, 2))
        crossed_CSD = torch.bmm(own_CSS, f_CSD) + 2 * alpha * (share_CSK @ self.means)
        taken_CD = (f_CSD * (f_CSD - crossed_CSD)).sum(1)
        left_CK = alpha - alpha**2 / (n_CK + alpha)  # of mu'^2
        images_C1, classes = z_CSK.sum((1, 2)).unsqueeze(1), self.num_classes
        total_CD = taken_CD + alpha * classes * self.variance + left_CK @ squares_KD
        return (total_CD / (images_C1 + alpha * classes)).clamp(min=1e-3 * self.variance)

    def _log_density(
        self, f_CSD: Tensor, inverse_CD: Tensor, share_CSK: Tensor, n_CK: Tensor, squares_KD: Tensor
    ) -> Tensor:
        """Return log N(f_i; mu_k, s) up to what no class changes, [C, S, K]."""
        scaled_CSD = f_CSD * inverse_CD.unsqueeze(1)
        anchor_C1K = (self.anchor / (n_CK + self.anchor)).unsqueeze(1)
        with_anchors_CSK = scaled_CSD @ self.means.T
        with_images_CSK = torch.bmm(torch.bmm(scaled_CSD, f_CSD.transpose(1, 2)), share_CSK)
        product_CSK = with_images_CSK + anchor_C1K * with_anchors_CSK
        own_CK = (share_CSK * (product_CSK + anchor_C1K * with_anchors_CSK)).sum(1)
        own_CK = own_CK + anchor_C1K.squeeze(1).square() * (inverse_CD @ squares_KD.T)
        return product_CSK - 0.5 * own_CK.unsqueeze(1)

    def macs(self, images: int) -> int:
        """2 S^2 D for the graph, then in each iteration S K D + K D + S^2 (D + K) for the densities and S^2 K J for the
        assignments, and in all but the first S K D + K D + S^2 (D + K) for the variance.
        """
        square, classes = images * images, self.num_classes
        moments = images * classes * self.dim + classes * self.dim + square * (self.dim + classes)
        graph = 2 * square * self.dim if self.neighbours and images > 1 else 0
        return graph + (2 * self.iterations - 1) * moments + self.iterations * self.steps * square * classes
