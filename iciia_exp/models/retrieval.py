"""Retrieval: the samples of a pool that are nearest to any of a client's, by cosine similarity.

Legend: C clients, n queries of a client, N samples of the pool, R numbers of a representation, m samples for a client.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["SEARCH", "Pool"]

#: Libraries that search.
SEARCH = ("scikit-learn", "faiss")

#: A search: queries [n, R] and m to distances, nearest first, and samples, [n, m] each.
_Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


class Pool:
    """Samples with owners, searched exactly.

    Args:
        unit_NR: representations of length 1, float32; 4 N R bytes stay in memory.
        owner_N: number of each sample's client.
        library: one of `SEARCH`; both search exactly.
    """

    def __init__(self, unit_NR: np.ndarray, owner_N: np.ndarray, library: str = "scikit-learn") -> None:
        self.owner_N, self._owners = owner_N, np.sort(owner_N)
        self._search = (_faiss if library == "faiss" else _scikit_learn)(unit_NR)

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
            distance, index = self._search(np.concatenate([queries[int(c)] for c in alike]), int(most))
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


def _scikit_learn(unit_NR: np.ndarray) -> _Search:
    from sklearn.neighbors import NearestNeighbors

    # of vectors of length 1, the Euclidean distance gives the order of the cosine, and is searched faster
    return NearestNeighbors(algorithm="brute", metric="euclidean").fit(unit_NR).kneighbors


def _faiss(unit_NR: np.ndarray) -> _Search:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its SWIG types
        import faiss
    index = faiss.IndexFlatIP(unit_NR.shape[1])
    index.add(np.ascontiguousarray(unit_NR, dtype=np.float32))

    def search(queries_nR: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        cosine, found = index.search(np.ascontiguousarray(queries_nR, dtype=np.float32), most)
        return -cosine, found

    return search
