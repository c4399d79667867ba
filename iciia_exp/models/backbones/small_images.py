"""Input of the small networks that are trained here: arrays of their own size, or pictures of any size."""

from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iciia_exp.data.readers.images import as_picture
from iciia_exp.models.backbones.base import Backbone, other_form

__all__ = ["SmallImageBackbone"]


class SmallImageBackbone(Backbone):
    """A network whose input is (image - mean) / std, [channels, size, size]. A subclass sets these four attributes."""

    transform_settings = ("size", "channels", "mean", "std")
    #: Name of its configuration, for errors.
    config_name: ClassVar[str]
    channels: int
    size: int
    mean: float
    std: float

    def transform(self, image: Any) -> Tensor:
        """Turn a float32 array [channels, size, size], or an image of any size, into the input.

        The image is that of `iciia_exp.data.readers.images.as_picture`.
        """
        channels, size = self.channels, self.size
        own = isinstance(image, np.ndarray) and image.dtype.kind == "f" and image.ndim == 3 and image.shape[0] in (1, 3)
        if own and image.shape != (channels, size, size):
            raise other_form(self.config_name, f"arrays [{channels}, {size}, {size}], or pictures of any size", image)
        if not own:
            image = as_picture(image).convert("L" if channels == 1 else "RGB")
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)  # averages when it shrinks
            image = np.asarray(image, dtype=np.float32).reshape(size, size, -1).transpose(2, 0, 1) / 255.0
        return self.from_pixels(torch.as_tensor(image))

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Return (pixels - mean) / std."""
        return (pixels - self.mean) / self.std
