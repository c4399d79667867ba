"""Any torchvision classification model as a backbone: https://docs.pytorch.org/vision/stable/models.html."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms import functional as tf

from iciia_exp.errors import ConfigError, check_choice, check_int, first_line, nearest
from iciia_exp.models.backbone import ImageBackbone
from iciia_exp.models.weights import fetched

__all__ = ["TorchvisionBackbone"]


class TorchvisionBackbone(ImageBackbone):
    """A torchvision model; the feature is the input of its last linear layer, the crop its weights' own.

    Args:
        num_classes: K.
        model: torchvision's name (``swin_b``).
        weights_name: name of the weights whose crop to use, and which `pretrained` loads (``IMAGENET1K_V1``); null is
            the model's default.
        image_size: pixels of the square crop; null is the weights' own. The shorter side is resized in proportion.
        options: further arguments of the model's builder.
    """

    def __init__(
        self,
        num_classes: int,
        model: str,
        weights_name: str | None = None,
        image_size: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.options = model, dict(options or {})
        names = models.list_models(module=models)
        if model not in names:
            near = nearest(model, names)
            raise ConfigError(
                "model", model, f"torchvision has no such model{f'; did you mean {near}?' if near else ''}"
            )
        enum = models.get_model_weights(model)
        names = [w.name for w in enum]
        check_choice("weights_name", weights_name or enum.DEFAULT.name, names)
        self.enum = enum[weights_name] if weights_name else enum.DEFAULT
        try:
            net = models.get_model(model, weights=None, num_classes=num_classes, **self.options)
        except TypeError as error:
            raise ConfigError("options", self.options, first_line(error)) from error
        name, head = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear)][-1:][0]
        if head.out_features != num_classes:
            raise ConfigError("model", model, "its classifier is not one linear layer on one feature")
        parent, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(parent), leaf, nn.Identity())
        preset = self.enum.transforms()
        size = preset.crop_size[0] if image_size is None else check_int("image_size", image_size, 8)
        super().__init__(net, head, preset.mean, preset.std)
        self.head_name = name
        self.crop_size, self.interpolation = size, preset.interpolation
        self.resize_size = round(preset.resize_size[0] * size / preset.crop_size[0])

    def crop(self, image: Any) -> Any:
        """Resize the shorter side and crop the centre, as torchvision's evaluation preset does."""
        return tf.center_crop(tf.resize(image, [self.resize_size], self.interpolation), [self.crop_size])

    def describe_transform(self) -> dict[str, Any]:
        """Return the evaluation preset."""
        return {
            "resize_size": self.resize_size,
            "crop_size": self.crop_size,
            "interpolation": self.interpolation.value,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def pretrained_state(self) -> dict[str, Tensor]:
        """Return torchvision's weights, from torch.hub's cache or the network."""
        url = self.enum.url
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
        host = "localhost" if path.is_file() else urlparse(url).hostname or ""
        bring = f"get {url} elsewhere and put it at {path}"
        what = f"torchvision's {self.model} {self.enum.name}"
        return dict(fetched(lambda: self.enum.get_state_dict(progress=False, check_hash=True), what, host, bring))
