"""Dirichlet partition: class proportions drawn per client, the usual label skew of federated learning.

Source: Hsu, Qi, Brown, "Measuring the effects of non-identical data distribution for federated visual classification",
arXiv 1909.06335. Every client has its own class proportions and all clients have the same size, as in pfl-research and
Flower's InnerDirichletPartitioner. (NIID-Bench and Flower's DirichletPartitioner draw the proportions of each class
over the clients, so that clients differ in size.)

Legend: M images of the dataset, C clients, S images of a client, R roles, K classes.
"""

import numpy as np
import pandas as pd

from iciia_exp.data.clients import ROLES, Clients, rank_within
from iciia_exp.data.partitions import base
from iciia_exp.errors import ConfigError, check_choice, check_float, check_int
from iciia_exp.seeding import generator

__all__ = ["Dirichlet", "draw_classes", "draw_urn"]

#: Draws of another class for images whose class is exhausted, before the remaining images fill any free class.
_TURNS = 100


def draw_urn(alpha_K: np.ndarray, clients: int, images: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the class of every image, int64 [C, S]; every client's proportions are a draw from Dir(alpha).

    Polya's urn: after s images, an image copies the class of one of them, drawn uniformly, with probability
    s / (s + sum of alpha); otherwise its class is drawn in proportion to alpha. This gives the same distribution as
    drawing the proportions first, in time linear in images for any K.
    """
    total = alpha_K.sum()
    number_S = np.arange(images)
    spot_CS = np.floor(rng.random((clients, images)) * (total + number_S) - total).astype(np.int64)
    source = (np.where(spot_CS < 0, number_S, spot_CS) + images * np.arange(clients)[:, None]).ravel()
    while not np.array_equal(further := source[source], source):  # follow the copies to the first image
        source = further
    return rng.choice(len(alpha_K), size=len(source), p=alpha_K / total)[source].reshape(clients, images)


def draw_classes(
    left_RK: np.ndarray, quota_R: np.ndarray, alpha: float, clients: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw a class for every image of every client, int64 [C, S], with the same proportions for all roles of a client.

    When a class is exhausted, clients with lower numbers get its images. Another client's images of that class move
    together to another class, drawn in proportion to the unused images, so the last clients follow their proportions
    the least.

    ``left_RK`` has the images of each role and class, at least ``clients`` times the quota of a role; ``quota_R`` has a
    client's images of each role, which are the S columns, role by role. The parameters of the Dirichlet distribution
    are alpha K p, with p the classes' shares of all images.
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
        rest = pending[role[pending] == r]
        label[rest] = rng.permutation(np.repeat(np.arange(num_classes), left_K))[: len(rest)]
    return label.reshape(clients, images)


class Dirichlet(base.Partition):
    """Clients of equal size whose class proportions are draws from Dir(alpha K p), p the classes' shares of the images.

    Args:
        alpha: concentration for each class; with classes of equal size, this is the symmetric Dir(alpha, ..., alpha).
            Of 10 classes, the 16 images of a client show about three with 0.1, five with 0.5 and eight with 100. Use
            less with more classes: alpha K (the parameter of Hsu et al.) decides how many classes a client has.
        images_per_client: images of one client. With ``split=client``, all are of the client's one role; with
            ``split=within``, they are divided among the roles in proportion to the sizes of the pools. null: as many
            as ``clients`` allows.
        clients: number of clients of all roles together. With ``split=client``, they are divided among the roles in
            proportion to the sizes of the pools. null: as many as the images fill.
        split: ``client``: train, val and test clients are different clients; ``within``: every client has images of
            all three roles, in the same proportions. In both cases every image goes to at most one client.
        val_share: share of the train images of every class for val, if the dataset has no val images.
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
        super().__init__(val_share, seed)
        self.alpha = check_float("alpha", alpha, 0.0, open_low=True)
        self.split = check_choice("split", split, ("client", "within"))
        if images_per_client is None and clients is None:
            raise ConfigError("clients", "null", "give a number of clients, of images_per_client, or both")
        if images_per_client is not None:
            check_int("images_per_client", images_per_client, 1)
        if clients is not None:
            check_int("clients", clients, 1 if split == "within" else len(ROLES))
        self.images_per_client, self.clients = images_per_client, clients

    def assign(self, table: pd.DataFrame, num_classes: int) -> Clients:
        """Return the clients; raises `ConfigError` where the images do not fill them."""
        labels_M = base.single_labels(table, self)
        rng = generator("dirichlet", self.seed)
        pools = base.role_pools(table, labels_M, self.val_share, rng, self)
        quotas, numbers = self._sizes({role: len(pool) for role, pool in pools.items()})
        client_M, roles_M = (np.full(len(table), -1, dtype=np.int64) for _ in range(2))
        ids: list[str] = []
        # within: one draw of proportions for all roles; client: each role has its own clients
        by_role = [((role,), role) for role in ROLES]
        for roles, name in [(ROLES, "client")] if self.split == "within" else by_role:
            left_RK = np.stack([np.bincount(labels_M[pools[role]], minlength=num_classes) for role in roles])
            quota_R, number = np.array([quotas[role] for role in roles]), numbers[roles[0]]
            label_CS = draw_classes(left_RK, quota_R, self.alpha, number, rng)
            for role, label_Cs in zip(roles, np.split(label_CS, np.cumsum(quota_R)[:-1], axis=1), strict=True):
                by_class, label = base.shuffled_groups(labels_M, pools[role], num_classes, rng), label_Cs.ravel()
                images = by_class.values[by_class.offsets[label] + rank_within(label)]
                client_M[images] = len(ids) + np.repeat(np.arange(number), label_Cs.shape[1])
                roles_M[images] = ROLES.index(role)
            ids += base.numbered(name, number)
        types = np.full(len(ids), f"Dir({self.alpha:g})", dtype=object)
        return Clients.from_assignment(np.array(ids, dtype=object), types, client_M, roles_M, rng.random(len(table)))

    def _sizes(self, sizes: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        """Return a client's images of each role and the number of clients of each role, for the sizes of the pools."""
        within = self.split == "within"
        numbers, quotas = (dict.fromkeys(ROLES, given or 0) for given in (self.clients, self.images_per_client))
        if self.clients is not None and not within:
            numbers = base.share_out(self.clients, sizes, "clients", "no client for the {role} images")
        if self.images_per_client is not None and within:
            lacking = "every client without {role} images"
            quotas = base.share_out(self.images_per_client, sizes, "images_per_client", lacking)
        most = {role: sizes[role] // (quotas[role] or numbers[role]) for role in ROLES}
        if within == bool(quotas["test"]):  # equal for all roles: the clients within, the images split by client
            most = dict.fromkeys(ROLES, min(most.values()))
        short = next((f"{sizes[role]} {role} images" for role in ROLES if not most[role]), None)
        if self.images_per_client is None:
            if short:
                raise ConfigError("clients", self.clients, f"is more than the {short} are enough for; use fewer")
            return most, numbers
        if short:
            problem = f"the {short} do not fill one client; use fewer images per client"
            raise ConfigError("images_per_client", self.images_per_client, problem)
        if any(numbers[role] > most[role] for role in ROLES):
            fill = f"{most['test'] if within else sum(most.values())} clients of {self.images_per_client}"
            problem = f"the images fill {fill}; use fewer clients or images_per_client"
            raise ConfigError("clients", self.clients, problem)
        return quotas, most if self.clients is None else numbers
