"""CoDA: a device trains on samples of the cloud that resemble its own, and on its own.

Source: "On-Device Learning with Cloud-Coordinated Data Augmentation for Extreme Model Personalization in Recommender
Systems" (arXiv 2201.10382): the cloud retrieves samples near to the client's, a classifier on the device keeps those
that look like its own, and the model is trained on them and on the own ones. No code was released: representation,
classifier and recipe are ours, and so is the retrieval by overlap of classes.

Legend: C clients, n train and m val images of a client, N samples of other clients, R numbers of a representation, D
features, K classes.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iciia_exp.data.batches import ClientBatch, ClientIndex
from iciia_exp.data.clients import Ragged
from iciia_exp.data.views import CloudView
from iciia_exp.errors import ConfigError, check_choice, check_float, check_int
from iciia_exp.ledger import Budget, Link, Sizes
from iciia_exp.methods.base import Facts, without_seed
from iciia_exp.methods.tune.base import Learned
from iciia_exp.methods.tune.cloud_samples import CloudSamples
from iciia_exp.methods.tune.matching import match_clients, sent_to_match
from iciia_exp.models.fit_many import fit_many
from iciia_exp.models.retrieval import SEARCH, Pool
from iciia_exp.models.stacked import Examples
from iciia_exp.models.stacked_linear import linear_logits
from iciia_exp.recipe import Recipe
from iciia_exp.seeding import generator

__all__ = ["CoDA"]

#: Where samples come from.
RETRIEVAL = ("overlap", "sample", "random", "client_type")
#: Samples that are represented together.
_AT_ONCE = 4096
#: Rate of the classifier of own and other samples, whose inputs have length 1.
_FILTER_LR = 1.0


class CoDA(CloudSamples):
    """A classifier or click model for every client, trained on samples of others, and on the own images afterwards.

    Args:
        facts: task, sizes, and the backbone's classifier, where every client starts.
        trains: see `CloudSamples`.
        retrieval: ``overlap``: all samples of the clients whose classes, or items, overlap most, one client after the
            other; ``sample``: the samples that are nearest to any own image, by feature and label; ``random`` samples;
            or those of clients of the same ``client_type``, a bound.
        ratio: retrieved samples for an own image; all there are if there are fewer.
        keep: share of the retrieved samples that the device keeps: those that look most like its own to a classifier
            that it has trained on own samples against the retrieved and as many random ones. 1: all, without one.
        filter_epochs: passes of that classifier's training.
        lr, batch_size, clip_norm, clip, epochs, own_epochs, patience: see `CloudSamples`.
        search: library that searches for the nearest samples, exactly: ``scikit-learn``, or ``faiss``, which is faster
            and an extra of the package.
        seed: of random samples.
    """

    name = "coda"

    def __init__(
        self,
        facts: Facts,
        trains: str = "classifier",
        retrieval: str = "overlap",
        ratio: int = 10,
        keep: float = 1.0,
        filter_epochs: int = 20,
        lr: float = 0.05,
        batch_size: int = 16,
        clip_norm: float = 5.0,
        clip: str = "dense",
        epochs: int = 5,
        own_epochs: int = 20,
        patience: int | None = None,
        search: str = "scikit-learn",
        seed: int = 0,
    ) -> None:
        super().__init__(facts, trains, lr, batch_size, clip_norm, clip, epochs, own_epochs, patience)
        self.search = check_choice("search", search, SEARCH)
        if search == "faiss" and find_spec("faiss") is None:
            raise ConfigError("search", search, "is not installed; pip install 'iciia_exp[faiss]'")
        self.retrieval = check_choice("retrieval", retrieval, RETRIEVAL)
        self.check_overlap("retrieval", retrieval)
        self.ratio = check_int("ratio", ratio, 1)
        self.keep = check_float("keep", keep, 0.0, 1.0, open_low=True)
        sgd = partial(torch.optim.SGD, lr=_FILTER_LR)
        self.filter_recipe = Recipe(sgd, None, check_int("filter_epochs", filter_epochs, 1), batch_size)
        self.seed = check_int("seed", seed, 0)
        self._pool: tuple[CloudView, Pool, np.ndarray] | None = None

    @classmethod
    def canonical(cls, config: dict[str, Any], dim: int) -> dict[str, Any]:
        """Leave out the seed where no sample is random."""
        drawn = config.get("retrieval") in ("random", "client_type") or config.get("keep", 1) != 1
        return config if drawn else without_seed(config)

    def most_held(self, cloud: CloudView, most: int) -> int:
        """Retrieved samples; for a filter as many random and twice as many own ones too, all of them twice."""
        return (1 if self.keep == 1 else 2 * 4) * min(self.ratio * most, len(cloud.clients.train.values))

    def learn_from(self, cloud: CloudView, own: Mapping[str, ClientBatch], link: Link) -> Learned:
        """Train on retrieved samples, then on the own images; every device by itself."""
        train = own["train"]
        most_C = np.minimum(self.ratio * train.mask_CS.sum(1).cpu().numpy(), self._others(cloud, train))
        samples = self.down(cloud, _padded(self._retrieved(cloud, train, link, most_C)), train, link)
        received_C = torch.from_numpy(most_C)
        if self.keep < 1:
            others = self.down(cloud, _padded(self._random(cloud, train, most_C, "outside")), train, link)
            samples, received_C = self._kept(samples, others, self.examples(train)), 2 * received_C
        states = self.pass_over(samples, self.starts(len(train.y_CS)))
        passed_C = self.recipe.epochs * samples.mask.sum(1).cpu()
        fitted = self.finish(states, own)
        return Learned(fitted.states, fitted.epochs_C, {"received": received_C, "passed": passed_C})

    def _others(self, cloud: CloudView, train: ClientBatch) -> np.ndarray:
        """Return how many samples of other clients the cloud holds, int64 [C]."""
        number_C, lengths = train.client_C.cpu().numpy(), cloud.clients.train.lengths
        return lengths.sum() - np.where(number_C < 0, 0, lengths[number_C])

    def _retrieved(self, cloud: CloudView, train: ClientBatch, link: Link, most_C: np.ndarray) -> list[np.ndarray]:
        """Return the numbers of the retrieved samples of every client."""
        if self.retrieval == "sample":
            return self._nearest(cloud, train, link, most_C)
        if self.retrieval == "random":
            link.up("id", train.client_C, what="training")
            return self._random(cloud, train, most_C, "retrieved")
        images = cloud.clients.train
        if self.retrieval == "overlap":
            clients = min(int(self.clients) - 1, int(most_C.max(initial=0)))
            ids_CM: Iterable[np.ndarray] = match_clients(cloud, train, link, self.task, "overlap", clients, self.seed)
        else:
            ids_CM = self._of_type(cloud, link.up("id", train.client_C, what="training").cpu().numpy())
        found = []
        for ids_M, most in zip(ids_CM, most_C, strict=True):
            enough = int(np.searchsorted(images.lengths[ids_M].cumsum(), most)) + 1
            found.append(Ragged.from_rows([images[client] for client in ids_M[:enough]]).values[:most])
        return found

    def _of_type(self, cloud: CloudView, number_C: np.ndarray) -> list[np.ndarray]:
        """Return the other clients, those of the same type first, for each of C clients."""
        types, there = cloud.clients.types, np.flatnonzero(cloud.clients.train.lengths)
        found = []
        for number in number_C.tolist():
            drawn = generator(self.name, self.seed, number).permutation(there[there != number])
            found.append(drawn[np.argsort(types[drawn] != types[number], kind="stable")])
        return found

    def _random(self, cloud: CloudView, train: ClientBatch, most_C: np.ndarray, what: str) -> list[np.ndarray]:
        """Return random samples of other clients."""
        images, found = cloud.clients.train, []
        for number, most in zip(train.client_C.tolist(), most_C, strict=True):
            own = (0, 0) if number < 0 else images.offsets[number : number + 2]
            drawn = generator(self.name, self.seed, number, what).permutation(len(images.values) - (own[1] - own[0]))
            found.append(images.values[np.where(drawn < own[0], drawn, drawn + own[1] - own[0])][:most])
        return found

    def _nearest(self, cloud: CloudView, train: ClientBatch, link: Link, most_C: np.ndarray) -> list[np.ndarray]:
        """Return the samples nearest to any own image; features and labels of the own images go up."""
        if self._pool is None or self._pool[0] is not cloud:
            images = cloud.clients.train
            parts = [
                self.represent(batch.x_CSD[:, 0], batch.y_CS[:, 0])
                for rows in np.array_split(images.values, max(1, len(images.values) // _AT_ONCE))
                if len(rows)
                for batch in [cloud[ClientIndex(rows[:, None], np.zeros(len(rows), dtype=np.int64))]]
            ]
            self._pool = cloud, Pool(torch.cat(parts).numpy(), images.row_numbers, self.search), images.values
        x_ND = link.up("features", train.x_CSD[train.mask_CS], what="training")
        y_N = link.up("labels", train.y_CS[train.mask_CS], what="training")
        queries = self.represent(x_ND, y_N).cpu().split(train.mask_CS.sum(1).tolist())
        pool, numbers = self._pool[1:]
        near = pool.nearest([query.numpy() for query in queries], train.client_C.cpu().numpy(), most_C)
        return [numbers[part] for part in near]

    def represent(self, x: Tensor, y: Tensor) -> Tensor:
        """Return features and classes as one vector of length 1, [..., 2 D].

        The first half is the feature, the second the weight of its class in the backbone's classifier, less the mean.
        """
        weight_KD = self.head.weight - self.head.weight.mean(0)
        return torch.cat([F.normalize(x, dim=-1), F.normalize(weight_KD, dim=-1)[y]], -1) / 2**0.5

    def _kept(self, samples: Examples, others: Examples, train: Examples) -> Examples:
        """Return the samples that look most like the own ones to a classifier trained on the device."""
        count_C1 = samples.mask.sum(1, keepdim=True) + others.mask.sum(1, keepdim=True)  # own images are repeated
        place = torch.arange(samples.y.shape[1] + others.y.shape[1], device=train.y.device).expand(len(train.y), -1)
        turn = place % train.mask.sum(1, keepdim=True).clamp(min=1)
        own = Examples(train.x.take_along_dim(turn[..., None], 1), train.y.take_along_dim(turn, 1), place < count_C1)
        parts = [(own, 1), (samples, 0), (others, 0)]
        mask = torch.cat([part.mask for part, _ in parts], 1)
        order = _shuffled(mask, self.name, self.seed)
        x = torch.cat([self._seen(part) for part, _ in parts], 1).take_along_dim(order[..., None], 1)
        y = torch.cat([torch.full_like(part.y, label) for part, label in parts], 1).take_along_dim(order, 1)
        both = Examples(x, y, mask.take_along_dim(order, 1))
        blank = nn.Linear(2 * self.dim, 2, device=x.device)
        nn.init.zeros_(blank.weight), nn.init.zeros_(blank.bias)
        found = fit_many(blank, both, both.none(), self.task, self.filter_recipe).states
        logits_CN2 = linear_logits(found, self._seen(samples))
        own_CN = (logits_CN2[..., 1] - logits_CN2[..., 0]).masked_fill(~samples.mask, -torch.inf)
        best = own_CN.argsort(stable=True, dim=1, descending=True)
        kept_C = (self.keep * samples.mask.sum(1)).ceil()
        mask = torch.arange(best.shape[1], device=best.device) < kept_C[:, None]
        return Examples(samples.x.take_along_dim(best[..., None], 1), samples.y.take_along_dim(best, 1), mask)

    def _seen(self, samples: Examples) -> Tensor:
        """Return what the classifier of own and other samples reads, [C, N, 2 D]; of ids, features of the cloud's."""
        x_CND = samples.x
        if self.model is not None:
            with torch.no_grad():
                rows = samples.x.flatten(0, 1).split(_AT_ONCE)
                features = torch.cat([torch.cat(self.model.states(part), -1) for part in rows])
            x_CND = features.unflatten(0, samples.y.shape)
        return self.represent(x_CND, samples.y)

    def budget(self, sizes: Sizes) -> Budget:
        """Nothing in a request. A client sends what samples are found by, and gets them.

        Of a classifier, training takes 2 D K MACs for every sample and pass. The classifier of own and other samples
        has 2 x 2 D weights; own images are repeated until they are as many as the others. A click model computes the
        features of what it receives.
        """
        up, found = {"id": 8}, 0
        if self.retrieval == "overlap":
            kind, width = sent_to_match("overlap", self.task, self.dim, self.num_classes)
            up, found = {kind: 4 * width or 8}, int(self.clients) * width
        elif self.retrieval == "sample":
            up = {"features": 4 * sizes.train * self.dim, "labels": 8 * sizes.train}
            found = sizes.train * int(self.samples) * 2 * self.dim
        macs = 0
        if self.keep < 1:
            macs = (4 * self.filter_recipe.epochs * sizes.received + sizes.received // 2) * 4 * self.dim
            if self.model is not None:
                macs += (2 * sizes.received + sizes.received // 2) * self.forward_macs
        return self.sample_budget(sizes, up=up, macs=macs, cloud_macs=found)


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """Return rows of different lengths, padded with -1."""
    return Ragged.from_rows(rows).padded(np.arange(len(rows)), max(map(len, rows), default=0))


def _shuffled(mask_CN: Tensor, *seed: int | str) -> Tensor:
    """Return an order of every client's real images, padding last, int64 [C, N]; it depends on their number alone."""
    first = mask_CN.logical_not().int().argsort(stable=True, dim=1)
    drawn = torch.arange(mask_CN.shape[1]).repeat(len(mask_CN), 1)
    for row, length in zip(drawn, mask_CN.sum(1).tolist(), strict=True):
        row[:length] = torch.from_numpy(generator(*seed, length).permutation(length))
    return first.take_along_dim(drawn.to(first.device), 1)
