"""MIET: a device trains a small network on its own labels; its input are tokens that a cloud backbone sends.

Source: "Minimal Interaction Separated Tuning" (CVPR 2025, arXiv 2406.17559): the backbone on the cloud is frozen, one
sum of its token levels comes down for every image (`iciia_exp.models.gather`), and the device trains low-rank attention
and a classifier on it (`iciia_exp.models.lae`). Number of blocks, rank, pooling, standardisation, the start at a linear
classifier and the recipe are ours: the paper's are not public.

Legend: C clients, S images of a client, n tokens, d features of a token.
"""

from typing import Any

import torch
from torch import Tensor

from iciia_exp.data.batches import ClientBatch
from iciia_exp.methods.base import Facts
from iciia_exp.methods.tune.device_network import DeviceNetwork
from iciia_exp.models.lae import LAE

__all__ = ["Miet"]


class Miet(DeviceNetwork):
    """Low-rank attention and a classifier for every client, on the sum of a backbone's token levels.

    Training starts as a linear classifier on the pooled token, which is trained first.

    Args:
        facts: task, sizes, and the shape of the tokens.
        blocks: m; 0 is a linear classifier, and with ``pool: class`` only the class token is sent.
        rank: r.
        heads: H.
        pool: ``class``: the class token is classified; ``mean``: the mean over the patches; ``both``.
        subtract: classify what the blocks added (LAST).
        mixer: what a block is: ``attention``, or in its place, of the same size, a ``perceptron`` of each token or a
            ``convolution`` over the patches.
        training: further arguments of `DeviceNetwork`.
    """

    name = "miet"
    reads = frozenset({"features", "tokens"})
    array = "tokens"

    def __init__(
        self,
        facts: Facts,
        blocks: int = 2,
        rank: int = 16,
        heads: int = 1,
        pool: str = "class",
        subtract: bool = False,
        mixer: str = "attention",
        **training: Any,
    ) -> None:
        super().__init__(facts, **training)
        network = {"rank": rank, "heads": heads, "pool": pool, "subtract": subtract, "mixer": mixer}
        self._settings: dict[str, Any] = {"blocks": blocks, **network}
        self.empty_network()  # errors of its settings
        if not blocks and pool == "class":  # the class token alone is sent
            self.shape, self.kinds = (1, self.width), 1

    def read(self, batch: ClientBatch) -> Tensor:
        """Return what is sent of a batch, [C, S, n, d]; without blocks the class token alone, n = 1."""
        return super().read(batch)[:, :, : self.shape[0]]

    def network(self, classes: int) -> LAE:
        """Return low-rank attention and a classifier."""
        return LAE(self.width, classes, prefix=self.prefix, **self._settings)

    def network_macs(self, classes: int) -> int:
        """Of blocks and classifier: m (4 n d r + 2 n^2 r) + d k, with attention."""
        with torch.device("meta"):
            return self.network(classes).macs(self.shape[0])

    def linear(self, classes: int) -> LAE:
        """Return the classifier on the pooled token."""
        return LAE(self.width, classes, blocks=0, pool=self._settings["pool"], prefix=self.prefix)

    def linear_input_macs(self) -> int | None:
        """0, and None without blocks."""
        return 0 if self._settings["blocks"] else None

    def linear_input(self, x: Tensor) -> Tensor:
        """Return the tokens that are pooled, after blocks that add nothing yet."""
        return x[:, :, :1] if self._settings["pool"] == "class" else x
