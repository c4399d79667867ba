"""Training of many small modules at once: one module for each client, on its own images.

The modules have the same structure. Their parameters are stacked, and `torch.func` computes all gradients in one call.
Each module gets the updates of a training by itself: batches in the order of its images, its own clipped gradient,
its own early stopping.

A linear classifier trained by plain SGD has a second form, used where it is cheaper. Gradient steps keep its weights
in W + A^T X, where X are its train images. So A [n, K] is trained, by products of features: the same steps, without
passes over D x K weights.

Legend: C clients, n train images of a client, m val images, b images of a batch, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from iciia_exp.errors import ConfigError, UserError
from iciia_exp.recipe import Recipe
from iciia_exp.seeding import generator
from iciia_exp.tasks import SINGLE_LABEL, Task

__all__ = ["Examples", "Fitted", "choose", "fit_many", "linear_logits"]

# Numbers that the modules trained together hold: 64 MiB.
_NUMBERS = 1 << 24


class Examples(NamedTuple):
    """Labelled images of C clients, padded to the longest client."""

    x: Tensor  # [C, n, ...], what a module reads
    y: Tensor  # int64 [C, n], of a multi-label task 0/1 [C, n, K]
    mask: Tensor  # bool [C, n], False where padded; real images come first

    def take(self, rows: Tensor) -> Examples:
        """Return some of the clients."""
        return Examples(*(tensor[rows] for tensor in self))

    def none(self) -> Examples:
        """Return examples of the same clients without any image."""
        return Examples(*(tensor[:, :0] for tensor in self))


class Fitted(NamedTuple):
    """The trained modules."""

    states: dict[str, Tensor]  # trained parameters by name, [C, ...]
    epochs_C: Tensor  # int64 [C], passes over the train images
    accuracy_C: Tensor  # on the val images, 0 without any, or without ``patience``

    def better(self, other: Fitted) -> Fitted:
        """Return for each client what has the better accuracy on its val images; equal ones are this one's."""
        other_C = other.accuracy_C > self.accuracy_C
        states = {name: choose(other_C, other.states[name], own) for name, own in self.states.items()}
        epochs_C = torch.where(other_C.cpu(), other.epochs_C, self.epochs_C)
        return Fitted(states, epochs_C, torch.where(other_C, other.accuracy_C, self.accuracy_C))


def choose(first_C: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return for every client the first of two tensors [C, ...] where ``first_C``, else the second."""
    return torch.where(first_C.view(-1, *(1,) * (one.ndim - 1)), one, other)


def fit_many(
    module: nn.Module,
    train: Examples,
    val: Examples,
    task: Task,
    recipe: Recipe,
    patience: int | None = None,
    starts: Mapping[str, Tensor] | None = None,
    shuffle: int | None = None,
    clip_rows: bool = False,
) -> Fitted:
    """Train a copy of ``module`` for every client.

    Args:
        module: maps [b, ...] to logits [b, K]; its trained parameters are the start of every client's.
        train: images that it is trained on. A client without any keeps the start.
        val: images that choose the epoch, and end the training; used with ``patience``.
        task: its loss is the mean over a batch.
        recipe: optimiser, scheduler, epochs, batch size and clipping, for each module by itself. The optimiser must
            treat every number of a tensor by itself, as SGD and AdamW do.
        patience: epochs without a better accuracy on the client's val images before its training stops. The best epoch
            is kept, the start if none is better. None: all epochs, and the last is kept.
        starts: start of some parameters for each client, [C, ...] by name; the others start as in ``module``.
        shuffle: seed of a new order of the train images in every epoch; it is the same for clients with equally many.
            None: the order of the images.
        clip_rows: count every row that a module reads of its tables by itself in the norm of the gradient, as
            TensorFlow does with sparse gradients, and not the rows of equal ids together. The module has ``taps(x)``,
            zeros that its ``forward(x, taps)`` adds to such rows, by name of the table's parameter.

    Raises:
        ConfigError: the optimiser mixes the numbers of a tensor.
        UserError: the module has layers that training changes without gradients, such as batch norm.
    """
    norms = [layer for layer in module.train().modules() if isinstance(layer, nn.modules.batchnorm._NormBase)]
    if any(layer.training and layer.track_running_stats for layer in norms):
        raise UserError(f"{type(module).__name__}: batch norm cannot be trained for many clients at once")
    _check_elementwise(recipe)
    starts = starts or {}
    start = {name: p.detach() for name, p in module.named_parameters() if _is_trained(module, p)}
    clients, lengths_C = len(train.y), train.mask.sum(1)
    states = {name: p.new_empty(clients, *p.shape) for name, p in start.items()}
    epochs_C, accuracy_C = torch.zeros(clients, dtype=torch.int64), torch.zeros(clients, device=train.x.device)
    steps_C = -(-lengths_C // recipe.batch_size)
    order = torch.argsort(lengths_C, stable=True)
    for steps in steps_C.unique().tolist():
        if not steps:  # no images
            for name, p in start.items():
                states[name][lengths_C == 0] = p if name not in starts else starts[name][lengths_C == 0]
            continue
        same = order[steps_C[order] == steps]  # as many steps for each, so that none gets an empty one
        plain = shuffle is None and set(starts) in (set(), set(start)) and _is_dual(module, task, recipe)
        dual = plain and steps * recipe.batch_size <= 2 * train.x.shape[-1]
        for rows in same.split(_at_once(start, train, val, int(lengths_C[same].max()), dual)):
            longest = int(lengths_C[rows].max())
            few = Examples(*(tensor[rows, :longest] for tensor in train))
            own = {name: values[rows] for name, values in starts.items()}
            together: _Together
            if dual:
                together = _Dual(own or start, few, val.take(rows), task, recipe)
            else:
                together = _Stacked(module, start, few, val.take(rows), task, recipe, steps, own, shuffle, clip_rows)
            best, epochs_C[rows], accuracy_C[rows] = _train(together, recipe.epochs, patience)
            for name, values in together.states(best).items():
                states[name][rows] = values
    return Fitted(states, epochs_C, accuracy_C)


def _is_trained(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is trained: all are where none asks for gradients, as after a training."""
    return parameter.requires_grad or not any(p.requires_grad for p in module.parameters())


def _at_once(start: dict[str, Tensor], train: Examples, val: Examples, longest: int, dual: bool) -> int:
    """Return how many clients are trained together."""
    weights = sum(p.numel() for p in start.values())
    inputs = (longest + val.y.shape[1]) * train.x[0, 0].numel()
    if dual:
        classes = start["bias"].numel()
        own = (longest + val.y.shape[1]) * (longest + 3 * classes)
    else:
        own = 6 * weights  # gradients, moments and the best epoch
    return max(1, _NUMBERS // (own + inputs + 1))


class _Together(Protocol):
    """Modules of some clients in training."""

    #: What is trained, [C, ...] each.
    trained: list[Tensor]

    def epoch(self, number: int) -> None:
        """Train one epoch."""

    def val_accuracy(self) -> Tensor:
        """Return the accuracy on every client's val images, [C]; 0 without any."""

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the clients."""

    def states(self, trained: list[Tensor]) -> dict[str, Tensor]:
        """Return the parameters of the module, for the values of ``trained`` of all clients."""


def _train(together: _Together, epochs: int, patience: int | None) -> tuple[list[Tensor], Tensor, Tensor]:
    """Train with early stopping; return the best values of what is trained, every client's epochs and accuracy."""
    if patience is None:
        for number in range(epochs):
            together.epoch(number)
        clients = len(together.trained[0])
        return together.trained, torch.full((clients,), epochs), together.trained[0].new_zeros(clients)
    best, best_C = [t.clone() for t in together.trained], together.val_accuracy()
    waited_C, epochs_C = torch.zeros_like(best_C, dtype=torch.int64), torch.zeros(len(best_C), dtype=torch.int64)
    here = torch.arange(len(best_C), device=best_C.device)  # clients that are still computed
    for number in range(epochs):
        active = waited_C[here] < patience
        if not active.any():
            break
        if 4 * int(active.sum()) <= 3 * len(here):  # a copy costs about as much as an epoch of a few clients
            together.keep(active.nonzero()[:, 0])
            here = here[active]
            active = active[active]
        together.epoch(number)
        epochs_C[here[active].cpu()] += 1
        now_c = together.val_accuracy()
        better = active & (now_c > best_C[here])
        rows = here[better]
        best_C[rows], waited_C[here] = now_c[better], torch.where(better, 0, waited_C[here] + 1)
        for kept, current in zip(best, together.trained, strict=True):
            kept[rows] = current[better]
    return best, epochs_C, best_C


def _accuracy(task: Task, logits_CmK: Tensor, val: Examples) -> Tensor:
    """Return every client's accuracy, [C]; 0 without images."""
    correct_Cm = task.correct(logits_CmK.flatten(0, 1), val.y.flatten(0, 1)).float().mean(-1).view(val.mask.shape)
    return (correct_Cm * val.mask).sum(1) / val.mask.sum(1).clamp(min=1)


class _Stacked:
    """Any module: stacked parameters, gradients by `torch.func`."""

    def __init__(
        self,
        module: nn.Module,
        start: dict[str, Tensor],
        train: Examples,
        val: Examples,
        task: Task,
        recipe: Recipe,
        steps: int,
        starts: Mapping[str, Tensor],
        shuffle: int | None,
        clip_rows: bool = False,
    ) -> None:
        self.module, self.train, self.val, self.task, self.recipe, self.steps = module, train, val, task, recipe, steps
        self.shuffle, self.clip_rows = shuffle, clip_rows
        self.names = list(start)
        fixed = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.fixed = {name: t.detach() for name, t in fixed.items() if name not in start}
        clients = len(train.y)
        stacked = [nn.Parameter(starts.get(n, p.expand(clients, *p.shape)).clone()) for n, p in start.items()]
        self.trained: list[Tensor] = [*stacked]
        self.optimizer = recipe.make_optimizer(stacked)
        self.scheduler = recipe.make_scheduler(self.optimizer, steps * recipe.epochs, recipe.epochs)
        self.gradients = vmap(grad(self._loss, argnums=(0, 1) if clip_rows else 0), randomness="different")

    def _logits(self, trained: dict[str, Tensor], x_b: Tensor, *taps: dict[str, Tensor]) -> Tensor:
        return functional_call(self.module, {**self.fixed, **trained}, (x_b, *taps))

    def _loss(self, trained: dict[str, Tensor], *batch: Any) -> Tensor:
        *taps, x_b, y_b, real_b = batch
        losses = self.task.loss(self._logits(trained, x_b, *taps), y_b, reduction="none")  # [b], or [b, K]
        return (losses.view(len(losses), -1).mean(1) * real_b).sum() / real_b.sum()

    def epoch(self, number: int) -> None:
        """Train one epoch."""
        size, clip = self.recipe.batch_size, self.recipe.clip_norm
        self.module.train()
        order_Cn = None if self.shuffle is None else self._order(number)
        for step in range(self.steps):
            batch = slice(step * size, (step + 1) * size)
            if order_Cn is None:
                x, y, mask = (tensor[:, batch] for tensor in self.train)
            else:
                rows_C1 = torch.arange(len(order_Cn), device=order_Cn.device)[:, None]
                x, y, mask = (tensor[rows_C1, order_Cn[:, batch]] for tensor in self.train)
            stacked = dict(zip(self.names, (p.detach() for p in self.trained), strict=True))
            real = mask.to(torch.float32)
            if self.clip_rows:
                gradients, rows = self.gradients(stacked, vmap(self.module.taps)(x), x, y, real)  # type: ignore[arg-type]
            else:
                gradients, rows = self.gradients(stacked, x, y, real), {}
            if clip:
                parts = (rows | {n: g for n, g in gradients.items() if n not in rows}).values()
                norm_C = torch.stack([g.flatten(1).square().sum(1) for g in parts]).sum(0).sqrt()
                scale_C = (clip / (norm_C + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
                gradients = {n: g * scale_C.view(-1, *(1,) * (g.ndim - 1)) for n, g in gradients.items()}
            for name, p in zip(self.names, self.trained, strict=True):
                p.grad = gradients[name]
            self.optimizer.step()
            self._schedule("step", number * self.steps + step + 1)
        self._schedule("epoch", number + 1)

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
        stacked = dict(zip(self.names, (p.detach() for p in self.trained), strict=True))
        return _accuracy(self.task, vmap(self._logits)(stacked, self.val.x), self.val)

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


class _Dual:
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
        self.lr = recipe.make_optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"]
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
            step = self.lr
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
        return _accuracy(self.task, self.start_CmK + torch.bmm(self.near_Cmn, change_CnK) + bias_C1K, self.val)

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


def _is_dual(module: nn.Module, task: Task, recipe: Recipe) -> bool:
    """Return whether it is a linear classifier with a softmax, trained by plain SGD at a constant rate."""
    if type(module) is not nn.Linear or module.bias is None or task != SINGLE_LABEL or recipe.scheduler is not None:
        return False
    optimizer = recipe.make_optimizer([nn.Parameter(torch.zeros(1))])
    group = optimizer.param_groups[0]
    plain = not (group.get("momentum") or group.get("weight_decay") or group.get("maximize"))
    return type(optimizer) is torch.optim.SGD and plain


def _check_elementwise(recipe: Recipe) -> None:
    """Raise a `ConfigError` if an optimiser's step of a number depends on the other numbers of the tensor."""
    values = torch.tensor([[1.0, -2.0, 0.5], [300.0, 20.0, -40.0]])

    def stepped(start: Tensor) -> Tensor:
        p = nn.Parameter(start.clone())
        optimizer = recipe.make_optimizer([p])
        for _ in range(2):
            p.grad = 0.1 * p.detach() + 1.0
            optimizer.step()
        return p.detach()

    together, alone = stepped(values), torch.cat([stepped(row[None]) for row in values])
    if not torch.allclose(together, alone, rtol=1e-5, atol=1e-6):
        optimizer = recipe.optimizer.func if isinstance(recipe.optimizer, partial) else recipe.optimizer
        problem = "mixes the numbers of a tensor, and would mix clients; use SGD, Adam or AdamW"
        raise ConfigError("optimizer", getattr(optimizer, "__name__", optimizer), problem)
