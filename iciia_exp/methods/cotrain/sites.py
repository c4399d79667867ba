"""Sites of a training in rounds: their images, their jobs, what they send back, and the average of it.

Legend: n images of a site, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["CLOUD", "Job", "Packed", "Samples", "Site", "Update", "Weights", "average", "weights_of"]

#: Parameters and running statistics by name.
Weights = dict[str, Tensor]

#: Weights as they are sent (`iciia_exp.models.payloads.pack_weights`).
Packed = dict[str, tuple[Tensor, ...]]

#: Number of the cloud among the sites; devices have numbers from 0.
CLOUD = -1


class Samples(NamedTuple):
    """Labelled images of a site."""

    x: Tensor  # [n, ...], of the array that the network reads
    y: Tensor  # int64 [n]
    #: logits of the backbone's classifier, [n, K], where the site may have them; else None
    large: Tensor | None = None

    def take(self, rows: Any) -> Samples:
        """Return some of the images."""
        return Samples(self.x[rows], self.y[rows], None if self.large is None else self.large[rows])

    def join(self, other: Samples) -> Samples:
        """Return the images of both; logits only if both have them."""
        large = None if self.large is None or other.large is None else torch.cat([self.large, other.large])
        return Samples(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]), large)


class Site:
    """A device, or the cloud: its number and its images.

    Args:
        number: of the device; `CLOUD`.
        own: its labelled images.
    """

    def __init__(self, number: int, own: Samples) -> None:
        self.number, self.own = number, own
        #: all images that it trains on: its own, and those that it has received
        self.samples = own
        #: what a method keeps between the rounds
        self.kept: dict[str, Any] = {}


class Job(NamedTuple):
    """What sites do with the network that they are sent."""

    round: int
    name: str = "train"
    #: names of the parameters that are trained start so; all others stand still, and so do running statistics
    part: str = ""
    lr: float = 0.01
    epochs: int = 1
    cloud: bool = True
    devices: bool = True
    #: whether the cloud takes as many steps as the devices do on average; else it passes over its images once
    equal_steps: bool = True


class Update(NamedTuple):
    """What a site sends back."""

    weights: Weights  # of the part that was trained
    samples: int  # images that it was trained on
    steps: int
    loss: float  # mean over the steps

    @property
    def finite(self) -> bool:
        """Whether all numbers are."""
        return math.isfinite(self.loss) and all(bool(t.isfinite().all()) for t in self.weights.values())


def weights_of(network: nn.Module) -> Weights:
    """Return parameters and running statistics; the counters of batch norms are left out."""
    state = network.state_dict()
    return {name: t.detach() for name, t in state.items() if not name.endswith("num_batches_tracked")}


def average(copies: Mapping[int, Mapping[str, Tensor]], shares: Mapping[int, float]) -> Weights:
    """Return the weighted mean of the copies of a network, in float64 within."""
    names = next(iter(copies.values()))
    total = {name: sum(shares[number] * copy[name].double() for number, copy in copies.items()) for name in names}
    return {name: value.to(names[name].dtype) for name, value in total.items()}  # type: ignore[union-attr]
