"""Backbone interface: a trunk that gives features, and a linear classifier on them.

Legend: B images of a batch, D features, K classes.
"""

import inspect
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from iciia_exp.cost import count_macs
from iciia_exp.data.readers.images import as_picture
from iciia_exp.errors import ConfigError, UserError, check_choice, check_float, check_int, first_line, within
from iciia_exp.recipe import Recipe

__all__ = ["Backbone", "BackboneSpec", "ImageBackbone"]


class Backbone(nn.Module, ABC):
    """A network whose logits are ``head(features(images))``.

    A subclass sets ``dim`` (D), ``head`` (with fresh weights) and ``transform_settings``.
    """

    dim: int
    head: nn.Linear
    #: Attributes that decide the result of `transform`.
    transform_settings: ClassVar[tuple[str, ...]]
    #: Name of the classifier in weight files of the original network.
    head_name: str = "head"
    #: Prefix of the trunk's weights here, which weight files of the original network do not have.
    trunk_prefix: ClassVar[str] = ""
    #: Names of the arrays that `outputs` can return.
    gives: frozenset[str] = frozenset({"features", "logits", "images"})
    #: Types in which arrays are stored, by name; others as `iciia_exp.engine.training.extract.extract` says.
    dtypes: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def stored_with(cls, config: Mapping[str, Any]) -> frozenset[str]:
        """Return the names of the arrays that are stored with the features, whatever a method reads; by default none.

        ``config`` are the arguments of the constructor.
        """
        return frozenset()

    @classmethod
    def content(cls, config: Mapping[str, Any]) -> Any:
        """Return plain values for digests, which change with the files that arguments name; None without any."""
        return None

    def training_loss(self, images: Tensor) -> Tensor | None:
        """Return the loss of a batch where the network has one of its own; None: that of its logits and the labels."""
        return None

    @property
    def num_classes(self) -> int:
        """K, outputs of the classifier."""
        return self.head.out_features

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Return the classifier's input, [B, D], from a batch of transformed images."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, K]."""
        return self.head(self.features(images))

    def trunk_outputs(self, images: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
        """Return ``features`` [B, D] and, if ``wanted``, further arrays [B, ...] of the same pass (by default none).

        A subclass that gives more overrides it, and adds the names to `gives`.
        """
        return {"features": self.features(images)}

    def outputs(self, images: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
        """Return the arrays ``wanted`` by name, from one pass over a batch of transformed images.

        Every network gives ``features`` [B, D], ``logits`` [B, K], and the transformed ``images``. Raises a `UserError`
        for a name not in `gives`.
        """
        if missing := sorted(wanted - self.gives):
            *some, last = sorted(self.gives)
            given = f"{', '.join(some)} and {last}"
            raise UserError(f"{type(self).__name__} gives {given}, not {' and '.join(missing)}")
        arrays = {"images": images, **self.trunk_outputs(images, wanted)}
        if "logits" in wanted:
            with torch.autocast(images.device.type, enabled=False):  # equal to the classifier of the stored features
                arrays["logits"] = self.head(arrays["features"].to(self.head.weight.dtype))
        return {name: arrays[name] for name in sorted(wanted)}

    @torch.no_grad()
    def output_shapes(self, example: Tensor, wanted: frozenset[str]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each array of one image, from one pass in evaluation mode; errors as in `outputs`.

        ``example`` is a transformed image, without a batch axis.
        """
        return {name: tuple(values.shape[1:]) for name, values in self.outputs(example[None], wanted).items()}

    @abstractmethod
    def transform(self, image: Any) -> Tensor:
        """Turn one image of the dataset into the network's input, without a batch axis."""

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Return the network's input from pictures of its size, floats from 0 to 1, [B, channels, H, W]."""
        raise UserError(f"{type(self).__name__}: takes no pictures")

    def describe_transform(self) -> dict[str, Any]:
        """Return the settings of `transform` as plain values, for the feature manifest."""
        values = {name: getattr(self, name) for name in self.transform_settings}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def macs(self, example: Tensor) -> int | None:
        """Return the MACs of one image, classifier included; None if they are unknown."""
        return count_macs(self, example[None])

    def further_costs(self, example: Tensor) -> dict[str, int]:
        """Return other costs of an image, as `iciia_exp.ledger.Sizes` names them, or ``<array>_macs``; none here.

        The latter are the MACs of an array that devices can make without the backbone.
        """
        return {}

    def faster(self, example: Tensor) -> list[str]:
        """Prepare the trunk for inference only, in place; return the steps taken (by default none)."""
        return []

    def pretrained_state(self) -> dict[str, Tensor]:
        """Return the library's weights with the names of the original network, or raise a `ConfigError`."""
        raise ConfigError("pretrained", True, f"{type(self).__name__} has no pre-trained weights; give weights=FILE")

    def load_original(self, state: Mapping[str, Tensor]) -> None:
        """Load weights with the names of the original network; raises a `RuntimeError` if they do not fit."""
        current = self.state_dict()
        renamed: OrderedDict[str, Tensor] = OrderedDict()
        renamed._metadata = current._metadata  # type: ignore[attr-defined]  # some layers refuse to load without it
        for key, value in state.items():
            name = key.removeprefix(f"{self.head_name}.")
            if not key.endswith("num_batches_tracked"):
                renamed[f"{self.trunk_prefix}{key}" if name == key else f"head.{name}"] = value.float()
        if wrong := [k for k, v in renamed.items() if k in current and v.shape != current[k].shape]:
            sizes = " not ".join(str(list(tensors[wrong[0]].shape)) for tensors in (renamed, current))
            raise RuntimeError(f"has other sizes, first {wrong[0]} {sizes} ({len(wrong)} keys)")
        loaded = self.load_state_dict(renamed, strict=False)
        missing = [k for k in loaded.missing_keys if not k.endswith("num_batches_tracked")]
        if missing == ["head.bias"]:  # a classifier without a bias
            nn.init.zeros_(self.head.bias)
            missing = []
        for kind, keys in (("has no", missing), ("has unknown", loaded.unexpected_keys)):
            if keys:
                raise RuntimeError(f"{kind} {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''} ({len(keys)} keys)")

    def keep_classes(self, rows: Sequence[int]) -> None:
        """Keep only the ``rows`` of the classifier, in that order."""
        self.head = _linear(self.head.weight[list(rows)], self.head.bias[list(rows)])

    def fresh_head(self, num_classes: int) -> None:
        """Replace the classifier by one with fresh weights."""
        self.head = nn.Linear(self.dim, num_classes)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    head = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return head


class ImageBackbone(Backbone):
    """A network for photographs: PIL images become uint8 tensors, normalised in batches on the network's device.

    A subclass builds ``net`` ([B, 3, H, W] to [B, D]) and crops images in `crop`.
    """

    net: nn.Module
    trunk_prefix = "net."

    def __init__(self, net: nn.Module, head: nn.Linear, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net, self.head, self.dim = net, _linear(head.weight, head.bias), head.in_features
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))

    @abstractmethod
    def crop(self, image: Any) -> Any:
        """Resize and crop one PIL image to the network's input size."""

    def transform(self, image: Any) -> Tensor:
        """Turn an image (`iciia_exp.data.readers.images.as_picture`) into uint8 [3, H, W]."""
        return torch.from_numpy(np.array(self.crop(as_picture(image).convert("RGB")))).permute(2, 0, 1)

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Return floats from 0 to 255."""
        return 255 * pixels

    def normalise(self, images: Tensor) -> Tensor:
        """Return (images / 255 - mean) / std as float32."""
        scale = torch.tensor([1 / (255 * s) for s in self.std], device=images.device)
        shift = torch.tensor([m / s for m, s in zip(self.mean, self.std, strict=True)], device=images.device)
        if images.ndim != 4 or images.is_floating_point():  # stored images must not change
            shape = (-1, *(1,) * (images.ndim - 2))
            return (images * scale.view(shape)).sub_(shift.view(shape))
        images = images.to(torch.float32, memory_format=torch.channels_last)
        # in rows of 3 W numbers: in pixels of 3 it takes four times as long on a CPU
        width = images.shape[3]
        images.permute(0, 2, 3, 1).flatten(2).mul_(scale.repeat(width)).sub_(shift.repeat(width))
        return images

    def check_options(self, options: Mapping[str, Any], size: int) -> None:
        """Raise a `ConfigError` if a network built with ``options`` does not turn a picture into one vector."""
        if not options:
            return
        try:
            with torch.no_grad():
                shape = tuple(self.eval().features(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape)
        except Exception as error:
            raise ConfigError("options", dict(options), f"do not fit here ({first_line(error)})") from error
        self.train()
        if shape != (1, self.dim):
            problem = f"do not fit here (a picture becomes {list(shape[1:])}, and not [{self.dim}])"
            raise ConfigError("options", dict(options), problem)

    def features(self, images: Tensor) -> Tensor:
        """Return the classifier's input, [B, D], from uint8 images."""
        return self.net(self.normalise(images))

    def faster(self, example: Tensor) -> list[str]:
        """Fold batch norm and choose the memory format, where features stay the same (`inference.faster`)."""
        from iciia_exp.models.backbones.inference import faster

        return faster(self.net, self.normalise(example[None]))


def other_form(network: str, takes: str, image: Any) -> UserError:
    """Return the error of a network that does not take a dataset's images."""
    got = f"{type(image).__name__} {list(np.shape(image))}"
    return UserError(f"backbone: {network} takes {takes}, the images are {got}; choose a backbone for such images")


class BackboneSpec:
    """A backbone by configuration: the network, the source of its weights, and the part that is trained here.

    Args:
        name: short name for folders and tables.
        model: builds the network from ``num_classes``; in a configuration, a ``_partial_`` target.
        train: ``all``: trunk and classifier; ``head``: a regularised linear classifier on the frozen trunk's features;
            ``none``: nothing. Training uses the dataset's images for the backbone, or, if it has none, the train
            images of the clients; never val or test images.
        pretrained: start from the library's weights.
        weights: start from this file instead: .safetensors, or .pt or .pth of tensors, with the names of the original
            network.
        classes: class names of the starting weights, in their order: ``imagenet-1k`` (wnids), a text file with one
            name per line, or null if they are the dataset's. With ``train: none``, a dataset with some of the classes
            keeps their rows of the classifier.
        recipe: of the training here (``train: all``).
        reserve: share of the dataset's train images for the backbone only, by owner if the dataset has owners; with 0
            it learns from the clients' train images, as the published backbones did.
        unseen_classes: classes whose train images the backbone does not see: they are the clients', and all others the
            backbone's. Names, numbers, or a slice of numbers such as ``3::4``.
        dim: D, checked when the network is built; null takes the network's.
        published_top1: top-1 accuracy on the dataset's test images that the weights' authors report, in percent;
            shown beside the measured one.
        seed: of the training here.
    """

    cosmetic: ClassVar[frozenset[str]] = frozenset({"weights", "published_top1", "dim"})

    def __init__(
        self,
        name: str,
        model: Callable[..., Backbone],
        train: str = "none",
        pretrained: bool = False,
        weights: str | None = None,
        classes: str | Sequence[str] | None = None,
        recipe: Recipe | None = None,
        reserve: float = 0.0,
        unseen_classes: str | Sequence[int | str] | None = None,
        dim: int | None = None,
        published_top1: float | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(name, str) or not re.search(r"\w", name) or not name.isprintable() or len(name) > 100:
            raise ConfigError("name", name, "must be a text with a letter or digit, of at most 100 characters")
        if not callable(model):
            raise ConfigError("model", model, "must be a node with a _target_, as in conf/backbone/small_cnn.yaml")
        self.name, self.model, self.recipe = name, model, recipe
        self.train = check_choice("train", train, ("all", "head", "none"))
        self.pretrained = pretrained and weights is None
        self.weights, self.classes = weights, classes
        self.reserve = check_float("reserve", reserve, 0.0, 0.95)
        self.unseen_classes = unseen_classes
        if unseen_classes is not None and reserve:
            raise ConfigError("reserve", reserve, "the backbone has all images but those of unseen_classes; use 0")
        self.dim = None if dim is None else check_int("dim", dim, 1)
        self.published_top1 = (
            None if published_top1 is None else check_float("published_top1", published_top1, 0.0, 100.0)
        )
        self.seed = check_int("seed", seed, 0)
        if train == "none" and not (pretrained or weights):
            problem = "nothing gives the network its weights; set pretrained=true or weights=FILE, or train it"
            raise ConfigError("train", train, problem)
        if train == "none" and reserve:
            raise ConfigError("reserve", reserve, "nothing is trained here that could learn from those images; use 0")
        if recipe is not None and not isinstance(recipe, Recipe):
            raise ConfigError("recipe", recipe, "must be a node with a _target_, as in conf/backbone/small_cnn.yaml")
        if train == "all" and recipe is None:
            raise ConfigError("recipe", "null", "train=all needs a recipe")

    @property
    def started(self) -> bool:
        """Whether the network starts from existing weights."""
        return self.pretrained or self.weights is not None

    def fresh(self, num_classes: int, **arguments: Any) -> Backbone:
        """Build the network with fresh weights; raises a `ConfigError` if D is not that of the configuration."""
        try:
            inspect.signature(self.model).bind(num_classes=num_classes, **arguments)
        except TypeError as error:
            raise ConfigError("model", self.name, f"its keys do not fit ({first_line(error)})") from error
        backbone = within("model", lambda: self.model(num_classes=num_classes, **arguments))
        if self.dim is not None and self.dim != backbone.dim:
            raise ConfigError("dim", self.dim, f"the network has D={backbone.dim}")
        return backbone

    def initial(self, class_names: Sequence[str], **arguments: Any) -> Backbone:
        """Build the network with its starting weights, and a classifier for ``class_names``.

        With ``train: none`` the classifier is that of the weights, or its rows of the dataset's classes; else it is
        fresh, unless the weights have exactly the dataset's number of classes. Weights need no classifier if it is
        trained here. Raises a `UserError` for weights that do not fit.
        """
        from iciia_exp.models.backbones.weights import class_rows, read_weights

        backbone = self.fresh(len(class_names), **arguments)
        if not self.started:
            return backbone
        state = backbone.pretrained_state() if self.weights is None else read_weights(self.weights)
        key = f"{backbone.head_name}.weight"
        source = self.weights or f"the pre-trained weights of {self.name}"
        if key not in state:
            if self.train == "none":
                hint = "use backbone.train=head to fit one on the dataset"
                raise UserError(f"{source}: has no classifier {key} of backbone {self.name}; {hint}")
            # weights without a classifier, of DINOv2 say
            state |= {f"{backbone.head_name}.{name}": value for name, value in backbone.head.state_dict().items()}
        if (num_classes := state[key].shape[0]) != len(class_names):
            backbone.fresh_head(num_classes)
        try:
            backbone.load_original(state)
        except RuntimeError as error:
            raise UserError(f"{source}: does not fit backbone {self.name}: {error}") from error
        rows = class_rows(self.classes, backbone.num_classes, class_names, needed=self.train == "none")
        if rows is not None:
            backbone.keep_classes(rows)
        elif backbone.num_classes != len(class_names):
            backbone.fresh_head(len(class_names))
        return backbone
