"""Retrieval: the samples of a pool that are nearest to any of a client's, by cosine similarity.

Legend: C clients, n queries of a client, N samples of the pool, R numbers of a representation, m samples for a client.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.neighbors import NearestNeighbors

__all__ = ["Pool"]


class Pool:
    """Samples with owners, searched exactly.

    Args:
        unit_NR: representations of length 1, float32; 4 N R bytes stay in memory.
        owner_N: number of each sample's client.
    """

    def __init__(self, unit_NR: np.ndarray, owner_N: np.ndarray) -> None:
        self.owner_N, self._owners = owner_N, np.sort(owner_N)
        # of vectors of length 1, the Euclidean distance gives the order of the cosine, and is searched faster
        self._neighbours = NearestNeighbors(algorithm="brute", metric="euclidean").fit(unit_NR)

    def __len__(self) -> int:
        return len(self.owner_N)

    def nearest(self, queries: Sequence[np.ndarray], clients: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
        """Return the samples that are nearest to any query of a client, nearest first, without the client's own.

        Args:
            queries: representations [n, R] of C clients, of length 1.
            clients: their numbers, int64 [C]; of a client that owns none of the samples any other number.
            counts: m of each client; fewer are found if others have fewer samples.
        """
        # the m nearest to any query are among the m nearest others to each
        own_C = np.searchsorted(self._owners, clients, "right") - np.searchsorted(self._owners, clients, "left")
        most = int(min(len(self), (counts + own_C).max(initial=0)))
        if not most:
            return [np.empty(0, dtype=np.int64) for _ in queries]
        distance, index = self._neighbours.kneighbors(np.concatenate(queries), most)
        found, at = [], 0
        for query, client, count in zip(queries, clients, counts, strict=True):
            part = slice(at, at + len(query))
            at += len(query)
            near = np.unique(index[part])
            best = np.full(len(near), np.inf)
            np.minimum.at(best, np.searchsorted(near, index[part].ravel()), distance[part].ravel())
            other = self.owner_N[near] != client
            near, best = near[other], best[other]
            found.append(near[np.lexsort((near, best))][:count])
        return found
