"""LAST: low-rank attention side-tuning, on all token levels of a cloud backbone.

Source: "Low-rank Attention Side-Tuning" (arXiv 2402.04009), the predecessor of MIET by the same group: a side stream
starts at z_0 and adds z_i before its i-th block. No code is public. MIET is LAST with one injection: their sum at the
start. All levels that are used are sent.

Legend: m blocks, n tokens, d features of a token, r rank, k classes of a client.
"""

from typing import Any

import torch
from torch import Tensor

from iciia_exp.methods.base import Facts
from iciia_exp.methods.tune.device_network import LevelNetwork
from iciia_exp.models.lae import LAST

__all__ = ["Last"]


class Last(LevelNetwork):
    """A side stream of low-rank attention and a classifier for every client.

    The classifier is trained first, on the class token of the sum of the levels.

    Args:
        facts: task, sizes, and the shape of the levels.
        blocks: m; the stream reads m + 1 levels from the first to the last, evenly spaced. Null: all levels.
        rank: r.
        heads: H.
        subtract: classify what the blocks added, as published.
        training: further arguments of `DeviceNetwork`.
    """

    name = "last"

    def __init__(
        self,
        facts: Facts,
        blocks: int | None = None,
        rank: int = 16,
        heads: int = 1,
        subtract: bool = False,
        **training: Any,
    ) -> None:
        super().__init__(facts, blocks, **training)
        self._settings: dict[str, Any] = {"rank": rank, "heads": heads, "subtract": subtract}
        self.empty_network()  # errors of its settings

    def network(self, classes: int) -> LAST:
        """Return the side stream and a classifier."""
        return LAST(self.width, classes, self.shape[0] - 1, prefix=self.prefix, **self._settings)

    def network_macs(self, classes: int) -> int:
        """Of blocks and classifier: m (4 n d r + 2 n^2 r) + d k, with attention."""
        with torch.device("meta"):
            return self.network(classes).macs(self.shape[1])

    def linear_input(self, x: Tensor) -> Tensor:
        """Return the class token of the sum of the levels, which the blocks do not change yet."""
        return x[..., :1, :].sum(-3)
