"""Client vector: how a client's images differ from other clients' images of the same classes.

Ours, made of known parts: a mixed model's client effect, as a second input of a network, as i-vectors adapt speech
recognisers to a speaker (Saon, Soltau, Nahamoo and Picheny 2013). The residual of an image x with posteriors p is
e = x - sum over k of p_k mu_k, with the class means mu. What the residuals of a client have in common says nothing of
its classes, only of its style: pen, camera, light.

R directions are kept, in which two images of one client are most alike: with S_b the mean of e e'^T over pairs of
different images of a client and S the mean of e e^T, the generalised eigenvectors of (S_b, S) of largest eigenvalue,
the correlation rho within a client. After n images the client vector is the best linear unbiased prediction

    c = rho / (1 + (n - 1) rho)  times the sum of the n residuals,

0 without images. The directions are found on labelled train images, rho on val images, with the backbone's posteriors
in place of the labels. Where clients differ only in their classes, rho is 0, and so is c.

Legend: C chunks (images of one client), S images of a chunk, D features, K classes, R directions, T images in all.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from iciia_exp.data.batches import ClientBatch, cut_chunks
from iciia_exp.data.clients import Ragged
from iciia_exp.methods.base import Facts, Record
from iciia_exp.models.perceptron import normalised
from iciia_exp.seeding import generator

__all__ = ["ClientVector"]

_RIDGE = 0.1  # of the features' mean variance, added to every direction's
_HIGHEST = 0.95  # correlation
_LEAST_SCALE = 0.01  # of residuals on val images; about 1 on train images
_LONGEST = 32  # images of a client, of which each has the others before it as its past, in training


class ClientVector(nn.Module):
    """Residuals of images in the directions of clients, and the vector of a client.

    Args:
        facts: D and K.
        size: R; of fewer features, D.
    """

    of_image: Tensor
    of_class: Tensor
    correlation: Tensor

    def __init__(self, facts: Facts, size: int) -> None:
        super().__init__()
        self.size = size = min(size, facts.dim)
        self.register_buffer("of_image", torch.zeros(facts.dim, size))  # directions
        self.register_buffer("of_class", torch.zeros(facts.num_classes, size))  # class means in them
        self.register_buffer("correlation", torch.zeros(size))  # rho

    def forward(self, x: Tensor, p: Tensor) -> Tensor:
        """Return the residuals [..., R] of `normalised` features [..., D] with posteriors [..., K]."""
        return x @ self.of_image - p @ self.of_class

    def shrunk(self, total: Tensor, n: Tensor) -> Tensor:
        """Return the vectors [..., R] of clients from sums [..., R] over their images' residuals, and numbers [...]."""
        n = n.unsqueeze(-1)
        return total * self.correlation / (1 + (n - 1) * self.correlation).clamp(min=1 - _HIGHEST)

    @torch.no_grad()
    def find_directions(self, batches: Callable[[], Iterable[ClientBatch]]) -> None:
        """Find the class means and the directions on labelled train images, which are read twice."""
        classes, dim = self.of_class.shape[0], self.of_image.shape[0]
        sum_KD, count_K = torch.zeros(classes, dim), torch.zeros(classes)
        for batch in batches():
            y_T = batch.y_CS[batch.mask_CS]
            sum_KD.index_add_(0, y_T, normalised(batch.x_CSD[batch.mask_CS]))
            count_K += torch.bincount(y_T, minlength=classes)
        every_D = sum_KD.sum(0) / count_K.sum()
        # one image more of the mean over all: classes without images are there
        mean_KD = (sum_KD + every_D) / (count_K + 1).unsqueeze(1)
        within_DD, between_DD, images, pairs = torch.zeros(dim, dim), torch.zeros(dim, dim), 0.0, 0.0
        for batch in batches():
            e_CSD = (normalised(batch.x_CSD) - mean_KD[batch.y_CS]) * batch.mask_CS.unsqueeze(2)
            n_C, sum_CD, e_TD = batch.mask_CS.sum(1).float(), e_CSD.sum(1), e_CSD.flatten(0, 1)
            square_DD = e_TD.T @ e_TD
            within_DD += square_DD
            between_DD += sum_CD.T @ sum_CD - square_DD
            images, pairs = images + float(n_C.sum()), pairs + float((n_C * (n_C - 1)).sum())
        within_DD, between_DD = within_DD / images, between_DD / max(pairs, 1.0)
        within_DD.diagonal().add_(_RIDGE * within_DD.diagonal().mean() + 1e-6)
        values_D, vectors_DD = torch.linalg.eigh(within_DD)
        whiten_DD = vectors_DD * values_D.rsqrt()
        _, found_DD = torch.linalg.eigh(whiten_DD.T @ between_DD @ whiten_DD)
        self.of_image.copy_(whiten_DD @ found_DD[:, -self.of_image.shape[1] :].flip(1))
        self.of_class.copy_(mean_KD @ self.of_image)

    @torch.no_grad()
    def find_correlation(self, batches: Sequence[ClientBatch], posteriors: Callable[[Tensor], Tensor]) -> Record:
        """Find mean, scale and correlation of the residuals on val images.

        Args:
            batches: val clients.
            posteriors: from features [..., D] to probabilities [..., K].
        """
        residuals = [self(normalised(batch.x_CSD), posteriors(batch.x_CSD)) for batch in batches]
        e_TR = torch.cat([e_CSR[batch.mask_CS] for e_CSR, batch in zip(residuals, batches, strict=True)])
        # a direction without variance, such as that of the features' mean, stays so
        mean_R = e_TR.mean(0)
        scale_R = e_TR.std(0, correction=min(1, len(e_TR) - 1)).clamp(min=_LEAST_SCALE)
        alike_R, pairs = torch.zeros_like(mean_R), 0.0
        for e_CSR, batch in zip(residuals, batches, strict=True):
            e_CSR = (e_CSR - mean_R) / scale_R * batch.mask_CS.unsqueeze(2)
            n_C = batch.mask_CS.sum(1).float()
            alike_R += (e_CSR.sum(1).square() - e_CSR.square().sum(1)).sum(0)
            pairs += float((n_C * (n_C - 1)).sum())
        self.of_image.div_(scale_R)
        self.of_class.add_(mean_R).div_(scale_R)  # the posteriors sum to 1
        self.correlation.copy_((alike_R / max(pairs, 1.0)).clamp(0, _HIGHEST))
        return {"correlation": [round(float(r), 3) for r in self.correlation]}

    def of_pasts(self, e_MR: Tensor, clients: Ragged, draws: int) -> Tensor:
        """Return vectors of images after random images of their clients, [M, draws, R], for training.

        Args:
            e_MR: residuals of M images.
            clients: the images of every client, numbers below M.
            draws: pasts of each image, of 0 to 31 images.
        """
        c_MJR = e_MR.new_zeros(len(e_MR), draws, self.size)
        for draw in range(draws):
            order = clients.shuffled(generator("client_vector", draw))
            index_CS = torch.from_numpy(cut_chunks(clients, _LONGEST, order).index_CS)
            real_CS = index_CS >= 0
            e_CSR = e_MR[index_CS] * real_CS.unsqueeze(2)
            c_CSR = self.shrunk(e_CSR.cumsum(1) - e_CSR, torch.arange(index_CS.shape[1]).float())
            c_MJR[index_CS[real_CS], draw] = c_CSR[real_CS]
        return c_MJR

    @property
    def macs(self) -> int:
        """MACs of an image's residual: R (D + K)."""
        return self.of_image.numel() + self.of_class.numel()
