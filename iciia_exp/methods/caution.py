"""How far a few images of a client may be trusted: so far that clients with all classes are no worse off for it.

After one image a client with all classes looks like any other, so whatever is gained on clients with few classes is
lost on it in part. `choose_caution` asks selection images, dealt at random into clients with all classes, how cautious
a method has to be after 1, 2, 3, 5 and 7 images, to answer such clients as well as the backbone does.

Legend: C clients, S images of a client, K classes, M images, T targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iciia_exp.counts import read_answers
from iciia_exp.data.batches import ClientBatch
from iciia_exp.seeding import generator

__all__ = ["LENGTHS", "caution_after", "choose_caution"]

#: Longest past of each value of a caution; no past belongs to the first, and after the last there is none.
LENGTHS = (1, 2, 3, 5, 7)

_GRID = tuple(range(9))  # in nats
_IMAGES, _DRAWS = 16_384, 20  # of clients to try a length on, at most, and of how many clients an image is
_AT_ONCE = 1024  # images


def caution_after(caution_J: Tensor, n: Tensor) -> Tensor:
    """Return the caution after ``n`` images, of the same shape; ``caution_J`` has a value for each of `LENGTHS`."""
    bounds = torch.tensor([length + 0.5 for length in LENGTHS], device=n.device)
    return torch.cat([caution_J, caution_J.new_zeros(1)])[torch.bucketize(n, bounds)]


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
    """Return which of ``images`` >= ``size`` images clients with all classes have, [C, size]; no client one twice."""
    rng, each = generator("caution", size), images // size
    draws = min(_DRAWS, -(-_IMAGES // (each * size)))
    rows = [rng.permutation(images)[: each * size].reshape(each, size) for _ in range(draws)]
    return torch.from_numpy(np.concatenate(rows)[: _IMAGES // size])


@torch.inference_mode()
def choose_caution(
    caution_J: Tensor,
    stream: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    batches: Sequence[ClientBatch],
) -> dict[str, Any]:
    """Set each value to the least with which neither accuracy nor log-loss is worse than the backbone's.

    Worse by more than a standard error of the paired difference, on clients with all classes. Where the method's own
    answer to a single image is worse than the backbone's, that is compared with: no caution makes it better. Where
    nothing is enough, it is the least that by log-loss is as good as any, within a standard error; where there are too
    few selection images to tell, 0.

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
        parts = [
            read_answers(logits(x_MD[rows])[:, first:].flatten(0, 1), y_M[rows[:, first:]].flatten())
            for rows in rows_CS.split(_AT_ONCE // rows_CS.shape[1])
        ]
        return torch.cat([part.hits_MA[:, 0] for part in parts]).double(), torch.cat([part.loss_M for part in parts])

    chosen = []
    for shorter, longest in zip((0, *LENGTHS[:-1]), LENGTHS, strict=True):
        rows_CS, first = _mixed_clients(len(y_M), longest + 1), shorter + 1
        caution_J.fill_(_GRID[-1])  # of an image by itself: as of a client with all classes
        answers = read(head, rows_CS, first), read(stream, rows_CS[:, first:].reshape(-1, 1), 0)
        hits_T = min((hits for hits, _ in answers), key=torch.mean)
        loss_T = max((loss for _, loss in answers), key=torch.mean)
        tried = []
        for value in _GRID:
            caution_J.fill_(value)
            own_hits_T, own_loss_T = read(stream, rows_CS, first)
            tried.append(own_loss_T)
            if not (_above_zero(hits_T - own_hits_T) or _above_zero(own_loss_T - loss_T)):
                break
        else:
            best_T = min(tried, key=torch.mean)
            value = next(v for v, own_T in zip(_GRID, tried, strict=True) if not _above_zero(own_T - best_T))
        chosen.append(float(value))
    caution_J.copy_(torch.tensor(chosen))
    return {"caution": dict(zip(map(str, LENGTHS), chosen, strict=True))}


def _above_zero(difference_T: Tensor) -> bool:
    """Whether the mean is above 0 by more than its standard error."""
    return bool(difference_T.mean() > difference_T.std() / len(difference_T) ** 0.5)
