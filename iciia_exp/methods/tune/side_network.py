"""Side network: ladder side-tuning, on all token levels of a cloud backbone.

Source: "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning" (NeurIPS 2022, arXiv 2206.06522).
All levels that are used are sent.

Legend: m blocks, n tokens, d features of a token, w width of the side network, k classes of a client.
"""

from typing import Any

from torch import Tensor

from iciia_exp.methods.base import Facts
from iciia_exp.methods.tune.device_network import LevelNetwork
from iciia_exp.models.ladder import Ladder

__all__ = ["SideNetwork"]


class SideNetwork(LevelNetwork):
    """A narrow transformer beside the backbone, and a classifier, for every client.

    Training starts as a linear classifier on the class token of the last level.

    Args:
        facts: task, sizes, and the shape of the levels.
        blocks: m; the network reads m + 1 levels from the first to the last, evenly spaced. Null: all levels.
        width: w.
        heads: of its attention.
        training: further arguments of `DeviceNetwork`.
    """

    name = "side_network"

    def __init__(
        self, facts: Facts, blocks: int | None = None, width: int = 48, heads: int = 4, **training: Any
    ) -> None:
        super().__init__(facts, blocks, **training)
        self._settings: dict[str, Any] = {"width": width, "heads": heads}
        self.empty_network()  # errors of its settings

    def network(self, classes: int) -> Ladder:
        """Return the side network and a classifier."""
        return Ladder(self.width, classes, self.shape[0] - 1, **self._settings)

    def network_macs(self, classes: int) -> int:
        """(m + 1) n d w + m (12 n w^2 + 2 n^2 w) + w d + d k."""
        (levels, n, d), w = self.shape, self._settings["width"]
        return self.input_macs() + (levels - 1) * (12 * n * w**2 + 2 * n**2 * w) + w * d + d * classes

    def input_macs(self) -> int:
        """Those of the layers that bring the levels down to w: (m + 1) n d w."""
        levels, n, d = self.shape
        return levels * n * d * self._settings["width"]

    def linear_input(self, x: Tensor) -> Tensor:
        """Return the class token of the last level, to which the side network adds nothing yet."""
        return x[..., -1, :1, :]
