"""Diffusers pair: any two text-to-image pipelines of diffusers, and a CLIP that reads prompts and judges pictures.

Pictures are judged by `torchmetrics.functional.multimodal.clip_image_quality_assessment`: the softmax over 100 times
the cosines to a good and a bad text. Names are those of the hub, or folders. Nothing of them is run but the classes of
diffusers and transformers that they name.

Legend: B prompts, K metrics, n tokens, d width of a token.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iciia_exp.cost import counted
from iciia_exp.digest import digest, file_digest
from iciia_exp.errors import ConfigError, UserError, check_choice, check_float, check_int, first_line
from iciia_exp.models.backbones.text_to_image import SIDES, Side, TextToImage, checked_pictures

__all__ = ["DiffusersPair"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class DiffusersPair(TextToImage):
    """Two pipelines and a CLIP. They are loaded when they are first needed.

    Args:
        num_classes: K.
        device_model, cloud_model: names or folders of pipelines (``DiffusionPipeline.from_pretrained``).
        clip: name or folder of a CLIP, whose text side gives the tokens, and which judges the pictures.
        pairs: good and bad text of every metric, as the dataset says.
        alignment: whether the similarity of picture and prompt is the last metric, as the dataset says.
        device_steps, cloud_steps: ``num_inference_steps``; None: the pipeline's own.
        guidance: ``guidance_scale``; None: the pipeline's own.
        size: height and width of the pictures; None: the pipeline's own.
        precision: of the pipelines.
        answers: further arguments of `TextToImage`.
    """

    def __init__(
        self,
        num_classes: int,
        device_model: str = "stabilityai/stable-diffusion-2-1",
        cloud_model: str = "stabilityai/stable-diffusion-3-medium-diffusers",
        clip: str = "openai/clip-vit-base-patch16",
        pairs: Mapping[str, Sequence[str]] | None = None,
        alignment: bool = False,
        device_steps: int | None = None,
        cloud_steps: int | None = None,
        guidance: float | None = None,
        size: int | None = None,
        precision: str = "float32",
        **answers: Any,
    ) -> None:
        super().__init__(num_classes, **answers)
        if pairs is None:
            raise ConfigError("", "diffusers_pair", "answers prompts; choose dataset=prompts")
        self.names = {"device": device_model, "cloud": cloud_model}
        self.clip_name, self.pairs, self.alignment = clip, {k: (v[0], v[1]) for k, v in pairs.items()}, alignment
        steps = {"device": device_steps, "cloud": cloud_steps}
        self.options: dict[str, dict[str, Any]] = {"device": {}, "cloud": {}}
        for side, count in steps.items():
            if count is not None:
                self.options[side]["num_inference_steps"] = check_int(f"{side}_steps", count, 1)
            if guidance is not None:
                self.options[side]["guidance_scale"] = check_float("guidance", guidance, 0.0)
            if size is not None:
                self.options[side] |= dict.fromkeys(("height", "width"), check_int("size", size, 8))
        self.precision = check_choice("precision", precision, tuple(_DTYPES))
        self.finish(self._of_clip("AutoConfig").text_config.hidden_size)

    @classmethod
    def content(cls, config: Mapping[str, Any]) -> Any:
        """Return digests of the files of models that are folders."""
        names = (config.get(key) for key in ("device_model", "cloud_model", "clip"))
        found = {str(name): _folder_digest(Path(str(name))) for name in names if name and Path(str(name)).is_dir()}
        return found or None

    # ---- CLIP

    def _of_clip(self, kind: str) -> Any:
        """Load a part of the CLIP by one of the Auto classes of transformers."""
        try:
            import transformers
        except ImportError as error:
            raise UserError("transformers is not installed; pip install 'iciia_exp[route]'") from error
        try:
            return getattr(transformers, kind).from_pretrained(self.clip_name)
        except (OSError, ValueError) as error:
            raise ConfigError("clip", self.clip_name, f"cannot be loaded ({first_line(error)})") from error

    @cached_property
    def _clip(self) -> tuple[Any, Any]:
        """The CLIP and its processor, as torchmetrics calls them: with features as tensors (transformers 5)."""
        model, processor = self._of_clip("AutoModel").eval().requires_grad_(False), self._of_clip("AutoProcessor")
        for name in ("get_image_features", "get_text_features"):
            setattr(model, name, _tensors_of(getattr(model, name)))
        return model, processor

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return the last hidden states of the text side, 0 where padded, [B, n, d]."""
        model, processor = self._clip
        longest = model.config.text_config.max_position_embeddings
        ids = processor.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.head.weight.device)
        found = model.to(self.head.weight.device).text_model(ids["input_ids"], attention_mask=ids["attention_mask"])
        return found.last_hidden_state.float() * ids["attention_mask"].unsqueeze(-1)

    def words(self, prompt: str) -> list[str]:
        """Return the tokens of CLIP's tokenizer."""
        tokenizer, longest = self._clip[1].tokenizer, self._clip[0].config.text_config.max_position_embeddings
        return tokenizer.convert_ids_to_tokens(tokenizer(prompt, truncation=True, max_length=longest)["input_ids"])

    def judge(self, pictures: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """Return the metrics, and the similarity of picture and prompt if it is one, [B, K]."""
        from torchmetrics.functional.multimodal import clip_image_quality_assessment

        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().to(self.head.weight.device)
        found: Any = clip_image_quality_assessment(x, lambda: self._clip, 255.0, tuple(self.pairs.values()))  # type: ignore[arg-type]
        columns = [found] if isinstance(found, Tensor) else list(found.values())
        if self.alignment:
            columns.append(self._alignment(x, prompts))
        return torch.stack([column.reshape(len(pictures)).float().cpu() for column in columns], 1)

    def _alignment(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the CLIP score of pictures and prompts, from 0 to 1."""
        model, processor = self._clip
        longest = model.config.text_config.max_position_embeddings
        images = processor.image_processor(images=list(x.byte().cpu()), return_tensors="pt")["pixel_values"]
        ids = processor.tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        pictures = model.get_image_features(images.to(x.device))
        texts = model.get_text_features(ids["input_ids"].to(x.device), ids["attention_mask"].to(x.device))
        return nn.functional.cosine_similarity(pictures, texts).clamp(min=0)

    # ---- pipelines

    def _pipeline(self, side: Side) -> Any:
        """Return a pipeline, loaded on first use."""
        return self._pipelines[side]

    @cached_property
    def _pipelines(self) -> dict[str, Any]:
        try:
            from diffusers import DiffusionPipeline
        except ImportError as error:
            raise UserError("diffusers is not installed; pip install 'iciia_exp[route]'") from error
        found = {}
        for side, name in self.names.items():
            try:
                pipeline = DiffusionPipeline.from_pretrained(name, dtype=_DTYPES[self.precision])
            except (OSError, ValueError) as error:
                raise ConfigError(f"{side}_model", name, f"cannot be loaded ({first_line(error)})") from error
            pipeline.set_progress_bar_config(disable=True)
            found[side] = pipeline.to(self.head.weight.device)
        return found

    def generate(self, side: Side, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """Return pictures uint8 [B, H, W, 3]."""
        rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        made = self._pipeline(side)(list(prompts), generator=rngs, output_type="np", **self.options[side]).images
        return checked_pictures(np.asarray(made), side, prompts)

    def costs(self) -> tuple[int, int, int, int]:
        """Return MACs of the text side and of a picture of each pipeline, counted while it is drawn, and its bytes."""
        with torch.no_grad():
            encoder = counted(partial(self.encode, ["a"]))[0]
            device, cloud = (counted(partial(self.generate, side, ["a"], [0])) for side in SIDES)
        return encoder, device[0], cloud[0], int(cloud[1].nbytes)

    def pretrained_state(self) -> dict[str, Tensor]:
        """Return the unused classifier: the pipelines have their own weights."""
        return {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}


def _tensors_of(method: Any) -> Any:
    """Return a method of a CLIP that gives a tensor, as before transformers 5."""

    def call(*given: Any, **more: Any) -> Any:
        found = method(*given, **more)
        return found if isinstance(found, Tensor) else found.pooler_output

    return call


def _folder_digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest([[str(path.relative_to(folder)), file_digest(path)] for path in files])
