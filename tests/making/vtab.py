"""VTAB-1K's layout with small images."""

import numpy as np
from PIL import Image


def make_vtab(root, tasks=("cifar", "svhn", "eurosat", "kitti", "own"), classes=3, sizes=(4, 2, 3)):
    """Write tasks with images whose colour is that of their class, and the lists of their splits."""
    rng = np.random.default_rng(0)
    for task in tasks:
        colours = rng.integers(0, 200, (classes, 3))
        for name, split, each in zip(("train800", "val200", "test"), ("train", "train", "test"), sizes, strict=True):
            lines = []
            for label in range(classes):
                for i in range(each):
                    path = f"images/{split}/{name}-{label}-{i}.png"
                    (root / task / path).parent.mkdir(parents=True, exist_ok=True)
                    pixels = colours[label] + rng.integers(0, 30, (24, 32, 3))
                    Image.fromarray(pixels.astype(np.uint8)).save(root / task / path)
                    lines.append(f"{path} {label}")
            (root / task / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root
