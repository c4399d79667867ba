"""Client mix: the clients a method is trained on, those of the partition and others drawn anew each epoch.

A module that only ever saw clients of known types memorises the types. Drawing some of its training clients from the
same images but with other classes teaches it to read any client.

Legend: C clients (sequences), S images of a client, K classes, M images of the dataset.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from iciia_exp.data.batches import ClientIndex, cut_chunks
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.errors import ConfigError, check_choice, check_float, check_int
from iciia_exp.seeding import generator

__all__ = ["ClientMix", "unseen"]


class ClientMix:
    """Shares of types of training clients; an epoch has about as many images as the partition's train images.

    Args:
        natural: share of the partition's own clients.
        random_classes: share of clients with a random set of classes, all equally frequent.
        homogeneous: share of clients with all classes.
        drifting: share of clients that become another one of the three types, at a random place.
        fewest_classes, most_classes: sizes of the random sets; small ones are as frequent as large ones on a log scale.
        pool: where the images of the partition's own clients come from: ``client``, or ``type``: all clients of one
            type share theirs.
        size: images of an epoch, relative to the train images.
        unseen_types: share of the partition's client types that do not come as natural clients, to measure what
            becomes of new types; their images still come in the other shares.

    Shares are relative to their sum.
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
        given = {"natural": natural, "random_classes": random_classes}
        given |= {"homogeneous": homogeneous, "drifting": drifting}
        self.shares = {key: check_float(key, share, 0.0) for key, share in given.items()}
        if not sum(list(self.shares.values())[:3]):
            raise ConfigError("natural", natural, "some share other than drifting must be above 0")
        self.fewest_classes = check_int("fewest_classes", fewest_classes, 1)
        self.most_classes = check_int("most_classes", most_classes, fewest_classes, why="of fewest_classes")
        self.pool = check_choice("pool", pool, ("client", "client_type"))
        self.size = check_float("size", size, 0.0, open_low=True)
        self.unseen_types = check_float("unseen_types", unseen_types, 0.0, 0.9)

    @property
    def plain(self) -> bool:
        """Whether it is the partition's clients as they are."""
        others = sum(share for key, share in self.shares.items() if key != "natural")
        return not others and self.pool == "client" and self.size == 1.0 and not self.unseen_types

    def known(self, clients: Clients) -> Clients:
        """Return the clients without train images of those types that are kept back."""
        if not self.unseen_types:
            return clients
        train, new = clients.train, np.isin(clients.types.astype(str), unseen(clients.types, self.unseen_types))
        kept = ~new[train.row_numbers]
        return replace(clients, train=Ragged.from_pairs(train.row_numbers[kept], train.values[kept], len(train)))

    def check(self, labels: np.ndarray) -> None:
        """Raise `ConfigError` where the task has no classes to draw."""
        if labels.ndim == 2 and self.shares["random_classes"]:
            problem = "needs one label per image; a multi-label task can have homogeneous clients"
            raise ConfigError("random_classes", self.shares["random_classes"], problem)

    def count(self, train: Ragged, images: int) -> int:
        """Return the number of sequences of an epoch."""
        return max(1, round(self.size * int((-(-train.lengths // images)).sum())))

    def draw(
        self, train: Ragged, types: np.ndarray, labels: np.ndarray, images: int, rng: np.random.Generator
    ) -> ClientIndex:
        """Return an epoch's sequences, in the order of their types.

        Args:
            train: train images of the partition's clients.
            types: type of every client.
            labels: of all images of the dataset, int64 [M], or [M, K].
            images: S.
            rng: source of all randomness.

        Returns:
            Image numbers [C, S], -1 where a natural client has fewer, and the natural client of each, -1 for others.
        """
        count, total = self.count(train, images), sum(self.shares.values())
        exact = np.cumsum([share / total * count for share in self.shares.values()])
        parts = np.diff(np.round(np.concatenate([[0.0], exact])).astype(np.int64))
        numbers = dict(zip(self.shares, parts, strict=True))
        index_CS, client_C = self._some(train, types, labels, images, numbers, rng)
        if drifting := int(numbers["drifting"]):
            settled = {key: self.shares[key] for key in ("natural", "random_classes", "homogeneous")}
            first, second = (
                self._some(train, types, labels, images, _dealt(drifting, settled, rng), rng) for _ in range(2)
            )
            second = ClientIndex(*(part[rng.permutation(drifting)] for part in second))
            cut_C1 = rng.integers(1, max(2, images), (drifting, 1))
            mixed_CS = np.where(np.arange(images) < cut_C1, first.index_CS, second.index_CS)
            index_CS = np.concatenate([index_CS, mixed_CS])
            client_C = np.concatenate([client_C, np.full(drifting, -1)])
        return ClientIndex(index_CS, client_C)

    def _some(
        self,
        train: Ragged,
        types: np.ndarray,
        labels: np.ndarray,
        images: int,
        numbers: dict[str, int],
        rng: np.random.Generator,
    ) -> ClientIndex:
        """Return so many sequences of each settled type."""
        natural = self._natural(train, types, images, int(numbers["natural"]), rng)
        pool = np.unique(train.values)
        everything = pool[rng.integers(0, len(pool), (int(numbers["homogeneous"]), images))]
        few = self._random_classes(pool, labels, images, int(numbers["random_classes"]), rng)
        others = np.concatenate([few, everything])
        return ClientIndex(
            np.concatenate([natural.index_CS, others]), np.concatenate([natural.client_C, np.full(len(others), -1)])
        )

    def _natural(
        self, train: Ragged, types: np.ndarray, images: int, number: int, rng: np.random.Generator
    ) -> ClientIndex:
        if not number:
            return ClientIndex(np.empty((0, images), np.int64), np.empty(0, np.int64))
        if self.unseen_types:
            seen_M = ~np.isin(types, unseen(types, self.unseen_types))[train.row_numbers]
            train = Ragged.from_pairs(train.row_numbers[seen_M], train.values[seen_M], len(train))
        if self.pool == "client_type":
            codes = np.unique(types, return_inverse=True)[1]
            train = Ragged.from_pairs(codes[train.row_numbers], train.values, int(codes.max()) + 1)
        parts, left = [], number
        while left > 0:  # all images once before any comes twice
            order = train.shuffled(rng)
            chunks = cut_chunks(train, images, order)
            chosen = rng.permutation(len(chunks.client_C))[:left]
            parts.append(ClientIndex(chunks.index_CS[chosen], chunks.client_C[chosen]))
            left -= len(chosen)
        return ClientIndex(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _random_classes(
        self, pool: np.ndarray, labels: np.ndarray, images: int, number: int, rng: np.random.Generator
    ) -> np.ndarray:
        if not number:
            return np.empty((0, images), np.int64)
        known, codes = np.unique(labels[pool], return_inverse=True)
        of_class = Ragged.from_pairs(codes, pool, len(known))
        low, high = (min(n, len(known)) for n in (self.fewest_classes, self.most_classes))
        sizes_C = np.floor(np.exp(rng.uniform(np.log(low), np.log(high + 1), number))).astype(np.int64).clip(low, high)
        index_CS = np.empty((number, images), np.int64)
        for start in range(0, number, 4096):  # an order of all classes for each client, 4,096 clients at a time
            some = slice(start, min(start + 4096, number))
            order_CK = np.argsort(rng.random((some.stop - start, len(known))), axis=1)
            nth_CS = (rng.random((some.stop - start, images)) * sizes_C[some, None]).astype(np.int64)
            class_CS = np.take_along_axis(order_CK, nth_CS, axis=1)
            place_CS = (rng.random(class_CS.shape) * of_class.lengths[class_CS]).astype(np.int64)
            index_CS[some] = of_class.values[of_class.offsets[class_CS] + place_CS]
        return index_CS


def unseen(types: np.ndarray, share: float) -> np.ndarray:
    """Return the types that are kept back, the same for every seed."""
    names = np.unique(types.astype(str))
    return names[generator("unseen_kinds").permutation(len(names))[: round(share * len(names))]]


def _dealt(number: int, shares: dict[str, float], rng: np.random.Generator) -> dict[str, int]:
    """Draw how many of ``number`` are of each type."""
    weights = np.array(list(shares.values()))
    return dict(zip(shares, rng.multinomial(number, weights / weights.sum()).tolist(), strict=True))
