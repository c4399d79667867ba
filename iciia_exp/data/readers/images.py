"""Image files: which files are images, and their decoding to RGB.

`read_image` decodes the images of users: all depths and ranges, transparency, and orientation. `decode` is the plain
conversion to RGB of published pipelines, for datasets whose results are compared with published ones.
"""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = [
    *("BACKGROUND", "as_picture", "decode", "extensions", "open_image", "open_stream", "read_image", "upright_rgb"),
]

#: Colour under transparent pixels of a user's image.
BACKGROUND = "white"

#: Formats of Pillow that are left out: `EPS` runs Ghostscript, and the others need a handler that Pillow does not have.
_UNREAD = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
_ORIENTATION = 0x0112  # EXIF

# Pillow warns of as many pixels as `open_image` refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@cache
def extensions() -> tuple[str, ...]:
    """Return the extensions of the formats that Pillow reads, in lower case."""
    Image.init()
    readable = Image.OPEN.keys() - _UNREAD
    return tuple(sorted(end for end, form in Image.registered_extensions().items() if form in readable))


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file, which is not decoded yet.

    Raises what Pillow raises, and a `ValueError` for what is not a regular file, and for more pixels than Pillow's
    limit against decompression bombs (`PIL.Image.MAX_IMAGE_PIXELS`, 89 million).
    """
    # a pipe would block without O_NONBLOCK
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("is not a regular file")
        with open_stream(file) as image:
            yield image


def open_stream(file: IO[bytes]) -> Image.Image:
    """Return an image from an open file, not decoded yet; raises as `open_image`."""
    try:
        image = Image.open(file)
    except UnidentifiedImageError as error:  # its message is the file object
        raise UnidentifiedImageError("cannot identify the format of the image") from error
    if (limit := Image.MAX_IMAGE_PIXELS) and image.width * image.height > limit:
        size = f"{image.width:,} x {image.height:,} pixels"
        raise ValueError(f"has {size}, more than {limit:,}, Pillow's limit against decompression bombs")
    return image


def decode(path: Path) -> Image.Image:
    """Return an image file as RGB by Pillow's conversion alone, as published pipelines read it."""
    with open_image(path) as image:
        return image.convert("RGB")


def read_image(path: Path) -> Image.Image:
    """Return an image file of a user as RGB.

    The orientation of EXIF is applied. Transparent pixels show `BACKGROUND`. 16 bits are scaled to 8, and
    floating-point numbers from 0..1 to 0..255. Of several frames the first is read. Raises a `ValueError` for other
    ranges.
    """
    with open_image(path) as image:
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image as RGB, as `read_image` does."""
    image.load()
    picture = _to_rgb(image)
    if "exif" in image.info or image.format in ("TIFF", "MPO"):
        picture = _upright(picture, image)
    return picture


def as_picture(image: Any) -> Image.Image:
    """Return an image as an application has it as a PIL image.

    Args:
        image: a PIL image; a path; or an array or tensor [H, W], [H, W, C] or [C, H, W] with C = 1, 3 or 4, uint8 or
            floating-point numbers from 0 to 1.

    Raises a `ValueError` for anything else.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image))
    values = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if values.ndim == 3 and values.shape[2] not in (1, 3, 4) and values.shape[0] in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)) or not values.size:
        shapes = "[H, W], [H, W, 3] or [3, H, W]"
        got = f"{type(image).__name__} {list(values.shape)}"
        raise ValueError(f"takes a PIL image, a path, or numbers {shapes}, not {got}")
    if values.dtype.kind == "f":
        values = _unit_to_bytes(values.astype(np.float32), "0 to 1, or uint8")
    elif values.dtype != np.uint8:
        raise ValueError(f"has values of type {values.dtype}; expected uint8, or floating-point numbers from 0 to 1")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(values.squeeze(2) if values.shape[2:] == (1,) else values)))


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image.convert("RGB")
    if mode in ("I", "F") or mode.startswith("I;16"):
        return Image.fromarray(_to_bytes(np.asarray(image), image)).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), picture).convert("RGB")
    return image.convert("RGB")


def _to_bytes(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """Return an image of one channel as uint8, by the range of its type."""
    if image.mode == "F":
        return _unit_to_bytes(values, "0 to 1")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # there, Pillow's name for 16 bits
        low, high = values.min(), values.max()
        raise ValueError(f"has 32-bit integers ({low} to {high}), whose white is not known; save it with 8 or 16 bits")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _unit_to_bytes(values: np.ndarray, expected: str) -> np.ndarray:
    """Return floating-point numbers from 0 to 1 as uint8; others raise a `ValueError` that says what is expected."""
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # also NaN
        raise ValueError(f"has floating-point values from {low:g} to {high:g}; expected {expected}")
    return (255 * values + 0.5).astype(np.uint8)


def _upright(picture: Image.Image, image: Image.Image) -> Image.Image:
    """Return a picture turned by the orientation of EXIF; damaged EXIF is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises many kinds
        return picture
    if turn not in range(2, 9):
        return picture
    picture.getexif()[_ORIENTATION] = turn
    return ImageOps.exif_transpose(picture)
