"""MPDA: a device accepts or rejects whole other clients by what their samples do to its own loss or AUC.

Source: "On-Device Learning for Model Personalization with Large-Scale Cloud-Coordinated Domain Adaption" (KDD 2022,
2180-2190), and its released code. The cloud matches M other clients and sends their labelled samples. From the cloud's
model, the device trains on one of them after the other, and keeps what it has learned if its loss on the device's own
images is lower than before. At last it trains on its own images.

The released code trains click models, matches at random and judges by the AUC on the own train samples. Matching by
overlap of classes or mean features, the log-loss, and own val images as judge are ours.

Legend: C clients, n train and m val images of a client, M candidates, D features, K classes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import ConfigError, check_choice, check_int
from iciia_exp.ledger import Budget, Link, Sizes
from iciia_exp.methods.base import Facts, without_seed
from iciia_exp.methods.tune.base import Learned
from iciia_exp.methods.tune.cloud_samples import CloudSamples
from iciia_exp.methods.tune.matching import MATCHING, match_clients, sent_to_match
from iciia_exp.models.fit_many import choose
from iciia_exp.models.stacked import Examples
from iciia_exp.tasks import CLICK, Click

__all__ = ["MPDA"]

#: What trains: nothing but the own images; the accepted clients alone; as many of the first candidates, and the own
#: images; the accepted clients, and the own images.
ARMS = ("local", "selected", "match", "mpda")
#: Least improvement of the loss for a client to be accepted.
_BETTER = 1e-7


class MPDA(CloudSamples):
    """A classifier or click model for every client, trained on clients that its device has accepted and on its own.

    Args:
        facts: task, sizes, and the backbone's classifier, where every client starts.
        arm: ``mpda``, or a part of it: ``local`` trains on the own images alone, ``selected`` on accepted clients
            alone, ``match`` on as many of the first candidates as were accepted, and on the own images.
        trains: see `CloudSamples`.
        matching: the order of the candidates: ``overlap`` of their classes, in a click task of their items,
            ``nearest`` mean features, or ``random``.
        candidates: M; all other clients if there are fewer.
        judge: what decides: ``train``, or ``val`` images of the client (train where it has none).
        measure: ``loss``, or in a click task ``auc``, by which a client with one label accepts nobody.
        lr, batch_size, clip_norm, clip, epochs, own_epochs, patience: see `CloudSamples`; ``epochs`` are those on the
            images of a candidate.
        seed: of the random matching.
    """

    name = "mpda"

    def __init__(
        self,
        facts: Facts,
        arm: str = "mpda",
        trains: str = "classifier",
        matching: str = "overlap",
        candidates: int = 20,
        judge: str = "train",
        measure: str = "loss",
        lr: float = 0.05,
        batch_size: int = 16,
        clip_norm: float = 5.0,
        clip: str = "dense",
        epochs: int = 5,
        own_epochs: int = 20,
        patience: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(facts, trains, lr, batch_size, clip_norm, clip, epochs, own_epochs, patience)
        self.arm = check_choice("arm", arm, ARMS)
        self.matching = check_choice("matching", matching, MATCHING)
        self.check_overlap("matching", matching)
        self.judge = check_choice("judge", judge, ("train", "val"))
        self.measure = check_choice("measure", measure, ("loss", "auc"))
        if measure == "auc" and self.task != CLICK:
            raise ConfigError("measure", measure, "ranks items of a click task; use measure=loss")
        self.seed = check_int("seed", seed, 0)
        self.most = check_int("candidates", candidates, 1)

    @classmethod
    def canonical(cls, config: dict[str, Any], dim: int) -> dict[str, Any]:
        """Leave out the seed unless clients are matched at random."""
        return config if config.get("matching") == "random" else without_seed(config)

    @property
    def receives(self) -> bool:
        """Whether devices get samples of other clients."""
        return self.arm != "local"

    @property
    def candidates(self) -> int:
        """M: all other clients if there are fewer than asked for."""
        return 0 if not self.receives else max(0, min(self.most, int(self.clients) - 1))

    def most_held(self, cloud: CloudView, most: int) -> int:
        """Those of the M largest clients."""
        return int(np.sort(cloud.clients.train.lengths)[::-1][: self.candidates].sum())

    def learn_from(self, cloud: CloudView, own: Mapping[str, ClientBatch], link: Link) -> Learned:
        """Train on accepted candidates, then on the own images; every device by itself."""
        clients = len(own["train"].y_CS)
        states, counts = self.starts(clients), {}
        if self.candidates:
            sets = self._received(cloud, own["train"], link)
            lengths_CM = torch.stack([part.mask.sum(1).cpu() for part in sets], 1)
            passes_CM = torch.ones_like(lengths_CM)
            states, accepted_CM = self._select(states, sets, own)
            if self.arm == "match":
                first_CM = torch.arange(len(sets)) < accepted_CM.sum(1, keepdim=True)
                states, passes_CM = self._through(sets, first_CM), passes_CM + first_CM
            passed_C = self.recipe.epochs * (lengths_CM * passes_CM).sum(1)
            counts = {"received": lengths_CM.sum(1), "passed": passed_C, "accepted": accepted_CM.sum(1)}
        if self.arm == "selected":
            return Learned(states, torch.zeros(clients, dtype=torch.int64), counts)
        fitted = self.finish(states, own)
        return Learned(fitted.states, fitted.epochs_C, counts)

    def _received(self, cloud: CloudView, train: ClientBatch, link: Link) -> list[Examples]:
        """Match clients to the devices; send their samples down, a set of each for every device, M of them."""
        ids_CM = match_clients(cloud, train, link, self.task, self.matching, self.candidates, self.seed)
        images = cloud.clients.train
        sets = []
        for ids_C in ids_CM.T:
            index_CN = images.padded(ids_C, int(images.lengths[ids_C].max()))
            sets.append(self.down(cloud, index_CN, train, link))
        return sets

    def _select(
        self, states: dict[str, Tensor], sets: list[Examples], own: Mapping[str, ClientBatch]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return classifiers that were trained on the accepted sets, and which were accepted, bool [C, M]."""
        best_C, accepted = self._loss(states, own), []
        states = {name: state.clone() for name, state in states.items()}
        for part in sets:
            tried = self.pass_over(part, states)
            loss_C = self._loss(tried, own)
            better_C = loss_C < best_C - _BETTER
            best_C = torch.where(better_C, loss_C, best_C)
            for name, state in states.items():
                state[better_C] = tried[name][better_C]
            accepted.append(better_C.cpu())
        return states, torch.stack(accepted, 1)

    def _through(self, sets: list[Examples], used_CM: Tensor) -> dict[str, Tensor]:
        """Return classifiers that were trained on some of the sets, of every client its own, from the cloud's."""
        states = self.starts(len(used_CM))
        for part, used_C in zip(sets, used_CM.to(sets[0].mask.device).unbind(1), strict=True):
            states = self.pass_over(part._replace(mask=part.mask & used_C[:, None]), states)
        return states

    def _loss(self, states: Mapping[str, Tensor], own: Mapping[str, ClientBatch]) -> Tensor:
        """Return the mean log-loss on the images that judge, [C], or -AUC."""
        found = {}
        for role in ("train", "val") if self.judge == "val" else ("train",):
            batch = own[role]
            logits_CSK, y_CS, real = self.classify(batch, states), batch.y_CS, batch.mask_CS
            if isinstance(self.task, Click) and self.measure == "auc":
                client = torch.arange(len(real), device=real.device)[:, None].expand(real.shape)[real]
                score = self.task.score(logits_CSK[real])
                twice_C, pairs_C = self.task.pairs(score, y_CS[real], client, len(real))
                found[role] = -twice_C / (2 * pairs_C).clamp(min=1)  # without pairs always 0: nobody is accepted
                continue
            losses = self.task.loss(logits_CSK.flatten(0, 1), y_CS.flatten(), reduction="none")
            found[role] = (losses.view(real.shape) * real).sum(1) / real.sum(1).clamp(min=1)
        return choose(own[self.judge].mask_CS.any(1), found[self.judge], found["train"])

    def budget(self, sizes: Sizes) -> Budget:
        """Nothing in a request. A client sends what it is matched by, and gets the samples of M clients.

        Of a classifier, training takes 2 D K MACs for every sample and pass, and D K for every image that judges and
        candidate, and for the start.
        """
        judging, up, matching, judged = 0, {}, 0, bool(self.candidates) and self.judge == "val"
        if self.candidates:
            images = sizes.train + (sizes.val if judged else 0)
            judging = (self.candidates + 1) * images * self.forward_macs
            kind, width = sent_to_match(self.matching, self.task, self.dim, self.num_classes)
            up = {kind: 4 * width or 8}
            matching = int(self.clients) * width
        return self.sample_budget(sizes, up=up, macs=judging, cloud_macs=matching, judged=judged)
