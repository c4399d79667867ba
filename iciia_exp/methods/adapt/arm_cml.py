"""ARM-CML: the mean of a context network over the client's images is an input of the prediction network.

Source: Zhang, Marklund, Dhawan, Gupta, Levine and Finn 2021, "Adaptive Risk Minimization: Learning to Adapt to Domain
Shift" (contextual meta-learning). In the paper both networks read pixels; here they read the backbone's features, as
every other method: context D -> h -> h -> c, prediction [D + c] -> D -> K, ReLU between.

Legend: C clients, S images of a client, P images of its past, D features, K classes, c context, h hidden units.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iciia_exp.errors import check_float, check_int
from iciia_exp.methods.adapt.base import Adaptive, real_images
from iciia_exp.methods.base import Facts

__all__ = ["ArmCml"]


class ArmCml(Adaptive):
    """Contextual meta-learning on features.

    Args:
        facts: task, D and K; the module trains a classifier of its own.
        context: c, width of the context.
        hidden: h, units of the context network.
        dropout: on the prediction network's hidden units, while training.
    """

    name = "arm_cml"
    causal = True

    def __init__(self, facts: Facts, context: int = 64, hidden: int = 64, dropout: float = 0.1) -> None:
        super().__init__(facts)
        self.width, self.hidden = check_int("context", context, 1, 65_536), check_int("hidden", hidden, 1, 65_536)
        self.context = nn.Sequential(
            nn.Linear(self.dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, context)
        )
        drop = nn.Dropout(check_float("dropout", dropout, 0.0, 1.0))
        self.inner = nn.Sequential(nn.Linear(self.dim + context, self.dim), nn.ReLU(), drop)
        self.classifier = nn.Linear(self.dim, self.num_classes)

    def _predict(self, x: Tensor, context: Tensor) -> Tensor:
        return self.classifier(self.inner(torch.cat([x, context.expand(*x.shape[:-1], -1)], -1)))

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return the logits, [C, S, K], with the mean context of all images of the client."""
        real_CS1 = real_images(x_CSD, mask_CS).unsqueeze(2)
        mean_C1c = (self.context(x_CSD) * real_CS1).sum(1, keepdim=True) / real_CS1.sum(1, keepdim=True).clamp(min=1)
        return self._predict(x_CSD, mean_C1c)

    def stream(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return every image's logits with the mean context of it and the images before it, [C, S, K]."""
        real_CS1 = real_images(x_CSD, mask_CS).unsqueeze(2)
        sum_CSc = (self.context(x_CSD) * real_CS1).cumsum(1)
        return self._predict(x_CSD, sum_CSc / real_CS1.cumsum(1).clamp(min=1))

    @property
    def state_width(self) -> int:
        """The context of every image: c."""
        return self.width

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of one more image, [C, K], and its context, [C, c]."""
        context_Cc = self.context(x_CD)
        context_CSc = torch.cat([past_CPE, context_Cc.unsqueeze(1)], 1)
        mask_CS = None if mask_CP is None else F.pad(mask_CP, (0, 1), value=True)
        real_CS1 = real_images(context_CSc, mask_CS).unsqueeze(2)
        return self._predict(x_CD, (context_CSc * real_CS1).sum(1) / real_CS1.sum(1)), context_Cc

    def macs(self, images: int) -> int:
        """S (D h + h^2 + h c + (D + c) D)."""
        context = self.dim * self.hidden + self.hidden**2 + self.hidden * self.width
        return images * (context + (self.dim + self.width) * self.dim)

    def streaming_macs(self, images: int) -> int | None:
        """The cost of one image; the contexts of the others are kept."""
        return self.macs(1)

    def num_parameters(self) -> int:
        """All but the classifier, which takes the place of the backbone's."""
        return sum(p.numel() for part in (self.context, self.inner) for p in part.parameters())
