"""Linear probe: a device trains a linear classifier on the last feature of a cloud backbone."""

from iciia_exp.methods.tune.device_network import DeviceNetwork
from iciia_exp.models.lae import LAE

__all__ = ["LinearProbe"]


class LinearProbe(DeviceNetwork):
    """A norm and a linear classifier for every client, on the feature that the backbone's classifier reads.

    Its arguments are those of `DeviceNetwork`.
    """

    name = "linear_probe"
    array = "features"

    def network(self, classes: int) -> LAE:
        """Return a norm and a linear classifier."""
        return self.linear(classes)

    def linear_input_macs(self) -> int | None:
        """None: the network is linear itself."""
        return None

    def network_macs(self, classes: int) -> int:
        """D k."""
        return self.width * classes
