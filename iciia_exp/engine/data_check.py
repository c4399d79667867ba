"""Data check: what is in a dataset, and what may be wrong with it, before any work (``stage=check``)."""

import time
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from rich.table import Table

from iciia_exp.data.clients import ROLES
from iciia_exp.data.dataset import ImageDataset, MissingFiles
from iciia_exp.data.images import problems_of, tell_bad
from iciia_exp.data.readers.files import few
from iciia_exp.engine.inputs import Inputs
from iciia_exp.engine.terminal import fraction_bar
from iciia_exp.errors import UserError, printable
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["compared", "findings", "split_table", "unreadable", "weights_problem"]

_PROBED = 9  # images whose size is compared with the backbone's input
_PROBED_AT_ONCE, _DECODED_AT_ONCE = 4096, 64  # images
_PATIENCE = 30.0  # seconds of decoding
_FAR_LARGER = 8  # times the input's side
_MANY_COPIES = 0.01  # share of the train images that is said
_COARSE = 64  # sides of an input, in pixels, that lose much of a larger picture


def findings(inputs: Inputs, whole: bool) -> Iterator[str]:
    """Yield what may be wrong with the data, a line each.

    Args:
        inputs: of the experiment.
        whole: also compare the images with each other and with the backbone's input, which reads files.
    """
    yield from _untrained_classes(inputs)
    yield from _colliding_names(inputs)
    if whole and not isinstance(inputs.experiment.dataset_or_missing, MissingFiles):
        yield from _duplicates(inputs)
        yield from _sizes(inputs)


def compared(inputs: Inputs) -> bool:
    """Return whether `findings` compares the images with each other, without reading them."""
    e = inputs.experiment
    own = e.dataset_class.image_digests is not ImageDataset.image_digests
    return own and not isinstance(e.dataset_or_missing, MissingFiles)


def unreadable(inputs: Inputs) -> tuple[list[str], int]:
    """Return what cannot be read, at most one line, and the number of images that were decoded for it.

    All files are opened. Of many images some are decoded, as many as take half a minute.
    """
    if isinstance(inputs.experiment.dataset_or_missing, MissingFiles):
        return [], 0
    dataset, problems = inputs.experiment.dataset, dict[int, str]()
    rows = np.random.default_rng(0).permutation(len(dataset))
    with fraction_bar("files") as show:
        for block in np.array_split(np.arange(len(rows)), 1 + len(rows) // _PROBED_AT_ONCE):
            problems |= problems_of(dataset, block.tolist(), dataset.probe)
            show((block[-1] + 1) / len(rows))
    decoded, start = len(rows) if dataset.vectors else 0, time.monotonic()  # vectors have been read
    while decoded < len(rows) and time.monotonic() - start < _PATIENCE:
        some = rows[decoded : decoded + _DECODED_AT_ONCE].tolist()
        problems |= problems_of(dataset, some, dataset.__getitem__)
        decoded += len(some)
    if not problems:
        return [], decoded
    left = "a run leaves them out" if inputs.experiment.extraction.on_bad_image == "skip" else "a run stops there"
    count = f"{len(problems):,} of {len(rows):,} images cannot be read"
    return [f"{count}, {left} ({tell_bad(dataset, problems)})"], decoded


def split_table(inputs: Inputs) -> Table:
    """Return a table of the dataset's splits: images, owners, classes and images per class."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("split")
    for name in ("images", "owners", "classes", "images per class: least", "median", "most"):
        table.add_column(name, justify="right")
    for split, rows in inputs.table.groupby("split", sort=False):
        counts = _per_class(inputs.labels[rows.index.to_numpy()], inputs.num_classes)
        there = counts[counts > 0]
        cells = (len(rows), rows["owner"].nunique(), len(there), there.min(), int(np.median(there)), there.max())
        table.add_row(str(split), *(f"{cell:,}" for cell in cells))
    return table


def _per_class(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the number of images of each class, int64 [K]."""
    return labels.astype(np.int64).sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=classes)


def _untrained_classes(inputs: Inputs) -> Iterator[str]:
    clients, labels, classes = inputs.clients, inputs.labels, inputs.num_classes
    trained = np.union1d(clients.train.values, inputs.backbone_rows)
    tested = np.unique(clients.test.values)
    missing = (_per_class(labels[trained], classes) == 0) & (_per_class(labels[tested], classes) > 0)
    if not missing.any():
        return
    names = few(inputs.facts.class_names[k] for k in np.flatnonzero(missing))
    what = f"{missing.sum()} of {classes} classes have test images and no train images ({names})"
    if inputs.experiment.dataset_class.task == SINGLE_LABEL:
        share = np.isin(labels[tested], np.flatnonzero(missing)).sum()
        what += f"; {share:,} of {len(tested):,} test images are of them"
    yield what


def _colliding_names(inputs: Inputs) -> Iterator[str]:
    """Yield class names and owners that differ in accents' encoding, case, spaces or leading zeros only."""
    kinds = {
        "classes": inputs.facts.class_names,
        "owners": [o for o in pd.unique(inputs.table["owner"]) if o is not None],
    }
    for kind, names in kinds.items():
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(_plain_name(str(name)), []).append(str(name))
        if alike := [part for part in groups.values() if len(part) > 1]:
            pairs = few(" and ".join(printable(repr(name)) for name in part) for part in alike)
            yield f"{len(alike)} names of {kind} differ in case, accents' encoding, spaces or zeros only: {pairs}"


def _plain_name(name: str) -> str:
    plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    return str(int(plain)) if plain.isdecimal() else plain


def _duplicates(inputs: Inputs) -> Iterator[str]:
    """Yield how many val and test images are also train images, and how many train images are copies of others."""
    dataset, clients = inputs.experiment.dataset, inputs.clients
    if (digests := dataset.image_digests()) is None:
        return
    rows: dict[str, Any] = {role: np.unique(clients[role].values) for role in ROLES}
    rows["train"] = np.union1d(rows["train"], inputs.backbone_rows)
    for role in ("val", "test"):
        own = np.setdiff1d(rows[role], rows["train"])
        same = own[np.isin(digests[own], digests[rows["train"]]) & (digests[own] != 0)]
        if len(same):
            train = rows["train"][digests[rows["train"]] == digests[same[0]]][0]
            pair = _pair(dataset, same[0], train)
            yield f"{len(same):,} of {len(own):,} {role} images are train images as well ({pair})"
    yield from _train_copies(inputs, pd.Series(digests[rows["train"]], index=rows["train"]))


def _train_copies(inputs: Inputs, digests: pd.Series) -> Iterator[str]:
    """Yield how many train images are copies of others; ``digests`` by image number, 0 where it is unreadable."""
    digests = digests[digests != 0]
    alike = digests[digests.duplicated(keep=False)].to_frame("digest")
    if alike.empty:
        return
    alike["label"] = inputs.table["label"].loc[alike.index].map(str)  # of several labels a list
    several = alike[alike.groupby("digest")["label"].transform("nunique") > 1]
    if len(several):
        others = several[several["digest"] == several["digest"].iloc[0]]
        other = others.index[others["label"] != others["label"].iloc[0]][0]
        pair = _pair(inputs.experiment.dataset, other, others.index[0])
        yield f"{len(several):,} train images have content that others have with another label ({pair})"
    elif (copies := int(digests.duplicated().sum())) >= _MANY_COPIES * len(digests):
        first, second = alike.index[alike["digest"] == alike["digest"].iloc[0]][:2]
        pair = _pair(inputs.experiment.dataset, second, first)
        yield f"{copies:,} of {len(digests):,} train images are copies of others ({pair})"


def _pair(dataset: ImageDataset, copy: int, first: int) -> str:
    return printable(f"{dataset.describe(int(copy))} = {dataset.describe(int(first))}", lines=False)


def _sizes(inputs: Inputs) -> Iterator[str]:
    """Yield if the backbone sees much less than the pictures show."""
    from iciia_exp.engine.training.extract import probes  # late: it imports Lightning

    dataset = inputs.experiment.dataset
    try:
        backbone = inputs.experiment.named(
            lambda: inputs.experiment.backbone.fresh(inputs.num_classes, **inputs.facts.backbone_arguments), "backbone"
        )
        pictures = [dataset[int(row)] for row in probes(np.arange(len(dataset)))[:_PROBED]]
        pictures = [picture for picture in pictures if isinstance(picture, Image.Image)]
        taken = [backbone.transform(picture) for picture in pictures]
    except Exception:  # an image that cannot be read, a network that does not take it: others say so
        return
    if not pictures:
        return
    channels, side = taken[0].shape[0], min(taken[0].shape[1:])
    shown = int(np.median([min(picture.size) for picture in pictures]))
    coarse = shown >= (2 if side < _COARSE else _FAR_LARGER) * side
    grey = channels == 1 and any(picture.mode != "L" and _coloured(picture) for picture in pictures)
    if coarse or grey:
        what = f"{side} x {side}{' grey' if channels == 1 else ''} pixels"
        kind = "coloured pictures" if grey else "pictures"
        line = f"the backbone {inputs.experiment.backbone.name} sees {what} of {kind} whose shorter side is {shown:,}"
        yield line + ("; smaller copies load faster" if side >= _COARSE else "")


def _coloured(picture: Image.Image) -> bool:
    pixels = np.asarray(picture.convert("RGB").resize((16, 16))).astype(int)
    return bool((np.ptp(pixels, axis=2) > 16).any())


def weights_problem(inputs: Inputs) -> str | None:
    """Return why the backbone's weights do not fit, or None."""
    try:
        inputs.new_backbone()
    except UserError as error:
        return str(error)
    return None
