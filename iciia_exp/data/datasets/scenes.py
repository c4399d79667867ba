"""Scenes: captions of coloured digits (`iciia_exp.data.scenes`); nothing to download."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp.data.dataset import SPLITS, ImageDataset
from iciia_exp.data.scenes import METRICS, WORDS, draw_caption
from iciia_exp.errors import ConfigError, check_int
from iciia_exp.seeding import generator
from iciia_exp.tasks import QUALITY

__all__ = ["Scenes"]

#: Captions of a router, at most, of about 52,000 that there are.
MOST = 20_000


class Scenes(ImageDataset):
    """Captions of scenes with one to three objects.

    No caption of val or test is in another split; those that train the models may repeat. Their parent category, and
    owner, is the number of objects.

    Args:
        sizes: number of captions for the training of the models, of the router, for the threshold, and for testing.
        seed: of the captions.
    """

    name = "scenes"
    task = QUALITY
    class_names = METRICS
    has_backbone_images = True

    def __init__(self, sizes: Mapping[str, int], seed: int = 0) -> None:
        self.seed = check_int("seed", seed, 0)
        if set(sizes) != set(SPLITS):
            raise ConfigError("sizes", dict(sizes), f"must give the number of captions for each of {', '.join(SPLITS)}")
        self.sizes = {s: check_int(f"sizes.{s}", sizes[s], 1) for s in SPLITS}
        if sum(self.sizes[split] for split in SPLITS[1:]) > MOST:
            raise ConfigError("sizes", self.sizes, f"train, val and test can have {MOST:,} captions together")

    @cached_property
    def _drawn(self) -> list[tuple[str, str, int]]:
        """Captions, their splits and numbers of objects."""
        rng = generator("scenes", self.seed)
        splits = np.repeat(np.array(SPLITS[1:], dtype=object), [self.sizes[split] for split in SPLITS[1:]])
        pool: dict[str, int] = {}
        while len(pool) < len(splits):
            objects = int(rng.integers(1, 4))
            pool.setdefault(draw_caption(rng, objects), objects)
        splits = rng.permutation(splits)  # of one draw, so that the router's captions are exchangeable
        drawn = [(caption, split, n) for (caption, n), split in zip(pool.items(), splits, strict=True)]
        held = {caption for caption, split, _ in drawn if split in ("val", "test")}
        while len(drawn) < len(splits) + self.sizes["backbone"]:
            objects = int(rng.integers(1, 4))
            if (caption := draw_caption(rng, objects)) not in held:
                drawn.append((caption, "backbone", objects))
        return drawn

    def load_table(self) -> pd.DataFrame:
        """Return the captions (``path``, their name), splits, and numbers of objects as owners and parents."""
        captions, splits, objects = zip(*self._drawn, strict=True)
        kinds = [f"{number} object{'s' * (number > 1)}" for number in objects]
        return pd.DataFrame({"label": 0, "split": splits, "owner": kinds, "parent": kinds, "path": captions})

    def __getitem__(self, index: int) -> str:
        """Return a caption."""
        return self.path(index)

    def fingerprint(self) -> list[Any]:
        """Return the metrics and the words; the settings decide the captions."""
        return [list(METRICS), list(WORDS)]
