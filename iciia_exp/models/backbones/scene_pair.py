"""Scene pair: a small and a large diffusion model of scenes, and what judges their pictures; all are trained here.

The device's model is narrow and reads a caption as a bag of words, so it cannot know which colour belongs to which
digit, or what is left of what. The cloud's is wider and reads the words in order. A contrastive image-text model judges
pictures by pairs of texts: whether one is rather that of its caption than of a caption with other colours, places,
sizes or digits, and whether it is clean. Its text side gives the router's tokens. What is right in a picture is
measured too (`iciia_exp.data.scenes.truths`), and stored beside.

Legend: B captions, P pictures, K metrics.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iciia_exp.cost import count_macs, counted
from iciia_exp.data.prompts import as_text
from iciia_exp.data.scenes import METRICS, PIXELS, TRUTHS, altered, draw_caption, render, truths
from iciia_exp.errors import ConfigError, check_float, check_int
from iciia_exp.models.backbones.text_to_image import SIDES, Side, TextToImage, checked_pictures
from iciia_exp.models.scenes import MAX_TOKENS, SceneDiffusion, SceneScorer, make_scheduler, tokenize

__all__ = ["ScenePair"]

#: Captions of each kind that a picture is told apart from in a step.
_WRONG = 2


class ScenePair(TextToImage):
    """Two diffusion models and a scorer of `iciia_exp.models.scenes`.

    Args:
        num_classes: K, the metrics of ``dataset=scenes``.
        device_channels, cloud_channels: of the UNets.
        device_ordered, cloud_ordered: whether a model reads the words in order.
        device_steps, cloud_steps: of DDIM.
        guidance: weight of the caption (classifier-free guidance); 1 is none.
        answers: further arguments of `TextToImage`.
    """

    gives = TextToImage.gives | {"truth"}

    def __init__(
        self,
        num_classes: int,
        device_channels: Sequence[int] = (24, 32, 48),
        cloud_channels: Sequence[int] = (32, 64, 96),
        device_ordered: bool = False,
        cloud_ordered: bool = True,
        device_steps: int = 10,
        cloud_steps: int = 10,
        guidance: float = 2.0,
        **answers: Any,
    ) -> None:
        super().__init__(num_classes, **answers)
        if num_classes != len(METRICS):
            raise ConfigError("", "scene_pair", "knows the metrics of dataset=scenes; choose it")
        self.steps = {
            "device": check_int("device_steps", device_steps, 1),
            "cloud": check_int("cloud_steps", cloud_steps, 1),
        }
        self.guidance = check_float("guidance", guidance, 0.0)
        self.device_model = SceneDiffusion(device_channels, ordered=device_ordered)
        self.cloud_model = SceneDiffusion(cloud_channels, ordered=cloud_ordered)
        self.scorer = SceneScorer()
        self.scheduler = make_scheduler()
        self.finish(self.scorer.text.words.embedding_dim)

    @classmethod
    def stored_with(cls, config: Mapping[str, Any]) -> frozenset[str]:
        """Return those of every pair, and what is right in the pictures."""
        return super().stored_with(config) | {"truth"}

    def model_of(self, side: Side) -> SceneDiffusion:
        """Return one of the models."""
        return self.device_model if side == "device" else self.cloud_model

    def training_loss(self, images: Tensor) -> Tensor:
        """Return the sum of the losses of both models and the scorer; pictures of the captions are rendered anew.

        The scorer learns from scenes of its own, twice as many: a step of it costs a tenth of a step of the models.
        """
        captions = as_text(images)
        rng = np.random.default_rng(int(torch.randint(2**31, (1,))))  # PyTorch's seed is that of the step
        x, ids = self._rendered(captions, rng)
        diffusion = sum(self.model_of(side).loss(x, ids, self.scheduler) for side in SIDES)
        own = [draw_caption(rng, int(rng.integers(1, 4))) for _ in range(2 * len(captions))]
        wrong = [tokenize([_drawn(altered(c, kind), rng) for c in own]) for kind in TRUTHS for _ in range(_WRONG)]
        return diffusion + self.scorer.loss(*self._rendered(own, rng), torch.stack(wrong).to(images.device))

    def _rendered(self, captions: Sequence[str], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return new pictures of captions, and the numbers of their words."""
        x = self._scaled(np.stack([render(caption, rng) for caption in captions]))
        return x, tokenize(captions).to(x.device)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return the tokens of the scorer's text side, [B, MAX_TOKENS, d]."""
        return self.scorer.text(tokenize(prompts).to(self.head.weight.device))[0]

    def words(self, prompt: str) -> list[str]:
        """Return the words."""
        return prompt.lower().split()[:MAX_TOKENS]

    def generate(self, side: Side, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """Return pictures uint8 [B, PIXELS, PIXELS, 3]."""
        model = self.model_of(side)
        ids = tokenize(prompts).to(self.head.weight.device)
        x = model.sample(ids, seeds, self.steps[side], self.guidance)
        return checked_pictures((x.permute(0, 2, 3, 1).cpu().numpy() + 1) / 2, side, prompts)

    def judge(self, pictures: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """Return the metrics of the scorer, [B, K]."""
        return self.scorer.quality(self._scaled(pictures), prompts)

    def _scaled(self, pictures: np.ndarray) -> Tensor:
        """Return pictures uint8 [B, PIXELS, PIXELS, 3] from -1 to 1, [B, 3, PIXELS, PIXELS]."""
        return torch.from_numpy(pictures).to(self.head.weight.device).permute(0, 3, 1, 2).float() / 127.5 - 1

    def answers(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return pictures, quality, and what is right in the pictures: ``truth`` [B, 2, P, 4]."""
        found = super().answers(prompts)
        right = [
            [truths(p, made) for made in pictures.flatten(0, 1).numpy()]
            for p, pictures in zip(prompts, found["pictures"], strict=True)
        ]
        truth = torch.from_numpy(np.array(right)).unflatten(1, (len(SIDES), self.pictures))
        return found | {"truth": truth}

    def costs(self) -> tuple[int, int, int, int]:
        """Return the MACs of the scorer's text side and of both models, and the bytes of a picture."""
        ids = torch.ones(1, MAX_TOKENS, dtype=torch.int64, device=self.head.weight.device)
        noise, step = torch.zeros(1, 3, PIXELS, PIXELS, device=ids.device), torch.zeros_like(ids[0, :1])
        passes = 1 if self.guidance == 1 else 2

        def macs(side: Side) -> int:
            model = self.model_of(side)
            once = counted(lambda: model.velocity(noise, step, model.encode(ids)))[0]
            return passes * self.steps[side] * once

        with torch.no_grad():
            return count_macs(self.scorer.text, ids), macs("device"), macs("cloud"), 3 * PIXELS**2


def _drawn(groups: Sequence[Sequence[str]], rng: np.random.Generator) -> str:
    """Return one of the wrong captions of a random object."""
    group = groups[int(rng.integers(len(groups)))]
    return group[int(rng.integers(len(group)))]
