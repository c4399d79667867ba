"""VGG: 3x3 convolutions with batch norm, poolings, and linear layers, of any widths; its channels can be split.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (ICLR 2015), with
batch norm. A network that is cut by its channels into parts whose logits add up is several of these, behind a common
first convolution (`stem`), as in DC-CCL's setting of CIFAR-10 (arXiv 2303.10361).

Legend: B images of a batch, D features, K classes.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from iciia_exp.cost import count_macs
from iciia_exp.errors import ConfigError, check_float, check_int
from iciia_exp.models.backbones.small_images import SmallImageBackbone

__all__ = ["VGG"]


class VGG(SmallImageBackbone):
    """Convolutions and poolings, the mean over the pixels, hidden linear layers, and a classifier.

    The network gives the array ``stem``, the output of its first convolution, if there is one.

    Args:
        num_classes: K.
        channels: of the input: 1 (grey) or 3 (RGB) of an image, or those of another network's stem.
        size: height and width of the input in pixels.
        layers: channels of the convolutions, and ``M`` for max-pooling by 2.
        hidden: units of the hidden linear layers, each after a ReLU.
        stem: channels of a first convolution, which can be shared; null: there is none.
        dropout: after every hidden layer, in training.
        mean, std: the input is (image - mean) / std.
    """

    config_name = "vgg"

    def __init__(
        self,
        num_classes: int,
        channels: int = 1,
        size: int = 28,
        layers: Sequence[int | str] = (8, "M", 16, "M", 32, "M"),
        hidden: Sequence[int] = (),
        stem: int | None = None,
        dropout: float = 0.0,
        mean: float = 0.3,
        std: float = 0.5,
    ) -> None:
        super().__init__()
        self.channels, self.size = check_int("channels", channels, 1, 4096), check_int("size", size, 1, 1024)
        self.mean, self.std = check_float("mean", mean, -1e3, 1e3), check_float("std", std, 0.0, 1e3, open_low=True)
        share = check_float("dropout", dropout, 0.0, 1.0)
        self.stem = nn.Identity() if stem is None else _convolution(channels, check_int("stem", stem, 1))
        inputs, left = channels if stem is None else stem, size
        trunk: list[nn.Module] = []
        for layer in layers:
            if layer == "M":
                if left < 2:
                    raise ConfigError("layers", list(layers), f"pools an image of {size} pixels to nothing")
                trunk.append(nn.MaxPool2d(2))
                left //= 2
            else:
                trunk.append(_convolution(inputs, inputs := check_int("layers", layer, 1)))
        trunk += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        for units in hidden:
            linear = nn.Linear(inputs, inputs := check_int("hidden", units, 1))
            trunk += [linear, nn.ReLU(), nn.Dropout(share)]
        self.trunk, self.dim = nn.Sequential(*trunk), inputs
        self.head = nn.Linear(self.dim, num_classes)
        if stem is not None:
            self.gives = self.gives | {"stem"}

    def features(self, images: Tensor) -> Tensor:
        """Return the last hidden layer, or the mean over the pixels, [B, D]."""
        return self.trunk(self.stem(images))

    def trunk_outputs(self, images: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
        """Return ``features`` [B, D] and, if wanted, ``stem`` [B, channels, height, width]."""
        stem = self.stem(images)
        return {"features": self.trunk(stem)} | ({"stem": stem} if "stem" in wanted else {})

    def further_costs(self, example: Tensor) -> dict[str, int]:
        """Return the MACs of the stem."""
        return {"stem_macs": count_macs(self.stem, example[None])} if "stem" in self.gives else {}

    def transform(self, image: Any) -> Tensor:
        """Turn an image into the normalised input."""
        if self.channels not in (1, 3):
            raise ConfigError("channels", self.channels, "is that of another network's stem; an image has 1 or 3")
        return super().transform(image)


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
