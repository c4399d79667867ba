"""torchvision: its classification models as backbones, https://docs.pytorch.org/vision/stable/models.html."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms import functional as tf

from iciia_exp.errors import ConfigError, check_choice, check_int, first_line, nearest
from iciia_exp.models.backbones.base import ImageBackbone
from iciia_exp.models.backbones.weights import fetched

__all__ = ["TorchvisionBackbone"]

_MANY_CLASSIFIERS = ("googlenet", "inception_v3")


class TorchvisionBackbone(ImageBackbone):
    """A torchvision model; the feature is the input of its last linear layer, the crop that of its weights.

    Args:
        num_classes: K.
        model: torchvision's name (``swin_b``).
        weights_name: weights (``IMAGENET1K_V1``) that `pretrained` loads, and whose crop is used; null is the model's
            default.
        image_size: pixels of the square crop; null is that of the weights. The shorter side is resized in proportion.
        options: further arguments of the model's builder.
    """

    transform_settings = ("resize_size", "crop_size", "interpolation", "mean", "std")

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
            hint = f"; did you mean {near}?" if (near := nearest(model, names)) else ""
            raise ConfigError("model", model, f"torchvision has no such model{hint}")
        if model in _MANY_CLASSIFIERS:
            raise ConfigError("model", model, "has more classifiers than its last; timm's inception_v3 has one")
        enum = models.get_model_weights(model)
        check_choice("weights_name", weights_name or enum.DEFAULT.name, [w.name for w in enum])
        self.enum = enum[weights_name] if weights_name else enum.DEFAULT
        preset = self.enum.transforms()
        size = preset.crop_size[0] if image_size is None else check_int("image_size", image_size, 8, 4096)
        net = self._create(num_classes, size)
        linears = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear)]
        if not linears or linears[-1][1].out_features != num_classes:
            raise ConfigError("model", model, "its classifier is not one linear layer on one feature")
        name, head = linears[-1]
        parent, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(parent), leaf, nn.Identity())
        super().__init__(net, head, preset.mean, preset.std)
        self.head_name = name
        self.crop_size, self.interpolation = size, preset.interpolation.value
        self.check_options(self.options, size)
        self.resize_size = round(preset.resize_size[0] * size / preset.crop_size[0])

    def _create(self, num_classes: int, size: int) -> nn.Module:
        # these models take other sizes only through an argument
        fixed: dict[str, dict[str, Any]] = {"vit_": {"image_size": size}, "maxvit_": {"input_size": (size, size)}}
        more = next((option for start, option in fixed.items() if self.model.startswith(start)), {})
        try:
            return models.get_model(self.model, weights=None, num_classes=num_classes, **{**more, **self.options})
        except Exception as error:
            if isinstance(error, ValueError) and not self.options:  # MaxVit: a size that its windows do not divide
                raise ConfigError("image_size", size, first_line(error)) from error
            raise ConfigError("options", self.options, f"do not fit here ({first_line(error)})") from error

    def crop(self, image: Any) -> Any:
        """Resize the shorter side and crop the centre, as torchvision's evaluation preset does."""
        resized = tf.resize(image, [self.resize_size], tf.InterpolationMode(self.interpolation))
        return tf.center_crop(resized, [self.crop_size])

    def pretrained_state(self) -> dict[str, Tensor]:
        """Return torchvision's weights, from torch.hub's cache or the network."""
        url = self.enum.url
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
        host = "localhost" if path.is_file() else urlparse(url).hostname or ""
        bring = f"get {url} elsewhere and put it at {path}"
        what = f"torchvision's {self.model} {self.enum.name}"
        # through the builder, which maps the names in older files (DenseNet's)
        net = fetched(lambda: models.get_model(self.model, weights=self.enum, progress=False), what, host, bring)
        return net.state_dict()
