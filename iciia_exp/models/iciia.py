"""ICIIA: intra-client and inter-image attention between a frozen backbone and its classifier.

Source: "Adapting the Attention of Cloud-Based Recognition Model to Client-Side Images without Local Re-Training"
(ACML 2024, PMLR 260:223-238). The images of one client are the tokens; there are no positions and no class token.
Two differences from the released code: layers are initialised independently (there, all layers start equal), and
attention can be causal. An image then attends to itself and the client's earlier images, whose keys and values never
change, so that one more image costs one step.

Legend: C clients, S images of a client, P images of its past, n new images, D features, K classes, N layers, H heads,
G groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iciia_exp.models.layers import EncoderLayer, visible

__all__ = ["ICIIA", "divisors"]


def divisors(number: int) -> list[int]:
    """Return all divisors in increasing order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [d for d in range(1, number + 1) if number % d == 0]


class ICIIA(nn.Module):
    """N post-norm encoder layers over a client's images, ReLU, and a linear classifier.

    Args:
        dim: D, length of a feature; divisible by ``num_heads`` and ``num_groups``.
        num_classes: K.
        num_layers: N.
        num_heads: H.
        num_groups: G; 1 is "base" (ICIIA-B), 256 "tiny" (ICIIA-T), ``dim`` "max".
        dropout: of attention probabilities, hidden units and both residual branches.
        shuffle: interleave the groups after every projection; without it, groups never mix inside a projection.
        causal: an image attends to itself and earlier images only.

    Shapes: ``x_CSD`` [C, S, D] and ``mask_CS`` [C, S] (True = a real image; None = all are) to logits [C, S, K].
    Logits at padded positions are undefined.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_layers: int = 3,
        num_heads: int = 4,
        num_groups: int = 1,
        dropout: float = 0.1,
        shuffle: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__()
        for name, count in (("num_heads", num_heads), ("num_groups", num_groups)):
            if count < 1 or dim % count:
                raise ValueError(f"{name}={count} does not divide D={dim}; valid: {', '.join(map(str, divisors(dim)))}")
        self.dim, self.num_classes, self.causal = dim, num_classes, causal
        self.layers = nn.ModuleList(
            EncoderLayer(dim, num_heads, num_groups, dropout, shuffle) for _ in range(num_layers)
        )
        self.classifier = nn.Linear(dim, num_classes)

    def encode(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return the classifier's input, [C, S, D]."""
        attended = self._visible(x_CSD, mask_CS)
        for layer in self.layers:
            x_CSD = layer(x_CSD, attended)
        return F.relu(x_CSD)

    def _visible(self, x_CSD: Tensor, mask_CS: Tensor | None) -> Tensor | None:
        attended = visible(x_CSD.shape[1], mask_CS, self.causal)
        return None if attended is None else attended.to(x_CSD.device)

    def attention_maps(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return the attention weights of every layer and head, [N, C, H, S, S]; rows sum to one."""
        attended, maps = self._visible(x_CSD, mask_CS), []
        for layer in self.layers:
            maps.append(layer.attention.weights(x_CSD, attended))  # type: ignore[operator, union-attr]
            x_CSD = layer(x_CSD, attended)
        return torch.stack(maps)

    @property
    def state_width(self) -> int:
        """Length of an image's state in `encode_step`: keys and values of every layer, 2 N D."""
        return 2 * len(self.layers) * self.dim

    def encode_step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the classifier's input for one more image of each client, [C, D], and the image's state, [C, E].

        The result is that of `encode` for the last image. It needs causal attention, or full attention with one layer,
        where keys and values depend on their image alone; else it raises a `ValueError`.

        Args:
            x_CD: the images.
            past_CPE: states of each client's past images, E = 2 N D: keys and values of every layer.
            mask_CP: True where a past image is real; None where all are.
        """
        if not self.causal and len(self.layers) > 1:
            raise ValueError(
                "full attention with several layers changes the states of past images: encode all images again"
            )
        attended = None if mask_CP is None else F.pad(mask_CP, (0, 1), value=True)[:, None, None, :]
        past_N2CPD = past_CPE.unflatten(2, (len(self.layers), 2, self.dim)).permute(2, 3, 0, 1, 4)
        states = []
        for layer, past_2CPD in zip(self.layers, past_N2CPD, strict=True):
            x_CD, state_2CD = layer.step(x_CD, past_2CPD, attended)  # type: ignore[operator]
            states.append(state_2CD)
        return F.relu(x_CD), torch.stack(states).permute(2, 0, 1, 3).flatten(1)

    def encode_steps(self, x_CnD: Tensor, memory_CSE: Tensor, visible_CnS: Tensor | None) -> Tensor:
        """Return the classifier's input for some more images of each client, [C, n, D].

        The attention must be as for `encode_step`.

        Args:
            x_CnD: the images.
            memory_CSE: states of each client's past images; those of the new ones are written into the last n places.
            visible_CnS: True where an image, of the last n, sees a place; None where each sees all.
        """
        attended = None if visible_CnS is None else visible_CnS[:, None]
        memory_N2CSD = memory_CSE.unflatten(2, (len(self.layers), 2, self.dim)).permute(2, 3, 0, 1, 4)
        for layer, memory_2CSD in zip(self.layers, memory_N2CSD, strict=True):
            x_CnD = layer.steps(x_CnD, memory_2CSD, attended)  # type: ignore[operator]
        return F.relu(x_CnD)

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return the logits, [C, S, K]."""
        return self.classifier(self.encode(x_CSD, mask_CS))

    @classmethod
    def from_reference(cls, state: Mapping[str, Tensor], num_heads: int = 4, shuffle: bool = True) -> ICIIA:
        """Build the module from a checkpoint in the released layout; sizes are read from the tensors.

        Args:
            state: tensors named ``encoder.layers.{i}...`` and ``classifier.*``, one group or several.
            num_heads: H; the checkpoint does not record it.
            shuffle: whether it was trained with shuffle; not recorded either.

        Raises a `ValueError` for another layout.
        """
        # with one group, layers and projections have the names of PyTorch's encoder
        renames = {
            "encoder_layers.0.": "",
            "self_attn.in_proj_": "attention.qkv.",
            "self_attn.out_proj_": "attention.out.",
            "self_attn.out_proj.": "attention.out.",
        }
        renamed = {}
        for name, tensor in state.items():
            name = name.removeprefix("encoder.")
            for old, new in renames.items():
                name = name.replace(old, new)
            renamed[name] = tensor.to(torch.float32)
        try:
            num_classes, dim = renamed["classifier.weight"].shape
            first = renamed["layers.0.linear1.weight"]
        except KeyError as error:
            raise ValueError(f"not a checkpoint in the released layout: it has no {error}") from None
        num_layers = 1 + max(int(name.split(".")[1]) for name in renamed if name.startswith("layers."))
        groups = 1 if first.ndim == 2 else first.shape[0]
        model = cls(dim, num_classes, num_layers, num_heads, groups, shuffle=shuffle)
        model.load_state_dict(renamed)
        return model
