"""Routed methods: a score decides, before anything is computed for it, whether a request stays on the device.

Legend: C clients, S requests of a client, N requests, P pictures, K metrics, n tokens, d width of a token.
"""

import logging
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import ConfigError, UserError, check_bool, check_choice, check_float
from iciia_exp.ledger import Budget, Line, Sizes, payload_bytes
from iciia_exp.methods.base import Facts, Fit, Method, Record, resize_on_load
from iciia_exp.methods.route.labels import compare_pair, labels_of, pareto_superiority
from iciia_exp.methods.route.policy import CAP, Interval, calibrated_threshold, published_threshold, share_interval
from iciia_exp.tasks import QUALITY

__all__ = ["PromptRouter", "Routed", "Scorer"]

log = logging.getLogger(__name__)


class Routed(Method):
    """A router: requests with a score below a threshold go to the cloud.

    Args:
        facts: task and sizes.
        share: rho, largest share of requests in the cloud.
        policy: ``calibrated``: at most this share of new requests, on average; ``published``: of the reference ones.
        confidence: of the calibrated policy: probability with which the share is not exceeded; None: on average.
        cap: whether the cloud is only paid for requests that it is expected to answer better.
    """

    #: Number of requests before which the state of the client does not matter.
    causal = True
    #: Score from which on the device is expected to be better.
    even: ClassVar[float | None] = CAP
    site = "both"
    trained_with: ClassVar[frozenset[str]] = frozenset({"recipe"})

    def __init__(
        self,
        facts: Facts,
        share: float = 0.5,
        policy: str = "calibrated",
        confidence: float | None = None,
        cap: bool = True,
    ) -> None:
        super().__init__(facts)
        self.share = check_float("share", share, 0.0, 1.0)
        self.policy = check_choice("policy", policy, ("calibrated", "published"))
        self.confidence = None if confidence is None else check_float("confidence", confidence, 0.5, 0.9999)
        if confidence is not None and policy == "published":
            raise ConfigError("confidence", confidence, "is of the calibrated policy; use null")
        self.cap = check_bool("cap", cap)
        #: Scores of the reference requests, float64.
        self.reference_n: Tensor
        self.register_buffer("reference_n", torch.zeros(0, dtype=torch.float64))
        resize_on_load(self, "reference_n")

    @abstractmethod
    def score(self, batch: ClientBatch) -> Tensor:
        """Return the score of every request, [C, S]; the lower, the more is expected of the cloud."""

    def threshold(self, share: float | None = None) -> float:
        """Return the threshold of a share of requests in the cloud; by default that of the configuration."""
        share, scores_n = self.share if share is None else share, self.reference_n.cpu().numpy()
        cap = self.even if self.cap else None
        if self.policy == "published":
            return published_threshold(scores_n, share, cap)
        return calibrated_threshold(scores_n, share, cap, self.confidence)

    def interval(self, share: float | None = None, requests: int | None = None) -> Interval:
        """Return the share of new requests in the cloud that is to be expected, with its 95 % interval.

        ``requests`` is their number; None: so many that their own chance does not matter.
        """
        return share_interval(self.reference_n.cpu().numpy(), self.threshold(share), requests)

    def to_cloud(self, batch: ClientBatch, share: float | None = None) -> Tensor:
        """Return which requests go to the cloud, bool [C, S]."""
        return (self.score(batch).double() < self.threshold(share)) & batch.mask_CS

    def refer(self, cloud: CloudView) -> None:
        """Keep the scores of the val requests, each once, which the router was not trained on."""
        found = [self.score(batch)[batch.mask_CS].double() for batch in cloud.distinct("val")]
        if not found:
            problem = "has no val requests, whose scores give the threshold; choose a partition with val images"
            raise UserError(f"{self.name}: {problem}")
        self.reference_n = torch.cat(found).sort().values

    def payload(self) -> dict[str, Tensor]:
        """Return the router and the threshold of the configured share; the reference scores stay in the cloud."""
        parts = {name: t for name, t in super().payload().items() if name != "reference_n"}
        threshold = self.threshold() if len(self.reference_n) else torch.nan  # nan: before `refer`
        return parts | {"threshold": torch.tensor(threshold, dtype=torch.float64)}

    def routing_lines(
        self, sizes: Sizes, *, router: int | None, device: int | None, cloud: int | None, up: Line, down: Line | None
    ) -> Budget:
        """Return the budget of a request whose share in the cloud is that of ``sizes``, or the asked one.

        Args:
            sizes: of the request.
            router, device, cloud: MACs of the router, of the device's model and of the cloud's, for one request.
            up, down: payloads of a request in the cloud.
        """
        share = self.share if sizes.cloud_share is None else sizes.cloud_share

        def part(number: int | None, of: float) -> int | None:
            return None if number is None else round(of * sizes.requested * number)

        lines = [
            Line("request", "device", "method", macs=part(router, 1)),
            Line("request", "device", "backbone", macs=part(device, 1 - share)),
            Line("request", "cloud", "backbone", macs=part(cloud, share)),
        ]
        for line in filter(None, (up, down)):
            lines.append(Line(line.phase, line.site, line.what, kind=line.kind, bytes=part(line.bytes, share)))
        if weights := payload_bytes(self.payload()):
            lines.append(Line("client_once", "cloud", "method", kind="weights", bytes=weights))
        return Budget(tuple(lines), 0)


class Scorer(nn.Module):
    """What a prompt router trains: a network on the tokens, and the labels that it learns.

    Args:
        network: maps tokens [B, n, d] to logits [B, k].
        target: returns the loss of logits and qualities [B, 2, P, K].
    """

    reads = ("tokens", "quality")

    def __init__(self, network: nn.Module, target: Any) -> None:
        super().__init__()
        self.network = network
        self.target = target

    def loss(self, x_BD: Tensor, y_B: Tensor, tokens: Tensor, quality: Tensor) -> Tensor:
        """Return the loss of a batch of prompts."""
        return self.target(self.network(tokens), quality)


class PromptRouter(Routed):
    """A router of prompts between two models whose answers K metrics judge.

    Before anything is trained, both models are compared on the train prompts; metrics in which they do not differ
    count neither in PRS nor in delta P.

    Args:
        facts: task, sizes, the shapes of tokens and quality, names of the metrics.
        metrics: that PRS is the mean of; None: all.
        gamma: Gamma of the labels.
        labels: ``quality``: labels of the mean quality of a prompt's pictures; ``label``: mean of the pictures' labels.
        routing: further arguments of `Routed`.
    """

    tasks = (QUALITY,)
    reads = frozenset({"features", "images", "tokens", "quality", "flaws"})
    #: Whether the score needs the text encoder.
    reads_text = True

    def __init__(
        self,
        facts: Facts,
        metrics: list[str] | None = None,
        gamma: float = 1.0,
        labels: str = "quality",
        **routing: Any,
    ) -> None:
        super().__init__(facts, **routing)
        self.metric_names = tuple(facts.class_names)
        chosen = self.metric_names if metrics is None else tuple(metrics)
        if unknown := [name for name in chosen if name not in self.metric_names]:
            raise ConfigError("metrics", unknown[0], f"must be among {', '.join(self.metric_names)}")
        if not chosen:
            raise ConfigError("metrics", metrics, "must name at least one; null is all of them")
        self.gamma = check_float("gamma", gamma, 0.0, open_low=True)
        self.average = check_choice("labels", labels, ("quality", "label"))
        self.tokens, self.width = facts.arrays["tokens"]
        #: Weights of the metrics in PRS, which sum to 1; 0 of metrics that are not used.
        self.weight_K: Tensor
        #: Means of both models over the train prompts.
        self.mu_2K: Tensor
        asked = torch.tensor([float(name in chosen) for name in self.metric_names])
        self.register_buffer("weight_K", asked / asked.sum())
        self.register_buffer("mu_2K", torch.zeros(2, len(asked)))

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Compare the models, train the router, and keep the scores of the val prompts."""
        quality, flaws = self.read_train(cloud, "quality", "flaws")
        for number, side in enumerate(("device", "cloud")):
            if blank := int(flaws[:, number].sum()):
                total = f"{flaws[:, number].numel():,}"
                log.warning(
                    "pair: %s of %s pictures of the %s are of one colour (black, say)", f"{blank:,}", total, side
                )
        pair = compare_pair(quality.numpy(), self.metric_names)
        for line in pair.itertuples():
            used = "" if line.used else "; not used: within two standard errors"
            means = (
                f"device {line.device:.3f}, cloud {line.cloud:.3f}, {line.difference:+.4f} ± {line.standard_error:.4f}"
            )
            log.info("pair: %s: %s%s", line.metric, means, used)
        used_K = torch.tensor(pair["used"].tolist()) & (self.weight_K > 0)
        if not used_K.any():
            raise UserError(_no_difference(pair))
        self.weight_K = used_K.float() / used_K.sum()
        self.mu_2K = torch.from_numpy(pair[["device", "cloud"]].to_numpy().T.astype(np.float32))
        record = self.train_router(cloud, fit)
        self.eval().requires_grad_(False)
        with torch.no_grad():
            self.refer(cloud)
        return {**record, "pair": pair.to_dict("records")}

    def read_train(self, cloud: CloudView, *names: str) -> list[Tensor]:
        """Return stored arrays of the train prompts, each once, [N, ...]."""
        batches = list(cloud.distinct("train"))
        return [torch.cat([batch.arrays[name][batch.mask_CS] for batch in batches]) for name in names]

    def train_router(self, cloud: CloudView, fit: Fit) -> Record:
        """Train what gives the scores, and return the record of it; by default nothing is trained."""
        return {}

    def true_labels(self, quality: Tensor) -> Tensor:
        """Return D of every metric, [B, K], from the quality [B, 2, P, K]."""
        return labels_of(quality, self.mu_2K, self.gamma, self.average)

    def true_superiority(self, quality: Tensor) -> Tensor:
        """Return the true PRS, [B]."""
        return pareto_superiority(self.true_labels(quality), self.weight_K)

    @abstractmethod
    def score_prompts(self, prompts_BL: Tensor, tokens_Bnd: Tensor) -> Tensor:
        """Return the score of prompts, [B], from their bytes (`iciia_exp.data.prompts`) and their tokens."""

    def score(self, batch: ClientBatch) -> Tensor:
        """Return the score of every prompt, [C, S]; 0 where padded."""
        score_CS = torch.zeros(batch.mask_CS.shape, device=batch.x_CSD.device)
        prompts, tokens = (batch.arrays[name][batch.mask_CS] for name in ("images", "tokens"))
        score_CS[batch.mask_CS] = self.score_prompts(prompts, tokens)
        return score_CS

    def logits(self, batch: ClientBatch, causal: bool = False) -> Tensor:
        """Return the logit of the score, the same for every metric, [C, S, K]."""
        return self.score(batch).clamp(1e-6, 1 - 1e-6).logit().unsqueeze(-1).expand(-1, -1, self.num_classes)

    def router_macs(self) -> int:
        """Return the MACs of the router for a prompt without padding, without the text encoder; by default none."""
        return 0

    def budget(self, sizes: Sizes) -> Budget:
        """The router for every prompt; with the share in the cloud, a prompt up, and a picture down."""
        router: int | None = self.router_macs()
        if self.reads_text:
            router = None if sizes.encoder_macs is None else sizes.encoder_macs + self.router_macs()
        up = Line("request", "device", "method", kind="prompt", bytes=sizes.image_bytes)
        down = Line("request", "cloud", "method", kind="picture", bytes=sizes.picture_bytes)
        device, cloud = sizes.backbone_macs, sizes.cloud_macs
        return self.routing_lines(sizes, router=router, device=device, cloud=cloud, up=up, down=down)


def _no_difference(pair: pd.DataFrame) -> str:
    means = [
        f"{row.metric} {row.device:.3f} and {row.cloud:.3f} ({row.difference:+.4f} ± {row.standard_error:.4f})"
        for row in pair.itertuples()
    ]
    problem = "the two models do not differ in any metric by more than two standard errors: nothing can be routed"
    return f"{problem}; device and cloud: {', '.join(means)}; choose models that differ, or more prompts"
