"""Text-to-image pair as a backbone: prompts in, tokens and the quality of both models' pictures out.

Legend: B prompts of a batch, P pictures of a prompt, K metrics, n tokens, d width of a token, [H, W] pixels.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from iciia_exp.data.prompts import as_bytes, as_text
from iciia_exp.data.scenes import TRUTHS
from iciia_exp.errors import UserError, check_bool, check_int
from iciia_exp.models.backbones.base import Backbone, other_form
from iciia_exp.seeding import derive_seed

__all__ = ["SIDES", "Side", "TextToImage", "checked_pictures"]

Side = Literal["device", "cloud"]
SIDES: tuple[Side, ...] = ("device", "cloud")


class TextToImage(Backbone):
    """Two text-to-image models, the text encoder that a router reads, and what judges pictures.

    Its arrays: ``features`` [d] (the mean token), ``tokens`` [n, d] (0 where padded), ``quality`` [2, P, K] of the
    device's and the cloud's pictures, ``flaws`` [2, P] (1 for a picture of one colour), and ``pictures``
    [2, P, H, W, 3] if they are kept. The seed of a picture depends on the prompt and on its number alone.

    Args:
        num_classes: K.
        pictures: P.
        keep: whether pictures are stored.
        seed: of the pictures.
    """

    transform_settings: ClassVar[tuple[str, ...]] = ("pictures", "keep")
    gives = frozenset({"features", "images", "tokens", "quality", "flaws", "pictures"})
    #: Arrays that are stored as these types, and not as float16.
    dtypes: ClassVar[dict[str, str]] = {"quality": "float32", "flaws": "uint8", "pictures": "uint8", "truth": "float32"}

    def __init__(self, num_classes: int, pictures: int = 2, keep: bool = True, seed: int = 0) -> None:
        super().__init__()
        self.pictures, self.keep = check_int("pictures", pictures, 1), check_bool("keep", keep)
        self.seed = check_int("seed", seed, 0)
        self._metrics = num_classes

    def finish(self, dim: int) -> None:
        """Set D, and a classifier that is not used: a subclass calls it at the end of its constructor."""
        self.dim = dim
        self.head = nn.Linear(dim, self._metrics).requires_grad_(False)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return the tokens of prompts, [B, n, d], 0 where padded."""

    @abstractmethod
    def words(self, prompt: str) -> list[str]:
        """Return the texts of a prompt's tokens, without padding."""

    @abstractmethod
    def generate(self, side: Side, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """Return a picture of each prompt by one of the models, uint8 [B, H, W, 3] (`checked_pictures`)."""

    @abstractmethod
    def judge(self, pictures: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """Return the metrics of pictures uint8 [B, H, W, 3], from 0 to 1, [B, K]; the larger the better."""

    @abstractmethod
    def costs(self) -> tuple[int, int, int, int]:
        """Return MACs of the text encoder, of a picture of each model, and bytes of a picture."""

    @classmethod
    def stored_with(cls, config: Mapping[str, Any]) -> frozenset[str]:
        """Return the arrays that are stored, whatever method reads them: nothing is generated twice."""
        return frozenset(
            {"images", "tokens", "quality", "flaws"} | ({"pictures"} if config.get("keep", True) else set())
        )

    def transform(self, image: Any) -> Tensor:
        """Turn a prompt into its bytes, uint8 [LENGTH]."""
        if not isinstance(image, str):
            raise other_form(type(self).__name__, "prompts", image)
        if not image.strip():
            raise ValueError("the prompt is empty")
        return as_bytes(image)

    def features(self, images: Tensor) -> Tensor:
        """Return the mean token of prompts, [B, d]."""
        return self.mean_token(self.encode(as_text(images)))

    @staticmethod
    def mean_token(tokens_Bnd: Tensor) -> Tensor:
        """Return the mean over the real tokens."""
        count_B1 = (tokens_Bnd != 0).any(-1).sum(1, keepdim=True).clamp(min=1)
        return tokens_Bnd.sum(1) / count_B1

    def trunk_outputs(self, images: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
        """Return the arrays of prompts; pictures are generated only if they or their quality are wanted."""
        prompts = as_text(images)
        tokens = self.encode(prompts)
        found = {"features": self.mean_token(tokens), "tokens": tokens}
        if wanted & {"quality", "flaws", "pictures", "truth"}:
            found |= self.answers(prompts)
        return found

    @torch.no_grad()
    def output_shapes(self, example: Tensor, wanted: frozenset[str]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each array of one prompt; only that of pictures needs a picture."""
        if "pictures" in wanted or not wanted <= self.gives:
            return super().output_shapes(example, wanted)
        tokens, answers = self.encode(as_text(example[None])), (len(SIDES), self.pictures)
        shapes = {"images": example.shape, "features": (self.dim,), "tokens": tokens.shape[1:], "flaws": answers}
        shapes |= {"quality": (*answers, self._metrics), "truth": (*answers, len(TRUTHS))}
        return {name: tuple(shapes[name]) for name in sorted(wanted)}

    def answers(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Generate the pictures of both models and judge them."""
        quality, flaws, pictures = [], [], []
        for side in SIDES:
            for number in range(self.pictures):
                seeds = [derive_seed("picture", self.seed, number, prompt) % 2**62 for prompt in prompts]
                made = self.generate(side, prompts, seeds)
                quality.append(self.judge(made, prompts))
                flat = made.reshape(len(made), -1)
                flaws.append(torch.from_numpy(flat.min(1) == flat.max(1)))
                pictures.append(torch.from_numpy(made))
        shaped = {
            name: torch.stack(parts, 1).unflatten(1, (len(SIDES), self.pictures))
            for name, parts in (("quality", quality), ("flaws", flaws), ("pictures", pictures))
        }
        if not shaped["quality"].isfinite().all():
            bad = prompts[int((~shaped["quality"].flatten(1).isfinite()).any(1).int().argmax())]
            raise UserError(f"{bad!r}: the quality of its pictures is not finite; try another precision")
        return shaped

    def faster(self, example: Tensor) -> list[str]:
        """Leave the models as they are."""
        return []

    @cached_property
    def _costs(self) -> tuple[int, int, int, int]:
        return self.costs()

    def macs(self, example: Tensor) -> int:
        """Return the MACs of a picture of the device's model."""
        return self._costs[1]

    def further_costs(self, example: Tensor) -> dict[str, int]:
        """Return the other `costs`."""
        encoder, _, cloud, picture = self._costs
        return {"encoder_macs": encoder, "cloud_macs": cloud, "picture_bytes": picture}


def checked_pictures(pictures: np.ndarray, side: Side, prompts: Sequence[str]) -> np.ndarray:
    """Return float pictures from 0 to 1 as uint8; raises a `UserError` for one that is not finite."""
    if pictures.dtype != np.uint8:
        finite_B = np.isfinite(pictures).reshape(len(pictures), -1).all(1)
        if not finite_B.all():
            prompt = prompts[int(finite_B.argmin())]
            raise UserError(f"the {side}'s picture of {prompt!r} has pixels that are not finite; try float32")
        pictures = (255 * pictures.clip(0, 1)).round().astype(np.uint8)
    return pictures
