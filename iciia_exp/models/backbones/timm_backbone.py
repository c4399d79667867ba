"""timm: its models as backbones, https://github.com/huggingface/pytorch-image-models."""

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlparse

import huggingface_hub
import timm
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from iciia_exp.errors import ConfigError, check_choice, check_float, check_int, first_line, nearest
from iciia_exp.models.backbones.base import ImageBackbone
from iciia_exp.models.backbones.weights import fetched
from iciia_exp.models.gather import CHANNELS, TOKEN_ARRAYS, Gather, stages, token_arrays

__all__ = ["TimmBackbone"]


class TimmBackbone(ImageBackbone):
    """A timm model; the feature is the input of its linear classifier, the crop that of its evaluation transform.

    Vision transformers also give ``tokens`` [B, n, d]: by default the sum of the input of the first block and the
    outputs of all blocks, before the final norm. The first tokens are the class and register tokens, if the model has
    any, followed by the patches in row-major order. They give ``levels`` and ``block_input`` as well
    (`iciia_exp.models.gather.token_arrays`). Of convolutional networks with stages, a level is the output of a stage;
    they give ``tokens`` and ``levels``.

    Args:
        num_classes: K.
        model: timm's name, with the tag of the weights (``tf_efficientnet_b4.aa_in1k``), or as timm takes it a
            repository of the Hugging Face hub (``hf_hub:user/name``) or a folder (``local-dir:/path``).
        image_size: pixels of the square input; null is that of the weights.
        crop_pct: share of the image's shorter side that the crop keeps; null is that of the weights.
        mean, std: of the three channels, 0 to 1; null are those of the weights.
        options: further arguments of `timm.create_model` (``{pad_type: same}``).
        gather_first, gather_last, gather_grid: levels of the tokens, and side of their grid (`Gather`).
        gather_channels: how the stages of a convolutional network come to one width, ``pad`` or ``project``; null:
            ``pad``.
    """

    def __init__(
        self,
        num_classes: int,
        model: str,
        image_size: int | None = None,
        crop_pct: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        options: Mapping[str, Any] | None = None,
        gather_first: int = 0,
        gather_last: int | None = None,
        gather_grid: int | None = None,
        gather_channels: str | None = None,
    ) -> None:
        self.channels = "pad" if gather_channels is None else check_choice("gather_channels", gather_channels, CHANNELS)
        self.model, self.options = model, dict(options or {})
        self._size = None if image_size is None else check_int("image_size", image_size, 8, 4096)
        if crop_pct is not None:
            check_float("crop_pct", crop_pct, 0.0, 1.0, open_low=True)
        for key, values in (("mean", mean), ("std", std)):
            if values is not None and (len(values) != 3 or (key == "std" and min(values) <= 0)):
                raise ConfigError(key, values, f"must be three numbers{' above 0' if key == 'std' else ''}")
        net = self._create(num_classes)
        if not hasattr(net, "get_classifier"):
            raise ConfigError("options", self.options, "do not fit here (the network has no classifier)")
        head = net.get_classifier()
        if not isinstance(head, nn.Linear):
            kind = type(head).__name__
            raise ConfigError("model", model, f"its classifier is a {kind}, not one linear layer on one feature")
        name = next(name for name, module in net.named_modules() if module is head)
        trunk = {key for key in net.state_dict() if not key.startswith(f"{name}.")}
        net.reset_classifier(0)
        if trunk != set(net.state_dict()):
            raise ConfigError("model", model, "its classifier is more than one linear layer on one feature")
        size = self._size and (3, self._size, self._size)
        given = {"input_size": size, "crop_pct": crop_pct, "mean": mean, "std": std}
        config = resolve_data_config({k: v for k, v in given.items() if v is not None}, model=net)
        super().__init__(net, head, config["mean"], config["std"])
        self.head_name, self.data_config = name, config
        self.check_options(self.options, config["input_size"][-1])
        # only vision transformers without stages, whose blocks all have the same tokens, can return prefix tokens
        intermediates = getattr(net, "forward_intermediates", None)
        if intermediates and "return_prefix_tokens" in inspect.signature(intermediates).parameters:
            self.gives |= TOKEN_ARRAYS
            patches = int(net.patch_embed.num_patches)
            self.gather = Gather(gather_first, gather_last, gather_grid, len(net.blocks), patches)
        elif parts := stages(net):
            self.gives |= TOKEN_ARRAYS - {"block_input"}
            side = -(-config["input_size"][-1] // net.feature_info[-1]["reduction"])
            self.gather = Gather(gather_first, gather_last, gather_grid, len(parts) - 1, side**2, "stages")
        # timm's transform for its prefetcher ends before normalisation, which is done in batches
        self._crop = create_transform(**config, is_training=False, use_prefetcher=True).transforms[:-1]

    def _create(self, num_classes: int, pretrained: bool = False) -> Any:
        options = dict(self.options)
        if self._size is not None:
            cfg = timm.get_pretrained_cfg(self.model)
            if cfg is not None and cfg.fixed_input_size:  # Swin and ViT take other sizes only through an argument
                options.setdefault("img_size", self._size)
        try:
            return timm.create_model(self.model, pretrained=pretrained, num_classes=num_classes, **options)
        except RuntimeError as error:
            name = self.model.partition(".")[0]
            if "Unknown model" in str(error):
                what, near = "timm has no such model", nearest(name, timm.list_models())
            elif "Invalid pretrained tag" in str(error):
                what, near = "timm has no weights of that tag", nearest(self.model, timm.list_pretrained(f"{name}.*"))
            else:
                raise ConfigError("options", self.options, f"do not fit here ({first_line(error)})") from error
            raise ConfigError("model", self.model, f"{what}{f'; did you mean {near}?' if near else ''}") from error
        except Exception as error:
            if ":" in self.model:
                raise ConfigError("model", self.model, f"cannot be loaded ({first_line(error)})") from error
            raise ConfigError("options", self.options, f"do not fit here ({first_line(error)})") from error

    def crop(self, image: Any) -> Any:
        """Resize and crop as timm does for evaluation."""
        for step in self._crop:
            image = step(image)
        return image

    def trunk_outputs(self, images: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
        """Return ``features`` [B, D] and, if wanted, arrays of tokens (`token_arrays`)."""
        if not wanted & TOKEN_ARRAYS:
            return super().trunk_outputs(images, wanted)
        return token_arrays(self.net, self.normalise(images), self.gather, wanted, self.channels)

    def describe_transform(self) -> dict[str, Any]:
        """Return timm's data configuration."""
        config = self.data_config | {"mean": self.mean, "std": self.std}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}

    def load_original(self, state: Mapping[str, Tensor]) -> None:
        """Load weights; those of another input size, or in their author's form, as timm converts them.

        Raises a `RuntimeError` if they do not fit.
        """
        try:
            super().load_original(state)
        except RuntimeError as error:
            convert = getattr(sys.modules[type(self.net).__module__], "checkpoint_filter_fn", None)
            if convert is None:
                raise
            try:
                super().load_original(convert({key: value.float() for key, value in state.items()}, self.net))
            except Exception:  # it expects weights of this network
                raise error from None

    def pretrained_state(self) -> dict[str, Tensor]:
        """Return timm's weights, from its cache, the Hugging Face hub or a folder."""
        cfg: Mapping[str, Any] = self.net.pretrained_cfg  # type: ignore[assignment]
        if self.model.startswith("local-dir:"):
            return self._create(cfg["num_classes"], pretrained=True).state_dict()
        if not (repository := cfg.get("hf_hub_id")):
            problem = "timm has no weights for it; choose a tag from timm.list_pretrained()"
            raise ConfigError("model", self.model, problem)
        host = urlparse(huggingface_hub.constants.ENDPOINT).hostname or ""
        file = cfg.get("hf_hub_filename") or "model.safetensors"
        if huggingface_hub.try_to_load_from_cache(repository, file):
            host = "localhost"
        page = f"{huggingface_hub.constants.ENDPOINT}/{repository}/resolve/main/{file}"
        bring = f"get {page} elsewhere and set backbone.weights=FILE"
        net = fetched(lambda: self._create(cfg["num_classes"], pretrained=True), f"timm's {self.model}", host, bring)
        return net.state_dict()
