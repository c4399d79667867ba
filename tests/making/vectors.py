"""Vectors with a CSV file, as a user would bring them: one cluster per class."""

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file


def make_vectors(root, images=120, dim=8, classes=("ant", "bee", "cat"), dtype="float32", seed=0, **columns):
    """Write ``features.npy`` and ``images.csv``; ``columns`` (lists) are added. Returns vectors and label names."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    numbers = rng.permutation(np.arange(images) % len(classes))
    vectors = (rng.normal(size=(len(classes), dim))[numbers] + rng.normal(size=(images, dim))).astype(dtype)
    labels = [classes[n] for n in numbers]
    np.save(root / "features.npy", vectors)
    pd.DataFrame({"label": labels, **columns}).to_csv(root / "images.csv", index=False)
    return vectors, labels


def make_safetensors(path, vectors, key="image_embeds", **others):
    """Write vectors (array or tensor) and other tensors."""
    save_file({key: torch.as_tensor(vectors), **others}, path)
