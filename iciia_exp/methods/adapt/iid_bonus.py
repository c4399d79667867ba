"""IID bonus: log-odds added to the hypothesis that a client has all classes, so that such clients lose nothing.

After one image a client with all classes looks like any other, so a method that gains on clients with few classes loses
on it. `choose_iid_bonus` finds the least bonus after 1, 2, 3, 5 and 7 images with which val images, dealt at random
into clients with all classes, are classified as well as by the backbone.

In a client with all classes the past carries no information: an image has each class with the probability that the
method, calibrated on val clients, gives it by itself. Accuracy and log-loss are expectations under those probabilities,
not counts of labels: with labels, two samples of some thousand images would differ by a nat or more in the bonus.

Legend: C clients, S images of a client, D features, K classes, M images, T targets in all.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iciia_exp.data.batches import ClientBatch
from iciia_exp.seeding import generator

__all__ = ["LENGTHS", "choose_iid_bonus", "iid_bonus_after"]

#: Longest past of each value of an iid_bonus; no past counts as the first, and beyond the last the bonus is 0.
LENGTHS = (1, 2, 3, 5, 7)

_GRID, _FINER = tuple(map(float, range(9))), (0.5, 0.25)  # in nats
_TOLERATED = 0.002  # of accuracy, and of log-loss in nats
_IMAGES, _DRAWS = 16_384, 20  # images of a length's clients at most, and clients of each image
_AT_ONCE = 1024  # images


def iid_bonus_after(iid_bonus_J: Tensor, n: Tensor) -> Tensor:
    """Return the iid_bonus after ``n`` images, of the shape of ``n``, from its values at `LENGTHS`."""
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
    """Return the numbers of the images of clients with all classes, [C, size], different ones in each."""
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
    """Set each value to the least with which clients with all classes are expected to lose nothing.

    They lose nothing where accuracy and log-loss are within 0.2 points and 0.002 nats of the backbone's. Values are
    whole numbers of nats, refined to quarters. Where no value is enough, because it is not the prior that harms, the
    least one is taken from which on another nat gains no more than that; with too few val images, 0.

    Args:
        iid_bonus_J: the values, set in place; ``stream`` reads them.
        stream: from features [C, S, D] to every image's logits after those before it, [C, S, K].
        head: the backbone's classifier.
        batches: val clients.
    """
    iid_bonus_J.zero_()
    x_MD = _images(batches)
    if len(x_MD) <= LENGTHS[-1]:
        return {}
    iid_bonus_J.fill_(_GRID[-1])  # the posterior of an image by itself, as in a client with all classes
    alone_MK = torch.cat([stream(x_1D)[:, 0] for x_1D in x_MD.unsqueeze(1).split(_AT_ONCE)]).softmax(-1)

    def expected(logits: Callable[[Tensor], Tensor], rows_CS: Tensor, first: int) -> tuple[float, float]:
        """Return the expected accuracy and log-loss of each client's images from the ``first`` on."""
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
