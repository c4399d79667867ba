"""ICIIA as a method: the published module on client batches, with its cost.

Source: ICIIA (ACML 2024, PMLR 260:223-238).
"""

from typing import Any

import torch
from torch import Tensor

from iciia_exp.cost import attention_macs, streaming_attention_macs
from iciia_exp.errors import ConfigError, check_bool, check_choice, check_float, check_int
from iciia_exp.methods.adapt.base import Adaptive
from iciia_exp.methods.base import Facts
from iciia_exp.models.iciia import ICIIA, divisors

__all__ = ["ATTENTION", "IciiaMethod"]

ATTENTION = ("full", "causal")


class IciiaMethod(Adaptive):
    """The images of a client attend to each other.

    Args:
        facts: task, D and K; the module trains a classifier of its own.
        num_layers: N.
        heads: H, a divisor of D.
        groups: G, a divisor of D, or ``max`` for D.
        dropout: on attention probabilities, hidden units and both branches, while training.
        shuffle: interleave the groups after every projection.
        attention: ``full`` (published) or ``causal``: an image sees itself and the client's earlier images, so that
            one more image costs one step and every length of history is trained and evaluated in one pass.
    """

    name = "iciia"

    def __init__(
        self,
        facts: Facts,
        num_layers: int = 1,
        heads: int = 4,
        groups: int | str = 1,
        dropout: float = 0.1,
        shuffle: bool = True,
        attention: str = "full",
    ) -> None:
        super().__init__(facts)
        dim = facts.dim
        given = {"num_layers": num_layers, "heads": heads, "groups": groups, "dropout": dropout, "shuffle": shuffle}
        settings = self.canonical({**given, "attention": attention}, dim)
        self.causal = attention == "causal"
        self.num_layers, self.groups = num_layers, int(settings["groups"])
        self.model = ICIIA(
            dim, facts.num_classes, num_layers, heads, self.groups, dropout, settings["shuffle"], self.causal
        )

    @classmethod
    def canonical(cls, config: dict[str, Any], dim: int) -> dict[str, Any]:
        """Check the values against D; ``max`` becomes D, and with one group shuffle changes nothing."""
        config = dict(config)
        check_int("num_layers", config.get("num_layers", 1), 1, 1000)
        check_float("dropout", config.get("dropout", 0.1), 0.0, 1.0)
        check_bool("shuffle", config.get("shuffle", True))
        check_choice("attention", config.get("attention", "full"), ATTENTION)
        if config.get("groups") == "max":
            config["groups"] = dim
        valid = divisors(dim)
        for key, extra in (("heads", ""), ("groups", ", or max")):
            value = config.get(key, valid[0])
            if isinstance(value, bool) or not isinstance(value, int) or value not in valid:
                choices = ", ".join(map(str, valid)) + extra
                raise ConfigError(key, value, f"must divide the feature width D={dim}; valid: {choices}")
        if config.get("groups") == 1 or config.get("groups") is None:
            config["shuffle"] = True
        return config

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return the module's logits, [C, S, K]."""
        return self.model(x_CSD, mask_CS)

    def attention_weights(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return attention, mean over heads and rolled out over layers (Abnar and Zuidema 2020), [C, S, S].

        A layer's output is taken as half its input and half what it attends to; the product over layers is the share of
        every image in each output of the last layer.
        """
        maps_NCSS = self.model.attention_maps(x_CSD, mask_CS).mean(2)
        itself_SS = torch.eye(x_CSD.shape[1], device=x_CSD.device)
        rolled_CSS = itself_SS.expand_as(maps_NCSS[0])
        for map_CSS in maps_NCSS:
            rolled_CSS = (0.5 * map_CSS + 0.5 * itself_SS) @ rolled_CSS
        return rolled_CSS

    @property
    def takes_steps(self) -> bool:
        """Whether old keys and values stay valid: not with full attention in several layers."""
        return self.model.causal or self.num_layers == 1

    @property
    def state_width(self) -> int:
        """Keys and values of every layer, 2 N D; the features, D, where those do not stay valid."""
        return self.model.state_width if self.takes_steps else self.dim

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of one more image of each client, [C, K], and what to keep of it, [C, E]."""
        if not self.takes_steps:
            return super().step(x_CD, past_CPE, mask_CP)
        encoded_CD, own_CE = self.model.encode_step(x_CD, past_CPE, mask_CP)
        return self.model.classifier(encoded_CD), own_CE

    def newest(self, x_CSD: Tensor, mask_CS: Tensor | None) -> Tensor:
        """Return the logits of the last image of each client, which alone is classified."""
        return self.model.classifier(self.model.encode(x_CSD, mask_CS)[:, -1])

    def step_all(self, x_CnD: Tensor, memory_CSE: Tensor, visible_CnS: Tensor | None) -> Tensor:
        """Return the logits of some more images of each client, [C, n, K]."""
        return self.model.classifier(self.model.encode_steps(x_CnD, memory_CSE, visible_CnS))

    def macs(self, images: int) -> int:
        """(6 S D^2 / G + 2 S^2 D) N; causal attention, which needs half of the square, is counted as full."""
        return attention_macs(images, self.dim, self.groups, self.num_layers)

    def streaming_macs(self, images: int) -> int | None:
        """(6 D^2 / G + 2 S D) N; None for full attention with several layers."""
        return streaming_attention_macs(images, self.dim, self.groups, self.num_layers) if self.takes_steps else None

    def num_parameters(self) -> int:
        """The encoder's; the classifier replaces the backbone's."""
        return sum(p.numel() for p in self.model.layers.parameters())
