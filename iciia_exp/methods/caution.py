"""How far a few images of a client may be trusted: so far that clients with all classes are no worse off for it.

After one image a client with all classes looks like any other, so whatever is gained on clients with few classes is
lost on it in part. `choose_caution` asks selection images, dealt at random into clients with all classes, how cautious
a method has to be after 1, 2, 3, 5, 7 and 15 images, to answer such clients as well as the backbone does.

Legend: C clients, S images of a client, K classes, M images, T targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iciia_exp import tasks
from iciia_exp.data.batches import ClientBatch
from iciia_exp.seeding import generator

__all__ = ["LENGTHS", "caution_after", "choose_caution"]

#: Longest past of each value of a caution; no past belongs to the first, longer ones to the last.
LENGTHS = (1, 2, 3, 5, 7, 15)

_GRID = tuple(range(9))  # in nats
_IMAGES, _DRAWS = 16_384, 20  # of clients to try a length on, at most, and of how many clients an image is
_AT_ONCE = 1024  # images


def caution_after(caution_J: Tensor, n: Tensor) -> Tensor:
    """Return the caution after ``n`` images, of the same shape; ``caution_J`` has a value for each of `LENGTHS`."""
    bounds = torch.tensor([length + 0.5 for length in LENGTHS[:-1]], device=n.device)
    return caution_J[torch.bucketize(n, bounds)]


def _images(batches: Sequence[ClientBatch]) -> tuple[Tensor, Tensor]:
    """Return features [M, D] and labels [M] of the batches' images, each once."""
    x_MD = torch.cat([batch.x_CSD[batch.mask_CS] for batch in batches])
    y_M = torch.cat([batch.y_CS[batch.mask_CS] for batch in batches])
    if all(batch.image_CS is not None for batch in batches):
        number_M = torch.cat([batch.image_CS[batch.mask_CS] for batch in batches])  # type: ignore[index]
        _, first_M = np.unique(number_M.numpy(), return_index=True)
        x_MD, y_M = x_MD[first_M], y_M[first_M]
    return x_MD, y_M


def _mixed_clients(images: int, size: int) -> Tensor:
    """Return which of so many images clients with all classes have, [C, size]; no client has an image twice."""
    rng, each = generator("caution", size), images // size
    draws = min(_DRAWS, -(-_IMAGES // (each * size))) if each else 0
    rows = [rng.permutation(images)[: each * size].reshape(each, size) for _ in range(draws)]
    return torch.from_numpy(np.concatenate(rows)[: _IMAGES // size] if rows else np.empty((0, size), dtype=np.int64))


@torch.inference_mode()
def choose_caution(
    caution_J: Tensor,
    stream: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    batches: Sequence[ClientBatch],
) -> dict[str, Any]:
    """Set each value to the least with which neither accuracy nor log-loss is worse than the backbone's.

    Worse by more than a standard error of the paired difference, on clients with all classes; the most of the grid
    where there is none. Values stay 0 where there are too few selection images to tell.

    Args:
        caution_J: what is set, in place; ``stream`` reads it.
        stream: from features [C, S, D] to every image's logits after those before it, [C, S, K].
        head: the backbone's classifier.
        batches: selection clients.
    """
    caution_J.zero_()
    x_MD, y_M = _images(batches)
    if len(y_M) <= LENGTHS[-1]:
        return {}

    def read(logits: Callable[[Tensor], Tensor], rows_CS: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Return hits and log-loss of each client's images from the ``first`` on, float64 [T]."""
        hits, losses = [], []
        for rows in rows_CS.split(_AT_ONCE // rows_CS.shape[1]):
            b_TK, y_T = logits(x_MD[rows])[:, first:].flatten(0, 1), y_M[rows[:, first:]].flatten()
            hits.append(tasks.hits(b_TK, y_T)[:, 0].double())
            losses.append(tasks.log_loss(b_TK, y_T))
        return torch.cat(hits), torch.cat(losses)

    chosen = []
    for shorter, longest in zip((0, *LENGTHS[:-1]), LENGTHS, strict=True):
        rows_CS, first = _mixed_clients(len(y_M), longest + 1), shorter + 1
        hits_T, loss_T = read(head, rows_CS, first)
        for value in _GRID:
            caution_J.fill_(value)
            own_hits_T, own_loss_T = read(stream, rows_CS, first)
            if not (_above_zero(hits_T - own_hits_T) or _above_zero(own_loss_T - loss_T)):
                break
        chosen.append(float(value))
    caution_J.copy_(torch.tensor(chosen))
    return {"caution": dict(zip(map(str, LENGTHS), chosen, strict=True))}


def _above_zero(difference_T: Tensor) -> bool:
    """Whether the mean is above 0 by more than its standard error."""
    return bool(difference_T.mean() > difference_T.std() / len(difference_T) ** 0.5)
