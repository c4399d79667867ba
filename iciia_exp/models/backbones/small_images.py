"""Input of the small networks that are trained here: arrays of their own size, or pictures of any size."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iciia_exp.data.readers.images import as_picture
from iciia_exp.models.backbones.base import other_form

__all__ = ["small_input"]


def small_input(image: Any, name: str, channels: int, size: int, mean: float, std: float) -> Tensor:
    """Turn a float32 array [channels, size, size], or an image of any size, into (image - mean) / std.

    The image is that of `iciia_exp.data.readers.images.as_picture`. ``name`` is that of the network, for errors.
    """
    own = isinstance(image, np.ndarray) and image.dtype.kind == "f" and image.ndim == 3 and image.shape[0] in (1, 3)
    if own and image.shape != (channels, size, size):
        raise other_form(name, f"arrays [{channels}, {size}, {size}], or pictures of any size", image)
    if not own:
        image = as_picture(image).convert("L" if channels == 1 else "RGB")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)  # averages when it shrinks
        image = np.asarray(image, dtype=np.float32).reshape(size, size, -1).transpose(2, 0, 1) / 255.0
    return (torch.as_tensor(image) - mean) / std
