"""Small CNN: a convolutional network for small images, trained in seconds to minutes."""

from torch import Tensor, nn

from iciia_exp.errors import check_float, check_int
from iciia_exp.models.backbones.small_images import SmallImageBackbone

__all__ = ["SmallCNN"]


class SmallCNN(SmallImageBackbone):
    """Three 3x3 convolutions with batch norm, two poolings, and one hidden layer that gives the feature.

    Args:
        num_classes: K.
        channels: of the input image, 1 (grey) or 3 (RGB).
        size: height and width of the input in pixels; divisible by 4.
        width: channels of the first convolution; the others have twice and four times as many.
        dim: D, units of the hidden layer after its ReLU.
        dropout: of the feature, in training.
        mean, std: the input is (image - mean) / std.
    """

    config_name = "small_cnn"

    def __init__(
        self,
        num_classes: int,
        channels: int = 1,
        size: int = 8,
        width: int = 32,
        dim: int = 512,
        dropout: float = 0.3,
        mean: float = 0.3,
        std: float = 0.5,
    ) -> None:
        super().__init__()
        self.channels, self.size = check_int("channels", channels, 1, 3), check_int("size", size, 4, 1024)
        check_int("width", width, 1, 4096)
        self.dim = check_int("dim", dim, 1, 65_536)
        self.mean, self.std = check_float("mean", mean, -1e3, 1e3), check_float("std", std, 0.0, 1e3, open_low=True)

        def conv(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        side = size // 4
        self.trunk = nn.Sequential(
            *conv(channels, width),
            *conv(width, 2 * width),
            nn.MaxPool2d(2),
            *conv(2 * width, 4 * width),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width * side * side, dim),
            nn.ReLU(),
            nn.Dropout(check_float("dropout", dropout, 0.0, 1.0)),
        )
        self.head = nn.Linear(dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return the hidden layer after its ReLU, [B, D]."""
        return self.trunk(images)
