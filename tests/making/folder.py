"""Image folders in small, as people have them, and tables beside them."""

import pandas as pd

from tests.making.images import write_image

CLASSES = ("apple", "bread", "cup")


def make_folder(root, classes=CLASSES, per_class=10, splits=("",), size=16):
    """Write ``[split/]class/number.jpg``, ``per_class`` images in each class folder."""
    for split in splits:
        for label, name in enumerate(classes):
            for number in range(per_class):
                write_image(root / split / name / f"{number:03d}.jpg", label, number, size)
    return root


def write_table(path, /, **columns):
    """Write a CSV table and return its path."""
    pd.DataFrame(columns).to_csv(path, index=False)
    return path
