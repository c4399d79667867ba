"""Matching: the other clients that are most similar to a client, as the cloud sees it.

Legend: C clients, U clients of the cloud, M matched clients, D features, K classes.
"""

from functools import lru_cache

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn import functional as F

from iciia_exp.data.batches import ClientBatch, ClientIndex
from iciia_exp.data.views import CloudView
from iciia_exp.errors import UserError
from iciia_exp.ledger import Link
from iciia_exp.methods.tune.base import class_counts
from iciia_exp.seeding import generator
from iciia_exp.tasks import CLICK, Task

__all__ = ["MATCHING", "match_clients", "sent_to_match"]

#: Ways of matching.
MATCHING = ("overlap", "nearest", "random")

#: Clients whose mean features are computed together.
_AT_ONCE = 1024


def sent_to_match(way: str, task: Task, dim: int, classes: int) -> tuple[str, int]:
    """Return the kind of the payload that a client is matched by, and its float32 numbers; 0 of the client's number."""
    if way == "nearest":
        return "features", dim
    return ("labels", classes) if way == "overlap" and task != CLICK else ("id", 0)


def match_clients(
    cloud: CloudView, train: ClientBatch, link: Link, task: Task, way: str, most: int, seed: int
) -> np.ndarray:
    """Return M other clients with train images for each of C clients, most similar first, int64 [C, M].

    Args:
        cloud: holds the train images of U clients.
        train: train images of the C clients.
        link: what a client is matched by goes up.
        task: in a click task, ``overlap`` is that of the items of users whom the cloud knows by number.
        way: ``overlap``: cosine similarity of the numbers of images of each class, and of items |A and B| / (|A| |B|);
            ``nearest``: cosine similarity of mean features; ``random``.
        most: M; the cloud has as many other clients at least.
        seed: of the random order; each client has its own.
    """
    there_U, client_C = cloud.clients.train.lengths > 0, train.client_C.cpu()
    kind, _ = sent_to_match(way, task, 0, 0)
    if way == "random":
        numbers = link.up(kind, train.client_C, what="training").tolist()
        clients = np.flatnonzero(there_U)
        drawn = [generator("matching", seed, number).permutation(clients) for number in numbers]
        return np.stack([part[part != number][:most] for part, number in zip(drawn, numbers, strict=True)])
    if kind == "id":
        near_CU = _common_items(cloud, link.up(kind, train.client_C, what="training").cpu().numpy())
    else:
        own = class_counts(train, cloud.num_classes) if way == "overlap" else _mean_features(train)
        own = link.up(kind, own, what="training").cpu()
        near_CU = F.normalize(own, dim=-1) @ _of_all(cloud, way).T
    near_CU[:, ~there_U] = -torch.inf
    known = (client_C >= 0).nonzero()[:, 0]  # the others are new
    near_CU[known, client_C[known]] = -torch.inf
    order_CU = near_CU.argsort(stable=True, dim=1, descending=True)  # of equally similar ones the first
    return order_CU[:, :most].numpy()


def _mean_features(batch: ClientBatch) -> Tensor:
    """Return the mean feature of every client, [C, D]."""
    return (batch.x_CSD * batch.mask_CS.unsqueeze(-1)).sum(1) / batch.mask_CS.sum(1, keepdim=True).clamp(min=1)


def _common_items(cloud: CloudView, client_C: np.ndarray) -> Tensor:
    """Return |A and B| / (|A| |B|) of the items of C clients and of all U, float32 [C, U]."""
    if (client_C < 0).any():
        problem = "overlap of items takes users whom the cloud knows; use matching=nearest or random"
        raise UserError(f"matching: {problem}")
    items_UI = _items_of_all(cloud)
    common_CU = (items_UI[client_C] @ items_UI.T).toarray().astype(np.float32)
    counts_U = np.maximum(items_UI.sum(1), 1).astype(np.float32)
    return torch.from_numpy(common_CU / counts_U[client_C, None] / counts_U)


@lru_cache(1)
def _items_of_all(cloud: CloudView) -> csr_array:
    """Return which items every client of the cloud has, 0 or 1, [U, I]."""
    images, parts = cloud.clients.train, []
    for rows in np.array_split(images.values, max(1, len(images.values) // 65536)):
        batch = cloud[ClientIndex(rows[:, None], np.zeros(len(rows), dtype=np.int64))]
        parts.append(batch.arrays["images"][:, 0, 1].long().numpy())
    items = np.concatenate(parts)
    found = csr_array((np.ones(len(items)), (images.row_numbers, items)), shape=(len(images), int(items.max()) + 1))
    found.data[:] = 1  # equal ones were added up
    return found


@lru_cache(1)  # devices come in shards, and each would compute it again
def _of_all(cloud: CloudView, way: str) -> Tensor:
    """Return class counts or mean features of all clients of the cloud, of length 1, [U, ...]."""
    if way == "overlap":
        return F.normalize(torch.from_numpy(cloud.class_counts("train")), dim=-1)
    images, parts = cloud.clients.train, []
    for ids in np.split(np.arange(len(images)), range(_AT_ONCE, len(images), _AT_ONCE)):
        index = images.padded(ids, int(images.lengths[ids].max()))
        parts.append(_mean_features(cloud[ClientIndex(index, ids)]))
    return F.normalize(torch.cat(parts), dim=-1)
