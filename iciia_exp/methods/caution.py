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
_CLIENTS, _DRAWS = 2048, 20  # at most so many clients, and so many that an image is of
_AT_ONCE = 64  # clients


def caution_after(caution_J: Tensor, n: Tensor) -> Tensor:
    """Return the caution after ``n`` images, of the same shape; ``caution_J`` has a value for each of `LENGTHS`."""
    bounds = torch.tensor([length + 0.5 for length in LENGTHS[:-1]], device=n.device)
    return caution_J[torch.bucketize(n, bounds)]


def _mixed_clients(batches: Sequence[ClientBatch]) -> tuple[Tensor, Tensor, Tensor]:
    """Return features [M, D], labels [M], and which of them each client with all classes has, [C, S], none twice."""
    x_MD = torch.cat([batch.x_CSD[batch.mask_CS] for batch in batches])
    y_M = torch.cat([batch.y_CS[batch.mask_CS] for batch in batches])
    if all(batch.image_CS is not None for batch in batches):
        number_M = torch.cat([batch.image_CS[batch.mask_CS] for batch in batches])  # type: ignore[index]
        _, first_M = np.unique(number_M.numpy(), return_index=True)
        x_MD, y_M = x_MD[first_M], y_M[first_M]
    size, rng = LENGTHS[-1] + 1, generator("caution")
    each = len(y_M) // size
    draws = min(_DRAWS, -(-_CLIENTS // each)) if each else 0
    rows = [torch.from_numpy(rng.permutation(len(y_M))[: each * size].reshape(each, size)) for _ in range(draws)]
    rows_CS = torch.cat(rows)[:_CLIENTS] if rows else torch.empty(0, size, dtype=torch.long)
    return x_MD, y_M, rows_CS


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
    x_MD, y_M, rows_CS = _mixed_clients(batches)
    if not len(rows_CS):
        return {}

    def read(logits: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return hits and log-loss of every image, float64 [C, S]."""
        hits, losses = [], []
        for rows in rows_CS.split(_AT_ONCE):
            b_TK, y_T = logits(x_MD[rows]).flatten(0, 1), y_M[rows].flatten()
            hits.append(tasks.hits(b_TK, y_T)[:, 0].double())
            losses.append(tasks.log_loss(b_TK, y_T))
        return torch.cat(hits).view(rows_CS.shape), torch.cat(losses).view(rows_CS.shape)

    hits_CS, loss_CS = read(head)
    starts = (0, *LENGTHS[:-1])
    found: dict[int, int] = {}
    for value in _GRID:
        caution_J.fill_(value)
        own_hits_CS, own_loss_CS = read(stream)
        for j, (shorter, longest) in enumerate(zip(starts, LENGTHS, strict=True)):
            some = slice(shorter + 1, longest + 1)
            losses = (hits_CS - own_hits_CS)[:, some], (own_loss_CS - loss_CS)[:, some]
            if j not in found and not any(_above_zero(loss_T.flatten()) for loss_T in losses):
                found[j] = value
        if len(found) == len(LENGTHS):
            break
    caution_J.copy_(torch.tensor([float(found.get(j, _GRID[-1])) for j in range(len(LENGTHS))]))
    return {"caution": dict(zip(map(str, LENGTHS), caution_J.tolist(), strict=True))}


def _above_zero(difference_T: Tensor) -> bool:
    """Whether the mean is above 0 by more than its standard error."""
    return bool(difference_T.mean() > difference_T.std() / len(difference_T) ** 0.5)
