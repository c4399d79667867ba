"""Scenes: captions of coloured digits, pictures that show them, and a look at whether a picture does.

"a small red three left of a large blue seven": one to three objects, each with a size, a colour of its own and a digit,
in a row or in a column. A picture is rendered from scikit-learn's digits; what is right in it is measured without a
learned model, but for the digit, which a classifier reads.

Legend: N objects of a scene.
"""

import itertools
from collections.abc import Container, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from iciia_exp.errors import UserError

__all__ = [
    *("COLORS", "DIGITS", "METRICS", "PAIRS", "PIXELS", "TRUTHS", "WORDS"),
    *("Thing", "altered", "draw_caption", "parse", "render", "truths"),
]

#: Height and width of a picture.
PIXELS = 32
COLORS = {"red": (255, 40, 40), "green": (40, 220, 40), "blue": (60, 90, 255), "yellow": (240, 220, 40)}
#: Height of the digits by size, in pixels.
SIZES = {"small": 7, "large": 11}
#: Digits that are told apart at this size.
DIGITS = {"zero": 0, "one": 1, "four": 4, "seven": 7}
#: Axis (0: rows) and direction of the next object, seen from the first one.
RELATIONS = {"left of": (1, 1), "right of": (1, -1), "above": (0, 1), "below": (0, -1)}
#: What `truths` looks at.
TRUTHS = ("color", "place", "size", "digit")
#: All words of captions.
WORDS = ("a", *SIZES, *COLORS, *DIGITS, "left", "right", "above", "below", "of")

#: A metric of a picture alone: a text that describes a good one, and one that describes a bad one.
PAIRS: Mapping[str, tuple[str, str]] = {"clarity": ("a clean picture", "a noisy picture")}
#: All metrics: whether a picture is rather that of its caption than of one that is wrong in a way, and those of pairs.
METRICS = (*TRUTHS, *PAIRS)

_SEEN = 0.35  # share of full brightness from which on a pixel belongs to an object
_LEAST = 6  # pixels of an object
_APART = 3.0  # pixels between the centres of neighbours
_TALL = 9.0  # height from which on an object is large


class Thing(NamedTuple):
    """An object of a scene."""

    size: str
    color: str
    digit: str


def draw_caption(rng: np.random.Generator, objects: int) -> str:
    """Return the caption of a random scene with 1 to 3 objects of different colours."""
    colors = rng.permutation(list(COLORS))[:objects]
    relation = str(rng.choice(list(RELATIONS)))
    things = [f"a {rng.choice(list(SIZES))} {color} {rng.choice(list(DIGITS))}" for color in colors]
    return f" {relation} ".join(things)


def parse(caption: str) -> tuple[list[Thing], str | None]:
    """Return the objects of a caption in order, and their relation (None of one object); raises a `UserError`."""
    words = caption.lower().split()
    relations = {tuple(relation.split()): relation for relation in RELATIONS}
    things: list[Thing] = []
    found: set[str] = set()
    at = 0
    while True:
        some = words[at : at + 4]
        kinds: tuple[Container[str], ...] = ({"a"}, SIZES, COLORS, DIGITS)
        if len(some) < 4 or not all(word in kind for word, kind in zip(some, kinds, strict=True)):
            example = "a small red one left of a large blue seven"
            raise UserError(f"{caption!r}: is not the caption of a scene; expected for example {example!r}")
        things.append(Thing(*some[1:]))
        at += 4
        if at == len(words):
            break
        width = 2 if words[at] in ("left", "right") else 1
        found.add(relations.get(tuple(words[at : at + width]), ""))
        at += width
    if "" in found or len(found) > 1 or len(things) > 3 or len({thing.color for thing in things}) < len(things):
        problem = "a scene has up to 3 objects of different colours, with the same relation between neighbours"
        raise UserError(f"{caption!r}: {problem}")
    return things, next(iter(found), None)


def altered(caption: str, kind: str) -> list[list[str]]:
    """Return captions that are wrong in one way, one of `TRUTHS`: a list for each object or pair of neighbours.

    An object gets each other digit or size, or each colour that no object has; neighbours change places. A single
    object has no neighbour: a second one is added.
    """
    things, relation = parse(caption)
    if kind == "place":
        if relation is None:
            other = next(color for color in COLORS if color != things[0].color)
            return [[f"{caption} left of {_text(things[0]._replace(color=other))}"]]
        pairs = range(len(things) - 1)
        return [[_caption([*things[:i], things[i + 1], things[i], *things[i + 2 :]], relation)] for i in pairs]
    taken = {thing.color for thing in things} if kind == "color" else set()
    values: tuple[str, ...] = {"color": tuple(COLORS), "size": tuple(SIZES), "digit": tuple(DIGITS)}[kind]
    return [
        [
            _caption([*things[:i], thing._replace(**{kind: value}), *things[i + 1 :]], relation)
            for value in values
            if value not in taken and value != getattr(thing, kind)
        ]
        for i, thing in enumerate(things)
    ]


def _text(thing: Thing) -> str:
    return f"a {thing.size} {thing.color} {thing.digit}"


def _caption(things: Sequence[Thing], relation: str | None) -> str:
    return f" {relation} ".join(_text(thing) for thing in things)


@cache
def _digits() -> dict[str, np.ndarray]:
    """Return scikit-learn's pictures of every digit, float32 [n, 8, 8] from 0 to 1."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return {name: (data.images[data.target == value] / 16).astype(np.float32) for name, value in DIGITS.items()}


@cache
def _fitted(name: str, number: int, height: int) -> np.ndarray:
    """Return a digit without its empty margin, at a height, float32 [height, width]."""
    picture = _digits()[name][number]
    rows, columns = (np.flatnonzero(picture.max(axis) > 0.2) for axis in (1, 0))
    part = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    width = max(2, round(part.shape[1] * height / part.shape[0]))
    scaled = Image.fromarray((255 * part).astype(np.uint8)).resize(
        (min(width, height), height), Image.Resampling.BICUBIC
    )
    return np.asarray(scaled, dtype=np.float32) / 255


def render(caption: str, rng: np.random.Generator) -> np.ndarray:
    """Return a picture of a scene, uint8 [PIXELS, PIXELS, 3]; digits and places are drawn."""
    things, relation = parse(caption)
    axis, direction = RELATIONS[relation] if relation else (1, 1)
    picture = np.zeros((PIXELS, PIXELS, 3), dtype=np.float32)
    for number, thing in enumerate(things):
        slot = number if direction > 0 else len(things) - 1 - number
        centre = np.full(2, PIXELS / 2) + rng.uniform(-3, 3, 2)
        centre[axis] = PIXELS * (slot + 0.5) / len(things) + rng.uniform(-0.7, 0.7) * (1 if len(things) > 1 else 4)
        stroke = _fitted(thing.digit, int(rng.integers(len(_digits()[thing.digit]))), SIZES[thing.size])
        top = np.clip(np.round(centre - np.array(stroke.shape) / 2).astype(int), 0, PIXELS - np.array(stroke.shape))
        place = (slice(top[0], top[0] + stroke.shape[0]), slice(top[1], top[1] + stroke.shape[1]))
        color = np.array(COLORS[thing.color], dtype=np.float32)
        picture[place] = np.maximum(picture[place], stroke[..., None] * color)
    return picture.round().clip(0, 255).astype(np.uint8)


def _masks(picture: np.ndarray) -> dict[str, np.ndarray]:
    """Return the largest connected part of the pixels of each colour, bool [PIXELS, PIXELS]: the rest is noise."""
    pixels = picture.astype(np.float32)
    seen = pixels.max(-1) > 255 * _SEEN
    names = list(COLORS)
    colors = np.array([COLORS[name] for name in names], dtype=np.float32)
    colors /= np.linalg.norm(colors, axis=1, keepdims=True)
    direction = pixels / np.maximum(np.linalg.norm(pixels, axis=-1, keepdims=True), 1)
    nearest = (direction @ colors.T).argmax(-1)
    return {name: _largest_part(seen & (nearest == number)) for number, name in enumerate(names)}


def _largest_part(mask: np.ndarray) -> np.ndarray:
    parts, count = ndimage.label(mask, np.ones((3, 3)))
    return parts == 1 + np.bincount(parts.ravel(), minlength=2)[1:].argmax() if count else mask


def _crop(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the brightness of an object, [64], scaled to 8 x 8 pixels."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    bright = np.where(mask, picture.max(-1), 0)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(bright.shape)
    square = np.zeros((side, side), dtype=np.uint8)
    top, left = ((side - size) // 2 for size in bright.shape)
    square[top : top + bright.shape[0], left : left + bright.shape[1]] = bright
    return np.asarray(Image.fromarray(square).resize((8, 8), Image.Resampling.BILINEAR), dtype=np.float32).ravel() / 255


@cache
def _reader(scenes: int = 2000) -> object:
    """Return a classifier of digits, fitted on the objects of rendered scenes."""
    from sklearn.svm import SVC

    rng = np.random.default_rng(0)
    crops, digits = [], []
    for _ in range(scenes):
        caption = draw_caption(rng, int(rng.integers(1, 4)))
        picture = render(caption, rng)
        masks = _masks(picture)
        for thing in parse(caption)[0]:
            if masks[thing.color].sum() >= _LEAST:
                crops.append(_crop(picture, masks[thing.color]))
                digits.append(thing.digit)
    return SVC(C=4.0).fit(crops, digits)


def truths(caption: str, picture: np.ndarray) -> np.ndarray:
    """Return what is right in a picture, float32 [4] from 0 to 1, in the order of `TRUTHS`.

    ``color``: share of the colours that are there, or not there, as they should be. ``place``: share of the pairs of
    neighbours in the right order (1 with one object that is there). ``size`` and ``digit``: share of the objects.
    """
    things, relation = parse(caption)
    masks = _masks(picture)
    there = {name: mask.sum() >= _LEAST for name, mask in masks.items()}
    wanted = {thing.color for thing in things}
    color = np.mean([there[name] == (name in wanted) for name in COLORS])
    sizes, digits, crops = [], [], []
    centres: list[np.ndarray | None] = []
    for thing in things:
        mask = masks[thing.color]
        if not there[thing.color]:
            sizes.append(False)
            centres.append(None)
            continue
        rows = np.flatnonzero(mask.any(1))
        sizes.append((rows[-1] - rows[0] + 1 >= _TALL) == (thing.size == "large"))
        centres.append(np.argwhere(mask).mean(0))
        crops.append(_crop(picture, mask))
        digits.append(thing.digit)
    read = _reader().predict(crops) if crops else []  # type: ignore[attr-defined]
    right = sum(a == b for a, b in zip(read, digits, strict=True)) / len(things)
    if relation is None:
        place = float(there[things[0].color])
    else:
        axis, direction = RELATIONS[relation]
        pairs = list(itertools.pairwise(centres))
        good = [a is not None and b is not None and direction * (b[axis] - a[axis]) > _APART for a, b in pairs]
        place = float(np.mean(good))
    return np.array([color, place, np.mean(sizes), right], dtype=np.float32)
