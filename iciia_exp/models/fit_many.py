"""Training of many small modules at once: one module for each client, on its own images.

The modules have the same structure. Their parameters are stacked, and `torch.func` computes all gradients in one call.
Each module gets the updates of a training by itself: batches in the order of its images, its own clipped gradient,
its own early stopping.

There are three forms with the same steps: of any module (`iciia_exp.models.stacked`), and by plain SGD of linear
classifiers, where it is cheaper, and of click models, whose tables are large.

Legend: C clients, n train images of a client, m val images, b images of a batch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from iciia_exp.errors import ConfigError, UserError
from iciia_exp.models.on_catalog import OnCatalog
from iciia_exp.models.stacked import Examples, Stacked, Together, plain_rate
from iciia_exp.models.stacked_linear import StackedLinear, is_plain_linear
from iciia_exp.models.stacked_tables import StackedTables
from iciia_exp.recipe import Recipe
from iciia_exp.tasks import Task

__all__ = ["Fitted", "choose", "fit_many"]

# Numbers that the modules trained together hold: 64 MiB.
_NUMBERS = 1 << 24
# The same of click models: 256 MiB.
_TABLE_NUMBERS = 1 << 26


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
            is kept, the start if none is better; without val images, and with None, the last of all epochs.
        starts: start of some parameters for each client, [C, ...] by name; the others start as in ``module``.
        shuffle: seed of a new order of the train images in every epoch; it is the same for clients with equally many.
            None: the order of the images.
        clip_rows: of a click model, see `iciia_exp.models.stacked_tables.StackedTables`.

    Raises:
        ConfigError: the optimiser mixes the numbers of a tensor, or a click model is not trained by plain SGD.
        UserError: the module has layers that training changes without gradients, such as batch norm.
    """
    norms = [layer for layer in module.train().modules() if isinstance(layer, nn.modules.batchnorm._NormBase)]
    if any(layer.training and layer.track_running_stats for layer in norms):
        raise UserError(f"{type(module).__name__}: batch norm cannot be trained for many clients at once")
    _check_elementwise(recipe)
    starts = starts or {}
    start = {name: p.detach() for name, p in module.named_parameters() if _is_trained(module, p)}
    clients, lengths_C = len(train.y), train.mask.sum(1)
    if isinstance(module, OnCatalog):
        make = partial(StackedTables, module, start, task=task, recipe=recipe, shuffle=shuffle, clip_rows=clip_rows)
        return _fit_in_place(make, start, train, val, recipe.epochs, patience, starts)
    states = {name: p.new_empty(clients, *p.shape) for name, p in start.items()}
    epochs_C, accuracy_C = torch.zeros(clients, dtype=torch.int64), torch.zeros(clients, device=train.x.device)
    steps_C = -(-lengths_C // recipe.batch_size)
    plain = shuffle is None and set(starts) in (set(), set(start)) and is_plain_linear(module, task, recipe)
    if (empty_C := lengths_C == 0).any():
        for name, p in start.items():
            states[name][empty_C] = p if name not in starts else starts[name][empty_C]
    order = torch.argsort(lengths_C, stable=True)
    linear_C = steps_C * recipe.batch_size <= (2 * train.x.shape[-1] if plain else 0)
    # clients with as many steps together: most optimisers would change a client in a step without its images
    group_C = torch.where(linear_C, steps_C, -1) if plain_rate(recipe) is not None else steps_C
    for group in group_C[~empty_C].unique():
        same = order[(group_C == group)[order] & ~empty_C[order]]
        linear = bool(linear_C[same].all())
        for rows in same.split(_at_once(start, train, val, int(lengths_C[same].max()), linear)):
            few = train.take(rows).cut()
            own = {name: values[rows] for name, values in starts.items()}
            together: Together
            if linear:
                together = StackedLinear(own or start, few, val.take(rows), task, recipe)
            else:
                together = Stacked(module, start, few, val.take(rows), task, recipe, own, shuffle)
            best, epochs_C[rows], accuracy_C[rows] = _train(together, recipe.epochs, patience)
            for name, values in together.states(best).items():
                states[name][rows] = values
    return Fitted(states, epochs_C, accuracy_C)


def _is_trained(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is trained: all are where none asks for gradients, as after a training."""
    return parameter.requires_grad or not any(p.requires_grad for p in module.parameters())


def _fit_in_place(
    make: Callable[..., Stacked],
    start: dict[str, Tensor],
    train: Examples,
    val: Examples,
    epochs: int,
    patience: int | None,
    starts: Mapping[str, Tensor],
) -> Fitted:
    """Train modules of any numbers of steps, some at a time; of their parameters nothing is copied but the start."""
    clients, lengths_C = len(train.y), train.mask.sum(1)
    states = {name: starts.get(name, p.expand(clients, *p.shape)).clone() for name, p in start.items()}
    epochs_C, accuracy_C = torch.zeros(clients, dtype=torch.int64), torch.zeros(clients, device=train.x.device)
    numbers = sum(p.numel() for p in start.values())
    numbers += (train.y.shape[1] + val.y.shape[1]) * math.prod(train.x.shape[2:])
    size = max(1, _TABLE_NUMBERS // numbers)
    for at in range(0, clients, size):
        rows = slice(at, at + size)
        own = {name: values[rows] for name, values in states.items()}
        together = make(train=train.take(rows).cut(), val=val.take(rows), starts=own)
        best, epochs_C[rows], accuracy_C[rows] = _train(together, epochs, patience)
        if patience is not None:
            for name, values in zip(start, best, strict=True):
                states[name][rows] = values
    epochs_C[lengths_C.cpu() == 0] = 0
    return Fitted(states, epochs_C, accuracy_C)


def _at_once(start: dict[str, Tensor], train: Examples, val: Examples, longest: int, linear: bool) -> int:
    """Return how many clients are trained together."""
    weights = sum(p.numel() for p in start.values())
    inputs = (longest + val.y.shape[1]) * train.x[0, 0].numel()
    if linear:
        classes = start["bias"].numel()
        own = (longest + val.y.shape[1]) * (longest + 3 * classes)
    else:
        own = 6 * weights  # gradients, moments and the best epoch
    return max(1, _NUMBERS // (own + inputs + 1))


def _train(together: Together, epochs: int, patience: int | None) -> tuple[list[Tensor], Tensor, Tensor]:
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
        # without val images there is nothing to choose by, and the last epoch is kept
        better = active & ((now_c > best_C[here]) | ~together.val.mask.any(1))
        rows = here[better]
        best_C[rows], waited_C[here] = now_c[better], torch.where(better, 0, waited_C[here] + 1)
        for kept, current in zip(best, together.trained, strict=True):
            kept[rows] = current[better]
    return best, epochs_C, best_C


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
