"""LAME: similar images of a client get similar posteriors.

Source: Boudiaf, Mueller, Ben Ayed and Bertinetto 2022, "Parameter-free Online Test-time Adaptation". From posteriors p
and a graph W of each image's nearest neighbours among the client's images, iterate

    y_i  =  softmax(log p_i + lambda sum over j of W_ij y_j)

The paper settles on the k nearest neighbours with k = 5 and lambda = 1.

Legend: C clients, S images of a client, D features, K classes, I iterations.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from iciia_exp.errors import check_float, check_int
from iciia_exp.methods.adapt.training_free import WholeChunks
from iciia_exp.methods.base import Facts
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["Lame", "nearest_neighbours"]


def nearest_neighbours(x_CSD: Tensor, real_CS: Tensor, neighbours: int) -> Tensor:
    """Return 1 at [c, i, j] where j is one of the nearest real images of i other than itself, float [C, S, S]."""
    C, S, _ = x_CSD.shape
    if neighbours == 0:
        return x_CSD.new_zeros(C, S, S)
    f_CSD = F.normalize(x_CSD * real_CS.unsqueeze(2), dim=-1)  # padding may hold anything
    similar_CSS = torch.bmm(f_CSD, f_CSD.transpose(1, 2))
    itself_SS = torch.eye(S, dtype=torch.bool, device=x_CSD.device)
    similar_CSS = similar_CSS.masked_fill(itself_SS | (real_CS == 0).unsqueeze(1), -torch.inf)
    if torch.compiler.is_exporting() or neighbours > S:  # for any number of images
        similar_CSS = F.pad(similar_CSS, (0, neighbours), value=-torch.inf)
    value_CSN, index_CSN = similar_CSS.topk(neighbours, dim=-1)
    return torch.zeros_like(similar_CSS).scatter_(2, index_CSN, (value_CSN > -torch.inf).to(x_CSD.dtype))[..., :S]


class Lame(WholeChunks):
    """Laplacian-adjusted maximum-likelihood estimation.

    Args:
        facts: task, sizes, and the backbone's classifier.
        calibrator: ``none`` (published), ``temperature`` or ``bcts``.
        neighbours: k of the graph; 0 gives the backbone's posteriors.
        weight: lambda.
        iterations: I; the default is well past convergence.
    """

    name = "lame"
    tasks = (SINGLE_LABEL,)

    def __init__(
        self,
        facts: Facts,
        calibrator: str = "none",
        neighbours: int = 5,
        weight: float = 1.0,
        iterations: int = 30,
    ) -> None:
        super().__init__(facts, calibrator)
        self.neighbours = check_int("neighbours", neighbours, 0)
        self.weight = check_float("weight", weight, 0.0)
        self.iterations = check_int("iterations", iterations, 1, 10_000)

    def together(self, x_CSD: Tensor, real_CS: Tensor, b_CSK: Tensor) -> Tensor:
        """Return the logits of the last iteration, [C, S, K]."""
        log_p_CSK = b_CSK.log_softmax(-1)
        edges_CSS = self.weight * nearest_neighbours(x_CSD, real_CS, self.neighbours)
        logits_CSK = log_p_CSK
        for _ in range(self.iterations):
            logits_CSK = torch.baddbmm(log_p_CSK, edges_CSS, logits_CSK.softmax(-1))
        return logits_CSK

    def macs(self, images: int) -> int:
        """S^2 D + S^2 K I: the graph, and one product an iteration."""
        graph = images * images * self.dim if self.neighbours and images > 1 else 0
        return graph + images * images * self.num_classes * self.iterations
