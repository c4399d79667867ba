"""Dirichlet partition: class proportions drawn per client, the usual label skew of federated learning.

Source: Hsu, Qi, Brown, "Measuring the effects of non-identical data distribution for federated visual classification",
arXiv 1909.06335: every client has its own class proportions and as many images as the others, which is also what
pfl-research and Flower's InnerDirichletPartitioner do. (NIID-Bench and Flower's DirichletPartitioner draw, for each
class, its proportions over clients, so that clients differ in size.) `draw_classes` is the pure function.

Legend: M images of the dataset, N members of a pool, C clients, S images of a client, R roles, K classes.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from iciia_exp.data.clients import ROLES, Clients, Ragged
from iciia_exp.data.partitions.base import Partition, numbered, role_pools, share_out, single_labels
from iciia_exp.errors import ConfigError, check_choice, check_float, check_int
from iciia_exp.seeding import generator

__all__ = ["Dirichlet", "draw_classes", "draw_urn"]

#: How often images of a class that has run out move to another one, before the rest goes where there is room.
_TURNS = 100


def draw_urn(alpha_K: np.ndarray, clients: int, images: int, rng: np.random.Generator) -> np.ndarray:
    """Draw classes of images, int64 [C, S], each client's from proportions of its own that are a draw from Dir(alpha).

    The proportions themselves are never needed: an image has the class of one of the s images before it with
    probability s / (s + sum of alpha), each as likely, and else a class drawn in proportion to alpha (Polya's urn; it
    gives the same distribution, in time linear in images, whatever K).
    """
    total = alpha_K.sum()
    number_S = np.arange(images)
    spot_CS = np.floor(rng.random((clients, images)) * (total + number_S) - total).astype(np.int64)
    source = np.where(spot_CS < 0, number_S, spot_CS) + images * np.arange(clients)[:, None]
    source = source.ravel()
    while not np.array_equal(further := source[source], source):  # whose class it is in the end
        source = further
    return rng.choice(len(alpha_K), size=len(source), p=alpha_K / total)[source].reshape(clients, images)


def rank_within(groups_N: np.ndarray) -> np.ndarray:
    """Return how many members of the same group (0, 1, ...) come before each member, int64 [N]."""
    sizes = np.bincount(groups_N)
    rank_N = np.empty(len(groups_N), dtype=np.int64)
    rank_N[np.argsort(groups_N, kind="stable")] = np.arange(len(groups_N)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank_N


def draw_classes(
    left_RK: np.ndarray, quota_R: np.ndarray, alpha: float, clients: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw a class for every image of every client, int64 [C, S], the same proportions for all its roles.

    Where a class runs out, clients of lower number get its images, and a client's others of that class move together
    to another class, drawn in proportion to what is left. So the last clients follow their proportions the least.

    Args:
        left_RK: images of each role and class, of a role at least ``clients`` times its quota.
        quota_R: images of each role that a client gets; they make up the S columns, role after role.
        alpha: concentration; the parameters are alpha K p, p the classes' shares of all images.
        clients: C.
        rng: source of all randomness.
    """
    left_RK = left_RK.copy()
    num_classes = left_RK.shape[1]
    alpha_K = alpha * num_classes * left_RK.sum(axis=0) / left_RK.sum()
    images = int(quota_R.sum())
    label = draw_urn(alpha_K, clients, images, rng).ravel()
    role = np.tile(np.repeat(np.arange(len(quota_R)), quota_R), clients)
    pending = np.arange(len(label))
    for _ in range(_TURNS):
        cell = role[pending] * num_classes + label[pending]
        fits = rank_within(cell) < left_RK.ravel()[cell]
        left_RK -= np.bincount(cell[fits], minlength=left_RK.size).reshape(left_RK.shape)
        pending = pending[~fits]
        room_K = left_RK.sum(axis=0) * (left_RK > 0).all(axis=0)
        if not len(pending) or not room_K.any():
            break
        # images of one client and class move together
        _, group = np.unique(pending // images * num_classes + label[pending], return_inverse=True)
        label[pending] = rng.choice(num_classes, size=group.max() + 1, p=room_K / room_K.sum())[group]
    for r, left_K in enumerate(left_RK):
        own = pending[role[pending] == r]
        label[own] = rng.permutation(np.repeat(np.arange(num_classes), left_K))[: len(own)]
    return label.reshape(clients, images)


class Dirichlet(Partition):
    """Clients of equal size whose class proportions are draws from Dir(alpha K p), p the classes' shares of the images.

    Args:
        alpha: concentration for each class: with classes of equal size this is the symmetric Dir(alpha, ..., alpha).
            Of 10 classes, 16 images of a client show about three with 0.1, five with 0.5 and eight with 100. With more
            classes take less, for alpha K (the parameter of Hsu et al.) decides how many a client has.
        images_per_client: images of one client: of its one role, if split by client; of all together, shared among
            the roles like the sizes of the pools, if within. null: as many as ``clients`` leave.
        clients: number of clients, of all roles together; split by client they are shared among the roles like the
            sizes of the pools. null: as many as there are images for.
        split: ``client``: train, val and test clients are different clients; ``within``: every client has
            images of all three, in the same proportions. Either way every image goes to at most one client.
        val_share: of the train images, class by class, where the dataset has no val images of its own.
        seed: seed of the partition.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        images_per_client: int | None = 16,
        clients: int | None = None,
        split: str = "client",
        val_share: float = 0.2,
        seed: int = 0,
    ) -> None:
        self.alpha = check_float("alpha", alpha, 0.0, open_low=True)
        self.split = check_choice("split", split, ("client", "within"))
        if images_per_client is None and clients is None:
            raise ConfigError("clients", "null", "give a number of clients, of images_per_client, or both")
        self.images_per_client = images_per_client
        if images_per_client is not None:
            self.images_per_client = check_int("images_per_client", images_per_client, 1)
        self.clients = clients
        if clients is not None:
            self.clients = check_int("clients", clients, 1 if split == "within" else len(ROLES))
        self.val_share = check_float("val_share", val_share, 0.0, 0.9, open_low=True)
        self.seed = check_int("seed", seed, 0)

    def assign(self, table: pd.DataFrame, num_classes: int) -> Clients:
        """Return the clients; raises `ConfigError` where the images do not fill them."""
        labels_M = single_labels(table, self)
        rng = generator("dirichlet", self.seed)
        pools = role_pools(table, labels_M, self.val_share, rng, self)
        counts_RK = np.stack([np.bincount(labels_M[pools[role]], minlength=num_classes) for role in ROLES])
        quotas, numbers = self._sizes(pools)
        client_M, roles_M = (np.full(len(table), -1, dtype=np.int64) for _ in range(2))
        ids: list[str] = []
        # within: one draw of proportions for all roles; by client: each role has its own clients
        for roles in [list(range(len(ROLES)))] if self.split == "within" else [[r] for r in range(len(ROLES))]:
            quota_R = np.array([quotas[ROLES[r]] for r in roles])
            number = numbers[ROLES[roles[0]]]
            label_CS = draw_classes(counts_RK[roles], quota_R, self.alpha, number, rng)
            for r, label_Cs in zip(roles, np.split(label_CS, np.cumsum(quota_R)[:-1], axis=1), strict=True):
                pool, label = rng.permutation(pools[ROLES[r]]), label_Cs.ravel()
                decks = Ragged.from_pairs(labels_M[pool], pool, num_classes)
                images = decks.values[decks.offsets[label] + rank_within(label)]
                client_M[images] = len(ids) + np.repeat(np.arange(number), label_Cs.shape[1])
                roles_M[images] = r
            ids += numbered("client" if self.split == "within" else ROLES[roles[0]], number)
        types = np.full(len(ids), f"Dir({self.alpha:g})", dtype=object)
        return Clients.from_assignment(np.array(ids, dtype=object), types, client_M, roles_M, rng.random(len(table)))

    def _sizes(self, pools: dict[str, np.ndarray]) -> tuple[dict[str, int], dict[str, int]]:
        """Return the images that a client gets of each role, and the number of clients with images of that role."""
        sizes = {role: len(pool) for role, pool in pools.items()}
        within = self.split == "within"
        numbers = None
        if self.clients is not None:
            shared = "no client for the {role} images"
            numbers = (
                dict.fromkeys(ROLES, self.clients) if within else share_out(self.clients, pools, "clients", shared)
            )
        if self.images_per_client is None:
            assert numbers is not None
            quotas = {role: sizes[role] // numbers[role] for role in ROLES}
            if not within:
                quotas = dict.fromkeys(ROLES, min(quotas.values()))
            if short := [role for role in ROLES if not quotas[role]]:
                problem = f"is more than the {sizes[short[0]]} {short[0]} images are enough for; use fewer"
                raise ConfigError("clients", self.clients, problem)
            return quotas, numbers
        if within:
            lacking = "every client without {role} images"
            quotas = share_out(self.images_per_client, pools, "images_per_client", lacking)
        else:
            quotas = dict.fromkeys(ROLES, self.images_per_client)
        most = {role: sizes[role] // quotas[role] for role in ROLES}
        if within:
            most = dict.fromkeys(ROLES, min(most.values()))
        if short := [role for role in ROLES if not most[role]]:
            problem = f"the {sizes[short[0]]} {short[0]} images do not fill one client; use fewer images per client"
            raise ConfigError("images_per_client", self.images_per_client, problem)
        if numbers is None:
            return quotas, most
        if any(numbers[role] > most[role] for role in ROLES):
            fill = most["test"] if within else sum(most.values())
            problem = (
                f"the images fill {fill} clients of {self.images_per_client}; use fewer clients or images_per_client"
            )
            raise ConfigError("clients", self.clients, problem)
        return quotas, numbers
