"""Confidence routing of images: the small network of the device answers, and the large one where it is unsure.

The score of an image is the probability of the small network's top class, which is a cascade's usual rule; here with a
share of requests in the cloud that is calibrated on val images. The small network is the ``second`` one of
``backbone=paired``, with a classifier that is fitted on the cloud.

Legend: C clients, S images of a client, K classes, d features of the small network.
"""

from typing import Any

import torch
from torch import Tensor, nn

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import ConfigError, check_choice, check_int
from iciia_exp.ledger import Budget, Line, Sizes
from iciia_exp.methods.base import Facts, Fit, Record, copy_of
from iciia_exp.methods.route.base import Routed
from iciia_exp.models.linear_probe import fit_linear_head
from iciia_exp.seeding import generator
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["RouteConfidence"]

SCORES = ("confidence", "margin", "random")


class RouteConfidence(Routed):
    """A cascade of two networks.

    Args:
        facts: task, sizes, the classifier of the large network, and the shape of the small one's features.
        score: ``confidence``: the top probability; ``margin``: the top probability less the next one; ``random``.
        seed: of the fit of the classifier, and of random scores.
        routing: further arguments of `Routed`; its cap does not apply, since the large network is better on average.
    """

    name = "route_confidence"
    tasks = (SINGLE_LABEL,)
    reads = frozenset({"features", "second"})
    trainable = False
    even = None

    def __init__(self, facts: Facts, score: str = "confidence", seed: int = 0, **routing: Any) -> None:
        super().__init__(facts, **routing)
        if "second" not in facts.arrays:
            raise ConfigError("", self.name, "reads the features of a second network; use backbone=paired")
        (width,) = facts.arrays["second"]
        self.rule, self.seed = check_choice("score", score, SCORES), check_int("seed", seed, 0)
        self.large, self.small = copy_of(facts.head, trained=False), nn.Linear(width, self.num_classes)
        self.random_d: Tensor  # an image's product with it has random decimals
        random_d = 1e4 * generator(self.name, self.seed).standard_normal(width)
        self.register_buffer("random_d", torch.from_numpy(random_d), persistent=False)

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Fit the small network's classifier on the train images, and keep the scores of the val images."""
        found = [(b.arrays["second"][b.mask_CS], b.y_CS[b.mask_CS]) for b in cloud.distinct("train")]
        x, y = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
        weight, bias, record = fit_linear_head(x, y, self.task, self.num_classes, self.seed)
        with torch.no_grad():
            self.small.weight.copy_(torch.from_numpy(weight))
            self.small.bias.copy_(torch.from_numpy(bias))
            self.eval()
            self.refer(cloud)
        return {"penalty": record["penalty"]}

    def score(self, batch: ClientBatch) -> Tensor:
        """Return how sure the small network is, [C, S]; 0 where padded."""
        x_CSd = batch.arrays["second"]
        if self.rule == "random":  # from the features, so that an image has the same number everywhere
            return (x_CSd.double() @ self.random_d).frac().abs() * batch.mask_CS
        top_CS2 = self.small(x_CSd).softmax(-1).topk(2).values
        score_CS = top_CS2[..., 0] - (top_CS2[..., 1] if self.rule == "margin" else 0)
        return score_CS * batch.mask_CS

    def both(self, batch: ClientBatch) -> tuple[Tensor, Tensor]:
        """Return the logits of the small network and of the large one, [C, S, K] each."""
        return self.small(batch.arrays["second"]), self.large(batch.x_CSD)

    def logits(self, batch: ClientBatch, causal: bool = False) -> Tensor:
        """Return the logits of the network that answers, [C, S, K]."""
        small_CSK, large_CSK = self.both(batch)
        return torch.where(self.to_cloud(batch).unsqueeze(-1), large_CSK, small_CSK)

    def budget(self, sizes: Sizes) -> Budget:
        """The small network for every image; with the share in the cloud, the image up, the logits down, the large one.

        The small network's MACs are those of its trunk and classifier; unknown if the store does not have them.
        """
        small = None if sizes.second_macs is None else sizes.second_macs + self.small.weight.numel()
        up = Line("request", "device", "backbone", kind="images", bytes=sizes.image_bytes)
        down = Line("request", "cloud", "method", kind="logits", bytes=4 * self.num_classes)
        return self.routing_lines(sizes, router=small, device=0, cloud=sizes.backbone_macs, up=up, down=down)
