"""C3D: eight 3-D convolutions on clips of 16 frames.

Source: Tran et al., "Learning Spatiotemporal Features with 3D Convolutional Networks" (arXiv:1412.0767). Neither
torchvision nor timm has it; layers have the names of the usual PyTorch conversions of the Sports-1M weights (conv1 ...
fc8), so that such files load with ``backbone.weights=FILE``.
"""

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iciia_exp.errors import UserError, check_int
from iciia_exp.models.backbones.base import Backbone

__all__ = ["C3D"]

# name, output channels as a multiple of the first layer's, and the pooling (time, height and width) after it, if any
_LAYERS = (
    ("conv1", 1, (1, 2)),
    ("conv2", 2, (2, 2)),
    ("conv3a", 4, None),
    ("conv3b", 4, (2, 2)),
    ("conv4a", 8, None),
    ("conv4b", 8, (2, 2)),
    ("conv5a", 8, None),
    ("conv5b", 8, (2, 2)),
)


def _trunk(width: int, dropout: float) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for name, times, pool in _LAYERS:
        layers |= {name: nn.Conv3d(channels, times * width, 3, padding=1), f"{name}_relu": nn.ReLU()}
        if pool:  # the last pooling pads height and width, so that 7 pixels become 4
            padding = (0, 1, 1) if name == "conv5b" else 0
            layers[f"{name}_pool"] = nn.MaxPool3d((pool[0], pool[1], pool[1]), padding=padding)
        channels = times * width
    layers["flatten"] = nn.Flatten()
    for name, inputs in (("fc6", channels * 4 * 4), ("fc7", 4096)):
        layers |= {name: nn.Linear(inputs, 4096), f"{name}_relu": nn.ReLU(), f"{name}_dropout": nn.Dropout(dropout)}
    return nn.Sequential(layers)


class C3D(Backbone):
    """Clips [B, 3, 16, 112, 112] in; the feature is fc7 after its ReLU, D = 4096.

    Args:
        num_classes: K.
        frames: of a clip; only 16 fit fc6.
        height, width: of a frame before the 112-pixel centre crop.
        mean: of R, G and B, 0 to 255, subtracted from the input.
        channels: of the first convolution; the others have two to eight times as many.
        dropout: after fc6 and fc7, in training.
    """

    head_name, trunk_prefix = "fc8", "net."
    transform_settings = ("frames", "height", "width", "crop", "mean")
    crop = 112

    def __init__(
        self,
        num_classes: int,
        frames: int = 16,
        height: int = 128,
        width: int = 171,
        mean: tuple[float, ...] = (101.4, 97.7, 90.2),
        channels: int = 64,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.frames = check_int("frames", frames, 16, 16, "the first hidden layer fits no other length")
        self.height, self.width = check_int("height", height, 112, 1024), check_int("width", width, 112, 1024)
        self.mean = tuple(map(float, mean))
        self.dim = 4096
        self.net = _trunk(check_int("channels", channels, 1, 1024), dropout)
        self.head = nn.Linear(self.dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return fc7 after its ReLU, [B, 4096], from uint8 clips [B, 3, 16, 112, 112]."""
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1, 1)
        return self.net(images.float() - mean)

    def transform(self, image: Any) -> Tensor:
        """Turn a clip, uint8 [16, height, width, 3], into uint8 [3, 16, 112, 112]: resized, centre crop."""
        from torchvision.transforms import functional as tf

        clip = np.asarray(image)
        if clip.ndim != 4 or clip.shape[0] != self.frames:
            raise UserError(f"C3D takes clips of {self.frames} frames [16, height, width, 3], got {list(clip.shape)}")
        frames = torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2)
        frames = tf.center_crop(tf.resize(frames, [self.height, self.width], antialias=True), [self.crop])
        return frames.permute(1, 0, 2, 3).contiguous()
