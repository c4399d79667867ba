"""Digits: scikit-learn's handwritten digits with added noise.

1,797 scans of 8x8 pixels (UCI "Optical Recognition of Handwritten Digits", test part), part of scikit-learn: no
download. Gaussian noise, drawn once per image from a fixed seed, makes a single image ambiguous, so that the other
images of a client help.
"""

from collections.abc import Mapping
from functools import cache, cached_property

import numpy as np
import pandas as pd

from iciia_exp.data.content import row_digests
from iciia_exp.data.dataset import SPLITS, ImageDataset
from iciia_exp.errors import ConfigError, check_float, check_int
from iciia_exp.seeding import generator

__all__ = ["Digits"]

IMAGES = 1797

# Parent categories of the digits 0 to 9, by their strokes.
_PARENTS = ["loops", "straight", "curves", "curves", "straight", "curves", "loops", "straight", "loops", "loops"]


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's images, 0 to 16, and labels; text that is parsed once for all runs of a sweep."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


class Digits(ImageDataset):
    """8x8 digits with sensor noise.

    Args:
        noise_std: standard deviation of the noise, in units of the full scale of a pixel (0 black, 1 white). Pixels
            are not clipped.
        seed: seed of the noise and of the assignment of images to splits.
        sizes: number of images for the backbone's training, the methods' training, val and test; disjoint.
    """

    name = "digits"
    class_names = tuple("0123456789")
    has_backbone_images = True

    def __init__(self, sizes: Mapping[str, int], noise_std: float = 0.4, seed: int = 0) -> None:
        self.noise_std = check_float("noise_std", noise_std, 0.0, 100.0)
        self.seed = check_int("seed", seed, 0)
        if set(sizes) != set(SPLITS):
            raise ConfigError("sizes", dict(sizes), f"must give the number of images for each of {', '.join(SPLITS)}")
        self.sizes = {s: check_int(f"sizes.{s}", sizes[s], 1) for s in SPLITS}
        if (total := sum(self.sizes.values())) > IMAGES:
            raise ConfigError("sizes", self.sizes, f"asks for {total} images, the dataset has {IMAGES}")

    @cached_property
    def _data(self) -> tuple[np.ndarray, np.ndarray]:
        scans, labels = _scans()
        rng = generator("digits", self.seed)
        order = rng.permutation(IMAGES)[: sum(self.sizes.values())]
        noise = rng.normal(0.0, self.noise_std, size=scans.shape)
        images = (scans / 16.0 + noise).astype(np.float32)
        return images[order], labels[order].astype(np.int64)

    def load_table(self) -> pd.DataFrame:
        """Return label, split and the parent category by stroke; the writers are unknown."""
        labels = self._data[1]
        parents = np.array(_PARENTS, dtype=object)
        splits = np.repeat(np.array(SPLITS, dtype=object), [self.sizes[s] for s in SPLITS])
        return pd.DataFrame({"label": labels, "split": splits, "owner": None, "parent": parents[labels]})

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one image as float32 [1, 8, 8], full scale 0 to 1 plus noise."""
        return self._data[0][index][None]

    def image_digests(self) -> np.ndarray:
        """Return a digest of every image."""
        return row_digests(self._data[0])
