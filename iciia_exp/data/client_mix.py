"""Client mix: the clients that a method is trained on, from the partition and drawn anew each epoch.

A module trained on few client types memorizes them; clients with other classes teach it to adapt to any client.

Legend: C clients (sequences), S images of a client, K classes, M images of the dataset.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from iciia_exp.data.batches import ClientIndex, cut_chunks
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.errors import ConfigError, check_choice, check_float, check_int
from iciia_exp.seeding import generator

__all__ = ["ClientMix", "number_of_classes", "unseen"]

_TYPES = ("natural", "random_classes", "homogeneous", "drifting")


class ClientMix:
    """Shares of types of training clients, relative to their sum.

    Args:
        natural: share of the partition's own clients.
        random_classes: share of clients with a random set of classes, all equally frequent.
        homogeneous: share of clients with all classes.
        drifting: share of clients that change to another one of the three types at a random position.
        fewest_classes, most_classes: sizes of the random sets, drawn uniformly on a log scale.
        pool: images of a natural client: ``client``: its own; ``client_type``: those of all clients of its type.
        size: images of an epoch, relative to the train images of the partition.
        unseen_types: share of the partition's client types without natural clients, in training and among the val
            clients, to measure the accuracy on new types; their images are used in the other shares.
    """

    def __init__(
        self,
        natural: float = 1.0,
        random_classes: float = 0.0,
        homogeneous: float = 0.0,
        drifting: float = 0.0,
        fewest_classes: int = 1,
        most_classes: int = 20,
        pool: str = "client",
        size: float = 1.0,
        unseen_types: float = 0.0,
    ) -> None:
        given = (natural, random_classes, homogeneous, drifting)
        self.shares = {key: check_float(key, share, 0.0) for key, share in zip(_TYPES, given, strict=True)}
        if not sum(list(self.shares.values())[:3]):
            raise ConfigError("natural", natural, "some share other than drifting must be above 0")
        self.fewest_classes = check_int("fewest_classes", fewest_classes, 1)
        self.most_classes = check_int("most_classes", most_classes, fewest_classes, why="of fewest_classes")
        self.pool = check_choice("pool", pool, ("client", "client_type"))
        self.size = check_float("size", size, 0.0, 1000.0, open_low=True)
        self.unseen_types = check_float("unseen_types", unseen_types, 0.0, 0.9)

    @property
    def plain(self) -> bool:
        """Whether the training clients are exactly those of the partition."""
        natural = self.shares["natural"] == sum(self.shares.values())
        return natural and self.pool == "client" and self.size == 1.0 and not self.unseen_types

    def known(self, clients: Clients) -> Clients:
        """Return the clients without the train and val images of unseen types."""
        if not self.unseen_types:
            return clients
        train, val = (self._seen(ragged, clients.types) for ragged in (clients.train, clients.val))
        return replace(clients, train=train, val=val)

    def _seen(self, ragged: Ragged, types: np.ndarray) -> Ragged:
        if not self.unseen_types:
            return ragged
        return ragged.where(~np.isin(types.astype(str), unseen(types, self.unseen_types))[ragged.row_numbers])

    def check(self, labels: np.ndarray, train: Ragged, types: np.ndarray) -> None:
        """Raise `ConfigError` for random classes in a multi-label task, and for natural clients without images."""
        if labels.ndim == 2 and self.shares["random_classes"]:
            problem = "needs one label per image; a multi-label task can have homogeneous clients"
            raise ConfigError("random_classes", self.shares["random_classes"], problem)
        if self.shares["natural"] and len(train.values) and not len(self._seen(train, types).values):
            left_out = ", ".join(unseen(types, self.unseen_types))
            problem = f"leaves no images for natural clients: all are of the types {left_out}; use a smaller share"
            raise ConfigError("unseen_types", self.unseen_types, problem)

    def count(self, train: Ragged, images: int) -> int:
        """Return the number of sequences of an epoch."""
        return max(1, round(self.size * int((-(-train.lengths // images)).sum())))

    def draw(
        self,
        train: Ragged,
        types: np.ndarray,
        labels: np.ndarray,
        images: int,
        rng: np.random.Generator,
        count: int | None = None,
    ) -> ClientIndex:
        """Return the sequences of an epoch, ordered by type: image numbers [C, S] and client numbers [C].

        Missing images of natural clients, and the numbers of other clients, are -1. ``train`` has the train images of
        the partition's clients, ``types`` their types; ``labels`` are those of all images of the dataset, int64 [M], or
        [M, K]; ``images`` is S, and ``count`` the number of sequences, by default `count`.
        """
        count, total = count or self.count(train, images), sum(self.shares.values())
        exact = np.cumsum([share / total * count for share in self.shares.values()])
        parts = np.diff(np.round(np.concatenate([[0.0], exact])).astype(np.int64))
        numbers = dict(zip(self.shares, parts, strict=True))
        pool = np.unique(train.values)

        def settled(numbers: Mapping[str, int]) -> ClientIndex:
            natural = self._natural(train, types, images, numbers["natural"], rng)
            homogeneous_CS = pool[rng.integers(0, len(pool), (numbers["homogeneous"], images))]
            random_CS = self._random_classes(pool, labels, images, numbers["random_classes"], rng)
            return _joined(natural, np.concatenate([random_CS, homogeneous_CS]))

        sequences = settled(numbers)
        if not (drifting := int(numbers["drifting"])):
            return sequences
        weights = np.array([self.shares[key] for key in _TYPES[:3]])
        halves = []
        for _ in range(2):
            counts = rng.multinomial(drifting, weights / weights.sum())
            halves.append(settled(dict(zip(_TYPES, counts, strict=False))).index_CS)
        first_CS, second_CS = halves[0], halves[1][rng.permutation(drifting)]
        rng.permutation(drifting)  # unused; keeps the sequence of random numbers
        cut_C1 = rng.integers(1, max(2, images), (drifting, 1))
        return _joined(sequences, np.where(np.arange(images) < cut_C1, first_CS, second_CS))

    def _natural(
        self, train: Ragged, types: np.ndarray, images: int, number: int, rng: np.random.Generator
    ) -> ClientIndex:
        train = self._seen(train, types)
        if self.pool == "client_type":
            codes = np.unique(types, return_inverse=True)[1]
            train = Ragged.from_pairs(codes[train.row_numbers], train.values, int(codes.max()) + 1)
        parts, left = [ClientIndex(np.empty((0, images), np.int64), np.empty(0, np.int64))], number
        while left > 0:  # every image is used once before any is used twice
            chunks = cut_chunks(train, images, train.shuffled(rng))
            chosen = rng.permutation(len(chunks.client_C))[:left]
            parts.append(ClientIndex(chunks.index_CS[chosen], chunks.client_C[chosen]))
            left -= len(chosen)
        return ClientIndex(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _random_classes(
        self, pool: np.ndarray, labels: np.ndarray, images: int, number: int, rng: np.random.Generator
    ) -> np.ndarray:
        if not number:
            return np.empty((0, images), np.int64)
        classes, codes = np.unique(labels[pool], return_inverse=True)
        of_class = Ragged.from_pairs(codes, pool, len(classes))
        low, high = (min(n, len(classes)) for n in (self.fewest_classes, self.most_classes))
        sizes_C = number_of_classes(low, high, number, rng)
        parts = [np.empty((0, images), np.int64)]
        for start in range(0, number, 4096):  # an order of all classes for each client, 4,096 clients at a time
            sizes_C1 = sizes_C[start : start + 4096, None]
            order_CK = np.argsort(rng.random((len(sizes_C1), len(classes))), axis=1)
            nth_CS = (rng.random((len(sizes_C1), images)) * sizes_C1).astype(np.int64)
            class_CS = np.take_along_axis(order_CK, nth_CS, axis=1)
            place_CS = (rng.random(class_CS.shape) * of_class.lengths[class_CS]).astype(np.int64)
            parts.append(of_class.values[of_class.offsets[class_CS] + place_CS])
        return np.concatenate(parts)


def number_of_classes(fewest: int, most: int, number: int, rng: np.random.Generator) -> np.ndarray:
    """Return sizes of random sets of classes, uniform on a log scale, int64 [number]."""
    sizes = np.exp(rng.uniform(np.log(fewest), np.log(most + 1), number))
    return np.floor(sizes).astype(np.int64).clip(fewest, most)


def unseen(types: np.ndarray, share: float) -> np.ndarray:
    """Return the client types without natural clients, the same for every seed."""
    names = np.unique(types.astype(str))
    return names[generator("unseen_kinds").permutation(len(names))[: round(share * len(names))]]


def _joined(natural: ClientIndex, drawn_CS: np.ndarray) -> ClientIndex:
    clients = np.concatenate([natural.client_C, np.full(len(drawn_CS), -1)])
    return ClientIndex(np.concatenate([natural.index_CS, drawn_CS]), clients)
