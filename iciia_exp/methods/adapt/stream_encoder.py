"""Stream encoder: the published encoder (ICIIA, ACML 2024, PMLR 260:223-238) with causal attention.

Legend: C clients, S images of a client, P images of its past, e numbers kept of one, D features, K classes, N layers.
"""

from torch import Tensor, nn

from iciia_exp.cost import attention_macs, streaming_attention_macs
from iciia_exp.errors import check_float
from iciia_exp.methods.adapt.iciia import IciiaMethod
from iciia_exp.methods.base import Facts
from iciia_exp.models.fast_dropout import drop
from iciia_exp.models.iciia import ICIIA

__all__ = ["StreamEncoder"]


class StreamEncoder(nn.Module):
    """ICIIA's layers, causal, and a linear map from encodings to classes that starts at zero.

    Shapes: features [C, S, D] to encodings [C, S, D].

    Args:
        facts: D and K.
        num_layers: N.
        heads: H, a divisor of D.
        groups: G, a divisor of D, or ``max`` for D.
        dropout: inside the encoder, while training.
        feature_dropout: on the features, while training.
        shuffle: interleave the groups after every projection.
    """

    def __init__(
        self,
        facts: Facts,
        num_layers: int = 1,
        heads: int = 4,
        groups: int | str = 1,
        dropout: float = 0.0,
        feature_dropout: float = 0.2,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        self.feature_dropout = check_float("feature_dropout", feature_dropout, 0.0, 0.9)
        given = {"num_layers": num_layers, "heads": heads, "groups": groups, "dropout": dropout, "shuffle": shuffle}
        settings = IciiaMethod.canonical(given, facts.dim)
        self.dim, self.num_layers, self.groups = facts.dim, num_layers, int(settings["groups"])
        sizes = (facts.dim, facts.num_classes, num_layers, heads, self.groups)
        self.model = ICIIA(*sizes, dropout, settings["shuffle"], causal=True)
        nn.init.zeros_(self.model.classifier.weight)
        nn.init.zeros_(self.model.classifier.bias)

    def dropped(self, x_CSD: Tensor) -> Tensor:
        """Return the features, in training some of them dropped."""
        return drop(x_CSD, self.feature_dropout) if self.training else x_CSD

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return every image's encoding, in which it sees itself and earlier images."""
        return self.model.encode(x_CSD, mask_CS)

    def classify(self, mean: Tensor) -> Tensor:
        """Return the linear map of a mean of encodings [..., D], [..., K]."""
        return self.model.classifier(mean)

    def step(self, x_CD: Tensor, keys_CPe: Tensor, mask_CP: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the encoding of one more image of each client, [C, D], and its keys and values, [C, e]."""
        return self.model.encode_step(x_CD, keys_CPe, mask_CP)

    @property
    def state_width(self) -> int:
        """Keys and values of every layer: 2 N D."""
        return self.model.state_width

    def macs(self, images: int) -> int:
        """(6 S D^2 / G + 2 S^2 D) N."""
        return attention_macs(images, self.dim, self.groups, self.num_layers)

    def streaming_macs(self, images: int) -> int:
        """(6 D^2 / G + 2 S D) N."""
        return streaming_attention_macs(images, self.dim, self.groups, self.num_layers)
