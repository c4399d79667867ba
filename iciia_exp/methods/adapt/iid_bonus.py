"""IID bonus: log-odds added to the hypothesis that a client has all classes, so that such clients lose nothing.

After one image a client with all classes looks like any other, so whatever is gained on clients with few classes is
lost on it in part. `choose_iid_bonus` asks val images, dealt at random into clients with all classes, how careful
a method has to be after 1, 2, 3, 5 and 7 images, to answer such clients as well as the backbone does.

In a client with all classes the past says nothing, so what an image shows is all that there is to know of it: it has
each class with the probability that the method, calibrated on val clients, gives it by itself. What an answer
is worth is therefore counted by those probabilities and not by the image's label, whose chance would make two samples
of some thousand images differ by a nat and more in what they ask for.

Legend: C clients, S images of a client, D features, K classes, M images, T targets in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iciia_exp.data.batches import ClientBatch
from iciia_exp.seeding import generator

__all__ = ["LENGTHS", "choose_iid_bonus", "iid_bonus_after"]

#: Longest past of each value of a iid_bonus; no past belongs to the first, and after the last there is none.
LENGTHS = (1, 2, 3, 5, 7)

_GRID, _FINER = tuple(map(float, range(9))), (0.5, 0.25)  # in nats
_TOLERATED = 0.002  # of accuracy, and of log-loss in nats
_IMAGES, _DRAWS = 16_384, 20  # of clients to try a length on, at most, and of how many clients an image is
_AT_ONCE = 1024  # images


def iid_bonus_after(iid_bonus_J: Tensor, n: Tensor) -> Tensor:
    """Return the iid_bonus after ``n`` images, of the same shape; ``caution_J`` has a value for each of `LENGTHS`."""
    bounds = torch.tensor([length + 0.5 for length in LENGTHS], device=n.device)
    return torch.cat([iid_bonus_J, iid_bonus_J.new_zeros(1)])[torch.bucketize(n, bounds)]


def _images(batches: Sequence[ClientBatch]) -> Tensor:
    """Return the features of the batches' images, each once, [M, D]."""
    x_MD = torch.cat([batch.x_CSD[batch.mask_CS] for batch in batches])
    if all(batch.image_CS is not None for batch in batches):
        number_M = torch.cat([batch.image_CS[batch.mask_CS] for batch in batches])  # type: ignore[index]
        _, first_M = np.unique(number_M.numpy(), return_index=True)
        x_MD = x_MD[first_M]
    return x_MD


def _mixed_clients(images: int, size: int) -> Tensor:
    """Return which of ``images`` >= ``size`` images clients with all classes have, [C, size]; no client one twice."""
    rng, each = generator("caution", size), images // size
    draws = min(_DRAWS, -(-_IMAGES // (each * size)))
    rows = [rng.permutation(images)[: each * size].reshape(each, size) for _ in range(draws)]
    return torch.from_numpy(np.concatenate(rows)[: _IMAGES // size])


@torch.inference_mode()
def choose_iid_bonus(
    iid_bonus_J: Tensor,
    stream: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    batches: Sequence[ClientBatch],
) -> dict[str, Any]:
    """Set each value to the least with which neither accuracy nor log-loss is expected to be below the backbone's.

    On clients with all classes, by more than 0.2 points or 0.002 nats; in quarters of a nat, below the first whole
    number that is enough. Where nothing is enough, because it is not the prior that harms, it is the least whole number
    from which on a nat more takes away no more than that; where there are too few val images, 0.

    Args:
        caution_J: what is set, in place; ``stream`` reads it.
        stream: from features [C, S, D] to every image's logits after those before it, [C, S, K].
        facts: task, sizes, and the backbone's classifier.
        batches: val clients.
    """
    iid_bonus_J.zero_()
    x_MD = _images(batches)
    if len(x_MD) <= LENGTHS[-1]:
        return {}
    iid_bonus_J.fill_(_GRID[-1])  # of an image by itself: as of a client with all classes
    alone_MK = torch.cat([stream(x_1D)[:, 0] for x_1D in x_MD.unsqueeze(1).split(_AT_ONCE)]).softmax(-1)

    def expected(logits: Callable[[Tensor], Tensor], rows_CS: Tensor, first: int) -> tuple[float, float]:
        """Return accuracy and log-loss of the answers to each client's images from the ``first`` on."""
        right, losses = [], []
        for rows in rows_CS.split(_AT_ONCE // rows_CS.shape[1]):
            log_p_TK = logits(x_MD[rows])[:, first:].flatten(0, 1).log_softmax(-1)
            class_TK = alone_MK[rows[:, first:].flatten()]
            right.append(class_TK.gather(1, log_p_TK.argmax(1, keepdim=True))[:, 0])
            losses.append(-(class_TK * log_p_TK).sum(1))
        return float(torch.cat(right).double().mean()), float(torch.cat(losses).double().mean())

    def least(rows_CS: Tensor, first: int) -> float:
        """Return the value for the images from the ``first`` on."""
        accuracy, log_loss = expected(head, rows_CS, first)
        harm: dict[float, float] = {}

        def harmful(value: float) -> bool:
            iid_bonus_J.fill_(value)
            right, loss = expected(stream, rows_CS, first)
            harm[value] = max(accuracy - right, loss - log_loss)
            return harm[value] > _TOLERATED

        value = next((value for value in _GRID if not harmful(value)), None)
        if value is None:
            return next(v for v in _GRID if all(harm[v] - harm[u] <= _TOLERATED * (u - v) for u in _GRID if u > v))
        for step in _FINER if value else ():
            value -= 0.0 if harmful(value - step) else step
        return value

    chosen = []
    for shorter, longest in zip((0, *LENGTHS[:-1]), LENGTHS, strict=True):
        chosen.append(least(_mixed_clients(len(x_MD), longest + 1), shorter + 1))
    iid_bonus_J.copy_(torch.tensor(chosen))
    return {"iid_bonus": dict(zip(map(str, LENGTHS), chosen, strict=True))}
