"""Modules of the same structure, one for each client, that are trained together: their parameters are stacked.

Legend: C clients, n train images of a client, m val images, b images of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from iciia_exp.recipe import Recipe
from iciia_exp.seeding import generator
from iciia_exp.tasks import Task

__all__ = ["Examples", "Stacked", "Together", "accuracy", "plain_rate", "squares"]


class Examples(NamedTuple):
    """Labelled images of C clients, padded to the longest client."""

    x: Tensor  # [C, n, ...], what a module reads
    y: Tensor  # int64 [C, n], of a multi-label task 0/1 [C, n, K]
    mask: Tensor  # bool [C, n], False where padded; real images come first

    def take(self, rows: Tensor | slice) -> Examples:
        """Return some of the clients."""
        return Examples(*(tensor[rows] for tensor in self))

    def cut(self) -> Examples:
        """Return the examples without the padding that all clients have."""
        longest = int(self.mask.sum(1).max())
        return Examples(*(tensor[:, :longest] for tensor in self))

    def none(self) -> Examples:
        """Return examples of the same clients without any image."""
        return Examples(*(tensor[:, :0] for tensor in self))


class Together(Protocol):
    """Modules of some clients in training."""

    #: What is trained, [C, ...] each.
    trained: list[Tensor]
    #: Images that choose the epoch.
    val: Examples

    def epoch(self, number: int) -> None:
        """Train one epoch."""

    def val_accuracy(self) -> Tensor:
        """Return the accuracy on every client's val images, [C]; 0 without any."""

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the clients."""

    def states(self, trained: list[Tensor]) -> dict[str, Tensor]:
        """Return the parameters of the module, for the values of ``trained`` of all clients."""


def accuracy(task: Task, logits_CmK: Tensor, val: Examples) -> Tensor:
    """Return every client's accuracy, [C]; 0 without images."""
    correct_Cm = task.correct(logits_CmK.flatten(0, 1), val.y.flatten(0, 1)).float().mean(-1).view(val.mask.shape)
    return (correct_Cm * val.mask).sum(1) / val.mask.sum(1).clamp(min=1)


def squares(tensor: Tensor) -> Tensor:
    """Return the sum of the squares of every client's numbers, [C]."""
    return tensor.flatten(1).square().sum(1)


def plain_rate(recipe: Recipe) -> float | None:
    """Return the rate of plain SGD at a constant rate; None of any other recipe."""
    if recipe.scheduler is not None:
        return None
    optimizer = recipe.make_optimizer([nn.Parameter(torch.zeros(1))])
    group = optimizer.param_groups[0]
    plain = not (group.get("momentum") or group.get("weight_decay") or group.get("maximize"))
    return group["lr"] if type(optimizer) is torch.optim.SGD and plain else None


class Stacked:
    """Any module: stacked parameters, gradients by `torch.func`.

    Clients may have different numbers of steps if the recipe is plain SGD. The parameters in ``starts`` are trained in
    place. ``train`` has no padding that all clients have (`Examples.cut`).
    """

    def __init__(
        self,
        module: nn.Module,
        start: dict[str, Tensor],
        train: Examples,
        val: Examples,
        task: Task,
        recipe: Recipe,
        starts: Mapping[str, Tensor],
        shuffle: int | None,
    ) -> None:
        self.module, self.train, self.val, self.task, self.recipe = module, train, val, task, recipe
        self.steps = steps = -(-train.y.shape[1] // recipe.batch_size)
        self.shuffle, self.rate = shuffle, plain_rate(recipe)
        self.names = list(start)
        fixed = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.fixed = {name: t.detach() for name, t in fixed.items() if name not in start}
        clients = len(train.y)
        own = [starts[name] if name in starts else p.expand(clients, *p.shape).clone() for name, p in start.items()]
        stacked = [nn.Parameter(values) for values in own]
        self.trained: list[Tensor] = [*stacked]
        self.optimizer = recipe.make_optimizer(stacked)
        self.scheduler = recipe.make_scheduler(self.optimizer, steps * recipe.epochs, recipe.epochs)

    def _logits(self, trained: dict[str, Tensor], x_b: Tensor) -> Tensor:
        return functional_call(self.module, {**self.fixed, **trained}, (x_b,))

    def _loss(self, trained: dict[str, Tensor], x_b: Tensor, y_b: Tensor, real_b: Tensor) -> Tensor:
        return self._mean_loss(self._logits(trained, x_b), y_b, real_b)

    def _mean_loss(self, logits_bK: Tensor, y_b: Tensor, real_b: Tensor) -> Tensor:
        losses = self.task.loss(logits_bK, y_b, reduction="none")  # [b], or [b, K]
        return (losses.view(len(losses), -1).mean(1) * real_b).sum() / real_b.sum()

    def _stacked(self) -> dict[str, Tensor]:
        return dict(zip(self.names, (p.detach() for p in self.trained), strict=True))

    def epoch(self, number: int) -> None:
        """Train one epoch."""
        size = self.recipe.batch_size
        self.module.train()
        order_Cn = None if self.shuffle is None else self._order(number)
        for step in range(self.steps):
            batch = slice(step * size, (step + 1) * size)
            if order_Cn is None:
                x, y, mask = (tensor[:, batch] for tensor in self.train)
            else:
                rows_C1 = torch.arange(len(order_Cn), device=order_Cn.device)[:, None]
                x, y, mask = (tensor[rows_C1, order_Cn[:, batch]] for tensor in self.train)
            active_C = mask.any(1)
            if active_C.all():
                self._step(x, y, mask.to(torch.float32), None)
            elif active_C.any():
                number_C = active_C.nonzero()[:, 0]
                self._step(x[number_C], y[number_C], mask[number_C].to(torch.float32), number_C)
            self._schedule("step", number * self.steps + step + 1)
        self._schedule("epoch", number + 1)

    def _step(self, x: Tensor, y: Tensor, real_Cb: Tensor, number_C: Tensor | None) -> None:
        """Train on a batch of every client, or of those with some numbers."""
        stacked = self._stacked()
        own = stacked if number_C is None else {name: p[number_C] for name, p in stacked.items()}
        gradients = vmap(grad(self._loss), randomness="different")(own, x, y, real_Cb)
        if self.recipe.clip_norm:
            scale_C = self._scale(torch.stack([squares(g) for g in gradients.values()]).sum(0))
            gradients = {n: g * scale_C.view(-1, *(1,) * (g.ndim - 1)) for n, g in gradients.items()}
        if number_C is not None:
            assert self.rate is not None
            for name, p in stacked.items():
                p.index_add_(0, number_C, gradients[name], alpha=-self.rate)
            return
        for name, p in zip(self.names, self.trained, strict=True):
            p.grad = gradients[name]
        self.optimizer.step()

    def _scale(self, square_C: Tensor) -> Tensor:
        """Return what clipping multiplies gradients by, as `torch.nn.utils.clip_grad_norm_`; from squared norms."""
        return (self.recipe.clip_norm / (square_C.sqrt() + 1e-6)).clamp(max=1)

    def _order(self, epoch: int) -> Tensor:
        """Return an order of every client's train images, int64 [C, n]; it depends on their number alone."""
        assert self.shuffle is not None
        mask_Cn = self.train.mask
        drawn_n = generator("fit_many", self.shuffle, epoch).random(mask_Cn.shape[1], dtype=np.float32)
        keys_Cn = torch.from_numpy(drawn_n).to(mask_Cn.device) + ~mask_Cn  # padding stays last
        return keys_Cn.argsort(dim=1, stable=True)

    def _schedule(self, interval: str, count: int) -> None:
        if self.scheduler is None:
            return
        scheduler = self.scheduler["scheduler"]
        if hasattr(scheduler, "step_update"):  # of timm, which counts both
            scheduler.step_update(count) if interval == "step" else scheduler.step(count)
        elif self.scheduler["interval"] == interval:
            scheduler.step()

    @torch.no_grad()
    def val_accuracy(self) -> Tensor:
        """Return the accuracy on every client's val images, [C]; 0 without any."""
        if not self.val.y.shape[1]:
            return torch.zeros(len(self.val.y), device=self.val.y.device)
        self.module.eval()
        return accuracy(self.task, vmap(self._logits)(self._stacked(), self.val.x), self.val)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the clients."""
        self.train, self.val = self.train.take(rows), self.val.take(rows)
        for p in self.trained:
            for name, value in self.optimizer.state[p].items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    self.optimizer.state[p][name] = value[rows]
            p.data, p.grad = p.data[rows], None

    def states(self, trained: list[Tensor]) -> dict[str, Tensor]:
        """Return the parameters of the module, for the values of ``trained`` of all clients."""
        return {name: p.detach() for name, p in zip(self.names, trained, strict=True)}
