"""Small pictures whose class can be learned: noise over stripes of the class's colour, width and angle."""

import colorsys

import numpy as np
from PIL import Image

GOLDEN = 0.618  # steps around the colour circle that never come close again


def make_image(label, number, size=32):
    """Return an RGB picture of class ``label`` (int); ``number`` draws the noise and the stripes' phase."""
    rng = np.random.default_rng([label, number])
    colour = np.array(colorsys.hsv_to_rgb((label * GOLDEN) % 1.0, 0.7, 0.9))
    angle = np.pi * (label % 7) / 7
    y, x = np.mgrid[:size, :size] / size
    stripes = np.sin(2 * np.pi * (2 + label % 3) * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 6.28))
    pixels = colour * (0.6 + 0.4 * stripes[..., None]) + rng.normal(0, 0.1, (size, size, 3))
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))


def write_image(path, label, number=0, size=32):
    """Write such a picture; the format follows the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image(label, number, size).save(path)
