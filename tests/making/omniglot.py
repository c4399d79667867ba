"""Small Omniglot folders and zip files of exactly the real form: 1-bit PNG files of 105x105 pixels."""

import io
import zipfile

import numpy as np
from PIL import Image

#: Alphabets and how many characters each has; Greek is in both small sets, as in the real ones.
SMALL1 = {"Balinese": 2, "Greek": 3}
SMALL2 = {"Greek": 3, "Japanese_(hiragana)": 2}

# Numbers of the first character of each alphabet in the file names.
_FIRST = {"Balinese": 108, "Greek": 394, "Japanese_(hiragana)": 432}


def drawing(alphabet, character, drawer):
    """Return one image as bool [105, 105], False where there is ink, and its PNG file."""
    rng = np.random.default_rng([_FIRST[alphabet] + character, drawer])
    pixels = np.ones((105, 105), dtype=bool)
    y, x = rng.integers(10, 80, 2)
    pixels[y : y + 3, x : x + 20] = pixels[y : y + 20, x : x + 3] = False
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return pixels, file.getvalue()


def files(folder, alphabets, drawers=20):
    """Yield the path and the content of every file."""
    for alphabet, characters in alphabets.items():
        for character in range(1, characters + 1):
            for drawer in range(1, drawers + 1):
                name = f"{_FIRST[alphabet] + character - 1:04d}_{drawer:02d}.png"
                yield f"{folder}/{alphabet}/character{character:02d}/{name}", drawing(alphabet, character, drawer)[1]


def make_omniglot(root, folder="images_background", alphabets=SMALL1, zipped=False, prefix=""):
    """Write one part below ``root``, as a folder or as the zip file ``<prefix><folder>.zip``."""
    root.mkdir(parents=True, exist_ok=True)
    if not zipped:
        for path, content in files(folder, alphabets):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
        return root / folder
    with zipfile.ZipFile(root / f"{prefix}{folder}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir(folder)
        for alphabet, characters in alphabets.items():
            archive.mkdir(f"{folder}/{alphabet}")
            for character in range(1, characters + 1):
                archive.mkdir(f"{folder}/{alphabet}/character{character:02d}")
        for path, content in files(folder, alphabets):
            archive.writestr(path, content)
    return root / f"{prefix}{folder}.zip"
