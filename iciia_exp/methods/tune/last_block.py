"""Last block: a device tunes the last block of a vision transformer, on the tokens that enter it.

Legend: n tokens, d features of a token, k classes of a client.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from iciia_exp.data.views import CloudView
from iciia_exp.errors import NotApplicable
from iciia_exp.methods.base import Facts, Fit, Record, resize_on_load
from iciia_exp.methods.tune.device_network import DeviceNetwork
from iciia_exp.models.ladder import plain_block

__all__ = ["LastBlock"]


class LastBlock(DeviceNetwork):
    """A copy of the backbone's last block, a norm and a classifier for every client.

    The block is sent to the devices once. Training starts as a linear classifier on its output.

    Args:
        facts: task, sizes, and the shape of the tokens.
        standardise, lr, linear_lr, training: arguments of `DeviceNetwork`.
    """

    name = "last_block"
    reads = frozenset({"features", "block_input"})
    array = "block_input"

    def __init__(
        self,
        facts: Facts,
        standardise: bool = False,
        lr: Any = 0.0001,
        linear_lr: float | None = 0.001,
        **training: Any,
    ) -> None:
        super().__init__(facts, standardise=standardise, lr=lr, linear_lr=linear_lr, **training)
        self.form: Tensor
        self.values: Tensor
        #: Heads, width of the perceptron, and whether it has biases of queries, keys and values, and layer scale.
        self.register_buffer("form", torch.tensor([1, 4 * self.width, 1, 0]))
        #: Parameters of the block.
        self.register_buffer("values", parameters_to_vector(self._block().parameters()).detach())
        resize_on_load(self, "values")

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Copy the backbone's last block."""
        block: Any = cloud.backbone().net.blocks[-1]
        try:
            scaled = not isinstance(block.ls1, nn.Identity)
            form = [block.attn.num_heads, block.mlp.fc1.out_features, block.attn.qkv.bias is not None, scaled]
            self.form.copy_(torch.tensor(form))
            own = self._block()
            own.load_state_dict(block.state_dict())
        except (AttributeError, RuntimeError) as error:
            problem = "needs a backbone whose last block is that of a plain vision transformer"
            raise NotApplicable("method", self.name, problem) from error
        self.values = parameters_to_vector(own.parameters()).detach()
        return super().learn(cloud, fit)

    def _block(self) -> Any:
        """Build a block of the form; its values are drawn at random."""
        heads, hidden, bias, scaled = self.form.tolist()
        return plain_block(self.width, heads, hidden / self.width, bool(bias), bool(scaled))

    def network(self, classes: int) -> nn.Module:
        """Return the block, a norm and a classifier."""
        return BlockClassifier(self._block(), self.width, classes, self.values)

    def network_macs(self, classes: int) -> int:
        """12 n d^2 + 2 n^2 d + d k, for a perceptron of width 4 d."""
        return self._block_macs() + self.width * classes

    def _block_macs(self) -> int:
        n, d = self.shape
        return 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * int(self.form[1])

    @torch.no_grad()
    def linear_input(self, x: Tensor) -> Tensor:
        """Return the class token after the block as it was sent."""
        block = self._drawn(self.network).block
        return torch.stack([block(images)[:, :1] for images in x])

    def linear_input_macs(self) -> int | None:
        """Those of the block."""
        return self._block_macs()

    def payload(self) -> dict[str, Tensor]:
        """Return the block."""
        return {"block": self.values}


class BlockClassifier(nn.Module):
    """A block of a vision transformer, a norm, and a linear classifier on the class token.

    Args:
        block: of n x d tokens.
        dim: d.
        num_classes: k.
        values: of the block's parameters.
    """

    def __init__(self, block: nn.Module, dim: int, num_classes: int, values: Tensor) -> None:
        super().__init__()
        self.block, self.norm, self.head = block, nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, num_classes)
        if not self.head.weight.is_meta:
            vector_to_parameters(values.clone(), block.parameters())
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)

    def forward(self, x_Bnd: Tensor) -> Tensor:
        """Return the logits, [B, k]."""
        return self.head(self.norm(self.block(x_Bnd)[:, 0]))
