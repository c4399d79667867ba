"""Matching: the other clients that are most similar to a client, as the cloud sees it.

Legend: C clients, U clients of the cloud, M matched clients, D features, K classes.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from iciia_exp.data.batches import ClientBatch, ClientIndex
from iciia_exp.data.views import CloudView
from iciia_exp.ledger import Link
from iciia_exp.methods.tune.base import class_counts
from iciia_exp.seeding import generator

__all__ = ["MATCHING", "match_clients"]

#: Kind of payload that goes up, by way of matching: counts of classes, a mean feature, or the client's number.
MATCHING = {"overlap": "labels", "nearest": "features", "random": "id"}

#: Clients whose mean features are computed together.
_AT_ONCE = 1024


def match_clients(cloud: CloudView, train: ClientBatch, link: Link, way: str, most: int, seed: int) -> np.ndarray:
    """Return M other clients with train images for each of C clients, most similar first, int64 [C, M].

    Args:
        cloud: holds the train images of U clients.
        train: train images of the C clients.
        link: what a client is matched by goes up.
        way: ``overlap``: cosine similarity of the numbers of images of each class; ``nearest``: that of mean features;
            ``random``.
        most: M; the cloud has as many other clients at least.
        seed: of the random order; each client has its own.
    """
    there_U, client_C = cloud.clients.train.lengths > 0, train.client_C.cpu()
    if way == "random":
        numbers = link.up(MATCHING[way], train.client_C, what="training").tolist()
        clients = np.flatnonzero(there_U)
        drawn = [generator("matching", seed, number).permutation(clients) for number in numbers]
        return np.stack([part[part != number][:most] for part, number in zip(drawn, numbers, strict=True)])
    own = class_counts(train, cloud.num_classes) if way == "overlap" else _mean_features(train)
    own = link.up(MATCHING[way], own, what="training").cpu()
    near_CU = F.normalize(own, dim=-1) @ _of_all(cloud, way).T
    near_CU[:, ~there_U] = -torch.inf
    known = (client_C >= 0).nonzero()[:, 0]  # the others are new
    near_CU[known, client_C[known]] = -torch.inf
    order_CU = near_CU.argsort(stable=True, dim=1, descending=True)  # of equally similar ones the first
    return order_CU[:, :most].numpy()


def _mean_features(batch: ClientBatch) -> Tensor:
    """Return the mean feature of every client, [C, D]."""
    return (batch.x_CSD * batch.mask_CS.unsqueeze(-1)).sum(1) / batch.mask_CS.sum(1, keepdim=True).clamp(min=1)


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
