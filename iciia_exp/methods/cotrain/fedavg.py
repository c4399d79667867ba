"""FedAvg and FedProx: the small network is trained with labels alone, by devices and cloud, and answers alone.

Sources: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (AISTATS 2017), and
Li et al., "Federated Optimization in Heterogeneous Networks" (MLSys 2020), whose proximal term holds a device's copy
near to the network that it was sent.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from iciia_exp.data.views import CloudView
from iciia_exp.errors import check_float
from iciia_exp.methods.base import Facts, Fit, Record
from iciia_exp.methods.cotrain.base import CoTrained

__all__ = ["FedAvg"]


class FedAvg(CoTrained):
    """A small network, trained by federated averaging; the backbone takes no part, unless it makes the network's input.

    Args:
        facts: task, sizes, and the shape of the array.
        proximal: weight of FedProx's proximal term in the loss of a device; 0 is FedAvg.
        arguments: those of `CoTrained`. ``cloud_weight=0`` is federated learning of the devices alone, and with
            ``devices=1 share_down=0`` a device that learns by itself.
    """

    name = "fedavg"
    site = "device"

    def __init__(self, facts: Facts, proximal: float = 0.0, **arguments: Any) -> None:
        super().__init__(facts, **arguments)
        self.proximal = check_float("proximal", proximal, 0.0)

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Nothing before the rounds."""
        self.start(self.small)
        self.eval()
        return {}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a round as a device receives them, since devices answer."""
        super().load(self.as_received(weights))
