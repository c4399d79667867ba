"""Drawn clients: test clients of types that the partition does not have, from its test images."""

import numpy as np

from iciia_exp.data.client_mix import ClientMix
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.seeding import generator

__all__ = ["clients_in_order", "drawn_clients"]


def drawn_clients(clients: Clients, labels: np.ndarray, number: int, images: int, client_type: str) -> Clients:
    """Return ``number`` test clients of a type with ``images`` ordered images each."""
    size = number / int((-(-clients.test.lengths // images)).sum())
    if client_type == "homogeneous":
        mix = ClientMix(0.0, homogeneous=1.0, size=size)
    else:
        mix = ClientMix(0.0, random_classes=1.0, fewest_classes=2, most_classes=20, size=size)

    def draw(part: str) -> np.ndarray:
        rng = generator("kinds", client_type, part)
        return mix.draw(clients.test, clients.types, labels, images, rng).index_CS[:number]

    index_CS = draw("first")
    if client_type == "drifting":
        index_CS[:, images // 2 :] = draw("second")[:, images // 2 :]
    return clients_in_order(index_CS, client_type)


def clients_in_order(index_CS: np.ndarray, client_type: str) -> Clients:
    """Return a client for each row of image numbers, with these test images in this order."""
    number, images = index_CS.shape
    test = Ragged.from_lengths(np.full(number, images), index_CS.ravel())
    names = np.array([f"{client_type}-{i}" for i in range(number)], dtype=object)
    types, empty = np.full(number, client_type, dtype=object), Ragged.empty(number)
    return Clients(names, types, empty, empty, test, in_time=True)
