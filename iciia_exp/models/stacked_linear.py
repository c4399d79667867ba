"""Linear classifiers of many clients, trained together by plain SGD.

Gradient steps keep a classifier's weights in W + A^T X, where X are its train images. So A [n, K] is trained, by
products of features: the same steps, without passes over D x K weights.

Legend: C clients, n train images of a client, m val images, b images of a batch, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from iciia_exp.models.stacked import Examples, accuracy, plain_rate
from iciia_exp.recipe import Recipe
from iciia_exp.tasks import SINGLE_LABEL, Task

__all__ = ["StackedLinear", "is_plain_linear", "linear_logits"]


class StackedLinear:
    """A linear classifier by plain SGD: the coefficients A of its train images, and the change of the bias."""

    def __init__(
        self,
        start: Mapping[str, Tensor],
        train: Examples,
        val: Examples,
        task: Task,
        recipe: Recipe,
    ) -> None:
        self.start, self.x_CnD, self.val, self.task, self.recipe = start, train.x, val, task, recipe
        rate = plain_rate(recipe)
        assert rate is not None
        self.lr = rate
        self.real_Cn1 = train.mask.to(train.x.dtype)[:, :, None]
        classes = start["bias"].shape[-1]
        self.one_hot_CnK = nn.functional.one_hot(train.y, classes).to(train.x.dtype)
        across_CDn = train.x.transpose(1, 2)
        self.gram_Cnn, self.near_Cmn = torch.bmm(train.x, across_CDn), torch.bmm(val.x, across_CDn)
        self.start_CnK, self.start_CmK = (linear_logits(start, x) for x in (train.x, val.x))
        self.trained = [torch.zeros_like(self.start_CnK), self.start_CnK.new_zeros(len(train.y), 1, classes)]

    @torch.no_grad()
    def epoch(self, number: int) -> None:
        """Train one epoch."""
        change_CnK, bias_C1K = self.trained
        clip, size = self.recipe.clip_norm, self.recipe.batch_size
        for at in range(0, change_CnK.shape[1], size):
            batch = slice(at, at + size)
            logits_CbK = torch.bmm(self.gram_Cnn[:, batch], change_CnK).add_(self.start_CnK[:, batch]).add_(bias_C1K)
            real_Cb1 = self.real_Cn1[:, batch]
            error_CbK = logits_CbK.softmax(-1).sub_(self.one_hot_CnK[:, batch]).mul_(real_Cb1 / real_Cb1.sum(1, True))
            own_C1K = error_CbK.sum(1, keepdim=True)
            step: float | Tensor = self.lr
            if clip:
                square_C = (torch.bmm(error_CbK, error_CbK.transpose(1, 2)) * self.gram_Cnn[:, batch, batch]).sum(
                    (1, 2)
                )
                norm_C = (square_C + own_C1K.square().sum((1, 2))).clamp(min=0).sqrt()
                step = (self.lr * (clip / (norm_C + 1e-6)).clamp(max=1))[:, None, None]
            change_CnK[:, batch] -= step * error_CbK
            bias_C1K -= step * own_C1K

    @torch.no_grad()
    def val_accuracy(self) -> Tensor:
        """Return the accuracy on every client's val images, [C]; 0 without any."""
        if not self.val.y.shape[1]:
            return torch.zeros(len(self.val.y), device=self.val.y.device)
        change_CnK, bias_C1K = self.trained
        return accuracy(self.task, self.start_CmK + torch.bmm(self.near_Cmn, change_CnK) + bias_C1K, self.val)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the clients."""
        for name in ("real_Cn1", "one_hot_CnK", "gram_Cnn", "near_Cmn", "start_CnK", "start_CmK"):
            setattr(self, name, getattr(self, name)[rows])
        self.val, self.trained = self.val.take(rows), [t[rows] for t in self.trained]

    def states(self, trained: list[Tensor]) -> dict[str, Tensor]:
        """Return the parameters of the module, for the values of ``trained`` of all clients."""
        change_CnK, bias_C1K = trained
        weight_CKD = torch.baddbmm(self.start["weight"], change_CnK.transpose(1, 2), self.x_CnD)
        return {"weight": weight_CKD, "bias": self.start["bias"] + bias_C1K[:, 0]}


def linear_logits(classifier: Mapping[str, Tensor], x_CnD: Tensor) -> Tensor:
    """Return the logits of linear classifiers, of one for all clients or of one for each, [C, n, K]."""
    weight, bias = classifier["weight"], classifier["bias"]
    if weight.ndim == 2:
        return nn.functional.linear(x_CnD, weight, bias)
    return torch.baddbmm(bias[:, None], x_CnD, weight.transpose(1, 2))


def is_plain_linear(module: nn.Module, task: Task, recipe: Recipe) -> bool:
    """Return whether it is a linear classifier with a softmax, trained by plain SGD at a constant rate."""
    linear = type(module) is nn.Linear and module.bias is not None
    return linear and task == SINGLE_LABEL and plain_rate(recipe) is not None
