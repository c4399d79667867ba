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
        most_C = np.where(counts > 0, np.minimum(len(self), counts + own_C), 0)
        found = [np.empty(0, dtype=np.int64) for _ in queries]
        for most in np.unique(most_C[most_C > 0]):  # one search for clients that need as many
            alike = np.flatnonzero(most_C == most)
            distance, index = self._neighbours.kneighbors(np.concatenate([queries[int(c)] for c in alike]), most)
            at = np.cumsum([0, *(len(queries[int(c)]) for c in alike)])
            for number, first, last in zip(alike, at, at[1:], strict=False):
                own, own_distance = index[first:last], distance[first:last]
                near = np.unique(own)
                best = np.full(len(near), np.inf)
                np.minimum.at(best, np.searchsorted(near, own.ravel()), own_distance.ravel())
                other = self.owner_N[near] != clients[number]
                near, best = near[other], best[other]
                found[number] = near[np.lexsort((near, best))][: counts[number]]
        return found
