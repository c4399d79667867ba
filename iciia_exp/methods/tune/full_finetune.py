"""Full fine-tuning: all weights of the backbone and a classifier, tuned for every client in the cloud.

It is a bound and no way to serve devices: images and labels go to the cloud, which keeps a backbone for every client.

Legend: C clients, S images of a client, D features, k classes of a client.
"""

import copy
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from iciia_exp.cost import count_macs, count_step_macs, training_bytes
from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import NotApplicable
from iciia_exp.ledger import Budget, Line, Link, Sizes
from iciia_exp.methods.base import Facts, Fit, Record
from iciia_exp.methods.tune.device_network import DeviceNetwork, images_up

__all__ = ["FullFinetune"]

_AT_ONCE = 64  # images of a pass


class FullFinetune(DeviceNetwork):
    """A copy of the backbone, a norm and a classifier for every client, trained on the client's images.

    Training starts as a linear classifier on the backbone's features. Batch norms keep the backbone's statistics, and
    dropout is off.

    Args:
        facts: task, sizes, and the backbone's network.
        lr, weight_decay, batch_size, epochs, linear_epochs, patience, seed, linear_lr: as in `DeviceNetwork`.
    """

    name = "full_finetune"
    reads = frozenset({"features", "images"})
    array = "images"
    site = "cloud"
    clients_at_once = 1

    def __init__(
        self,
        facts: Facts,
        lr: float | Sequence[float] = 0.0001,
        weight_decay: float = 0.05,
        batch_size: int = 32,
        epochs: int = 20,
        linear_epochs: int = 50,
        patience: int = 20,
        seed: int = 0,
        linear_lr: float | None = 0.001,
    ) -> None:
        super().__init__(
            facts, False, "float32", lr, weight_decay, batch_size, epochs, linear_epochs, patience, seed, linear_lr
        )
        if facts.network is None:
            raise NotApplicable("method", self.name, "tunes the backbone, and there are only its features")
        self.width = facts.dim
        self.net: Any = facts.network().eval()
        self.net.head = nn.Identity()
        layers: Iterable[Any] = self.net.modules()
        for layer in layers:
            if hasattr(layer, "fused_attn"):  # of timm; its backward pass has no batched form
                layer.fused_attn = False

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Copy the backbone's weights."""
        state = cloud.backbone().state_dict()
        self.net.load_state_dict({name: t for name, t in state.items() if not name.startswith("head.")})
        return super().learn(cloud, fit)

    def network(self, classes: int) -> nn.Module:
        """Return the backbone, a norm and a classifier."""
        return TunedBackbone(self.net, self.width, classes)

    def network_macs(self, classes: int) -> int:
        """Those of the backbone without its classifier, and d k."""
        return self._pass_macs + self.width * classes

    @cached_property
    def _pass_macs(self) -> int:
        return count_macs(self.net, self._example())

    def _example(self) -> Tensor:
        return torch.zeros(1, *self.shape, device=self.most_classes.device)

    def input_macs(self) -> int:
        """Those of the first layer: the images' gradient is not computed."""
        return 3 * self._pass_macs - self._backward_macs

    @cached_property
    def _backward_macs(self) -> int:
        """MACs of the backbone for an image in training, forward and backward."""
        return count_step_macs(self.net, self._example())

    @torch.no_grad()
    def linear_input(self, x: Tensor) -> Tensor:
        """Return the backbone's features, [C, S, 1, D]."""
        parts = [self.net(images) for images in x.flatten(0, 1).split(_AT_ONCE)]
        return torch.cat(parts).view(*x.shape[:2], 1, self.width)

    def linear_input_macs(self) -> int | None:
        """Those of the backbone."""
        return self._pass_macs

    def _down(self, batch: ClientBatch, link: Link) -> Tensor:
        """Send labels to the cloud, after the images; nothing comes down."""
        link.up("labels", batch.y_CS[batch.mask_CS].int(), what="training")
        return self.read(batch)

    def budget(self, sizes: Sizes) -> Budget:
        """Images and labels up, logits down, everything else in the cloud."""
        lines = [
            *images_up(sizes),
            Line("client_once", "device", "training", kind="labels", bytes=4 * (sizes.train + sizes.val)),
            Line("client_once", "cloud", "training", macs=self.training_macs(sizes)),
            Line("request", "cloud", "backbone", macs=sizes.requested * self._pass_macs),
            Line("request", "cloud", "method", macs=sizes.requested * self.width * self.classes),
            Line("request", "cloud", "method", kind="logits", bytes=4 * sizes.requested * self.classes),
        ]
        return Budget(tuple(lines), self.state_bytes())

    def training_bytes(self) -> int:
        """Return the memory of a client's network in training with Adam."""
        network = copy.deepcopy(self.network(self.classes)).to("meta")
        return training_bytes(network, self.shape, self.recipes[0][0].batch_size)


class TunedBackbone(nn.Module):
    """A backbone, a norm, and a linear classifier.

    Args:
        trunk: images to features [B, D].
        dim: D.
        num_classes: k.
    """

    def __init__(self, trunk: nn.Module, dim: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk.requires_grad_(True)
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, num_classes)
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> "TunedBackbone":
        """Leave the backbone in evaluation mode."""
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, x_Bchw: Tensor) -> Tensor:
        """Return the logits, [B, k]."""
        return self.head(self.norm(self.trunk(x_Bchw)))
