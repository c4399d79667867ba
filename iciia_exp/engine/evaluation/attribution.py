"""Attribution: influence of the other images of a client on the prediction for one, and attention to them.

*weight* is the method's attention, if it has any (`Adaptive.attention_weights`), as shares of the attention to other
images. *influence*, for every method, is the change of the prediction's log-probability, in nats, by the image, against
leaving it out of the client's past.

Targets are drawn at random from the test images. The examples are targets whose prediction the method corrects, spoils,
or leaves as right or wrong as the backbone's; ``cases`` is the number of each case among the drawn targets, so that
examples are not mistaken for frequencies.

Legend: T targets, S images of a sequence (the target last), D features, K classes.
"""

import io
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from iciia_exp.config.settings import Evaluation
from iciia_exp.data.batches import ClientBatch, ClientIndex
from iciia_exp.data.clients import Clients
from iciia_exp.engine.evaluation.history import Setup
from iciia_exp.errors import first_line
from iciia_exp.methods.adapt.base import Adaptive
from iciia_exp.seeding import generator
from iciia_exp.tasks import MULTI_LABEL, Task

__all__ = ["CASES", "attribution_table", "thumbnail"]

log = logging.getLogger(__name__)

CASES = ("corrected", "spoiled", "unchanged")

# Drawn targets for every example.
_TRIED = 32

# Largest number of images of a sequence; leaving out each in turn costs its square.
_LONGEST = 64

# Images up to this size are stored as PNG, larger ones as JPEG.
_SMALL = 40


def _sequences(clients: Clients, number: int, images: int, rng: np.random.Generator) -> ClientIndex:
    """Return random targets, each after other images of its client: the earlier ones, or any without an order."""
    test = clients.test
    place_M = np.arange(len(test.values)) - np.repeat(test.offsets[:-1], test.lengths)  # within the client
    others_M = place_M if clients.in_time else np.repeat(test.lengths, test.lengths) - 1
    possible = np.flatnonzero(others_M > 0)
    drawn = rng.permutation(possible)[:number]
    owner_T = test.row_numbers[drawn]
    index_TS = np.full((len(drawn), images), -1, dtype=np.int64)
    for row, (position, owner) in enumerate(zip(drawn, owner_T, strict=True)):
        first = test.offsets[owner]
        if clients.in_time:
            past = np.arange(max(first, position - images + 1), position)
        else:
            others = np.setdiff1d(np.arange(first, test.offsets[owner + 1]), [position])
            past = rng.permutation(others)[: images - 1]
        index_TS[row, : len(past) + 1] = test.values[[*past, position]]
    return ClientIndex(index_TS, owner_T)


def _at_targets(logits_TSK: Tensor, mask_TS: Tensor) -> Tensor:
    return logits_TSK[torch.arange(len(mask_TS), device=mask_TS.device), mask_TS.sum(1) - 1]


def _without_each(batch: ClientBatch, past: int) -> ClientBatch:
    """Return one sequence ``past`` times, each without one of the images before the target, which comes last."""
    place_PS = torch.arange(past + 1, device=batch.x_CSD.device).expand(past, -1)
    kept_PS = place_PS[~torch.eye(past, past + 1, dtype=torch.bool, device=place_PS.device)].view(past, past)
    return ClientBatch(
        batch.x_CSD[0, kept_PS],
        batch.y_CS[0, kept_PS],
        torch.ones_like(kept_PS, dtype=torch.bool),
        batch.client_C.expand(past),
    )


def _log_probability(task: Task, logits_MK: Tensor, answer: Tensor) -> Tensor:
    """Return the log-probability of a prediction, [M]: a class, or 0 or 1 for every attribute, [K]."""
    return -task.log_loss(logits_MK, answer.expand(len(logits_MK), *answer.shape))


def _answer(logits_K: Tensor, task: Task) -> Tensor:
    return (logits_K > 0).to(torch.uint8) if task == MULTI_LABEL else logits_K.argmax()


def _named(y: Any, names: Sequence[str], task: Task) -> str:
    if task == MULTI_LABEL:
        return ", ".join(names[int(k)] for k in np.flatnonzero(y)) or "none"
    return names[int(y)]


def _by_case(change_T: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows of each case, from the change of a target's correct predictions."""
    return {
        "corrected": np.flatnonzero(change_T > 0),
        "spoiled": np.flatnonzero(change_T < 0),
        "unchanged": np.flatnonzero(change_T == 0),
    }


def _choose(change_T: np.ndarray, examples: int) -> list[tuple[str, int]]:
    """Return cases and rows of the examples, a third of each case as far as possible."""
    rows = {case: rows_T.tolist() for case, rows_T in _by_case(change_T).items()}
    chosen: dict[str, list[int]] = {case: rows[case][: -(-examples // 3)] for case in CASES}
    for case in ("corrected", "unchanged", "spoiled"):  # too few of a case are made up for by others
        short = examples - sum(map(len, chosen.values()))
        if short > 0:
            chosen[case] = rows[case][: len(chosen[case]) + short]
    while sum(map(len, chosen.values())) > examples:
        chosen[max(reversed(CASES), key=lambda case: len(chosen[case]))].pop()
    return [(case, row) for case in CASES for row in chosen[case]]


@torch.inference_mode()
def attribution_table(
    setup: Setup,
    options: Evaluation,
    images: int,
    class_names: Sequence[str],
    image: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """Return the examples: for each, the target (``rank`` 0) and its most influential other images (1, 2, ...).

    Args:
        setup: the method; targets are test images.
        options: number of examples and of images of each.
        images: S, images of a sequence at most, the target included.
        class_names: of the dataset.
        image: function from an image's number to the image, for thumbnails; None for none.

    Returns:
        Columns ``example``, ``case`` (`CASES`), ``cases`` (how many of the ``drawn`` targets are such), ``drawn``,
        ``client``, ``rank``, ``image`` (number in the dataset), ``truth``; of targets ``backbone_prediction``,
        ``backbone_confidence``, ``method_prediction``, ``method_confidence``; of others ``weight`` and ``influence``;
        ``thumbnail`` (PNG or JPEG). Empty if no client has two test images, or the method uses no other image.
    """
    method, head, batches, clients = setup.method, setup.head, setup.batches, setup.clients
    device, task = setup.device, setup.method.task
    if not isinstance(method, Adaptive) or not method.state_width or not options.examples or images < 2:
        return pd.DataFrame()
    rng = generator("retrieval")
    index = _sequences(clients, _TRIED * options.examples, min(images, _LONGEST), rng)
    if not len(index.client_C):
        return pd.DataFrame()
    method.to(device)
    head.to(device)
    parts = []
    for some in np.array_split(np.arange(len(index.client_C)), -(-len(index.client_C) // 32)):
        batch = batches[ClientIndex(index.index_CS[some], index.client_C[some])].moved(device)
        x_TD, y_T = _at_targets(batch.x_CSD, batch.mask_CS), _at_targets(batch.y_CS, batch.mask_CS)
        logits_TK, before_TK = _at_targets(method.logits(batch), batch.mask_CS), head(x_TD)
        correct = [task.correct(logits, y_T).sum(1).cpu().numpy() for logits in (logits_TK, before_TK)]
        parts.append(correct[0].astype(int) - correct[1].astype(int))
    change_T = np.concatenate(parts)
    counts = {case: len(rows_T) for case, rows_T in _by_case(change_T).items()}
    pictures = _Thumbnails(image, options.pixels)
    rows: list[dict[str, Any]] = []
    for example, (case, row) in enumerate(_choose(change_T, options.examples)):
        one = ClientIndex(index.index_CS[[row]], index.client_C[[row]])
        shared = {"example": example, "case": case, "cases": counts[case], "drawn": len(change_T)}
        shared["client"] = str(clients.ids[index.client_C[row]])
        for found in _example(method, head, batches[one].moved(device), class_names, task, options.neighbours):
            rows.append(shared | found | {"thumbnail": pictures(found["image"])})
    return pd.DataFrame(rows)


def _example(
    method: Adaptive, head: nn.Linear, batch: ClientBatch, class_names: Sequence[str], task: Task, neighbours: int
) -> list[dict[str, Any]]:
    """Return the rows of one sequence: its target, then its other images, the most influential first."""
    past = int(batch.mask_CS.sum()) - 1
    logits_K, before_K = method.logits(batch)[0, past], head(batch.x_CSD[0, past])
    answer = _answer(logits_K, task)
    without_PK = method.logits(_without_each(batch, past))[:, -1]
    influence_P = (
        (_log_probability(task, logits_K[None], answer) - _log_probability(task, without_PK, answer)).cpu().numpy()
    )
    weight_P = np.full(past, np.nan)
    if (weights_CSS := method.attention_weights(batch.x_CSD, batch.mask_CS)) is not None:
        own_P = weights_CSS[0, past, :past].double().cpu().numpy()
        weight_P = own_P / own_P.sum() if own_P.sum() > 0 else own_P
    assert batch.image_CS is not None
    image_S, labels = batch.image_CS[0].tolist(), batch.y_CS[0].cpu().numpy()
    target: dict[str, Any] = {"rank": 0, "image": image_S[past], "truth": _named(labels[past], class_names, task)}
    y_1 = batch.y_CS[0, past][None]
    for name, logits in (("backbone", before_K), ("method", logits_K)):
        right = task.correct(logits[None], y_1)
        if task == MULTI_LABEL:
            target[f"{name}_prediction"] = f"{int(right.sum())} of {right.numel()} right"
        else:
            target[f"{name}_prediction"] = class_names[int(logits.argmax())]
        target[f"{name}_confidence"] = float(task.confidence(logits[None]).mean())
    order = np.argsort(-np.where(np.isnan(weight_P), np.abs(influence_P), weight_P), kind="stable")[:neighbours]
    rows = [target]
    for rank, p in enumerate(order, 1):
        truth = _named(labels[p], class_names, task)
        found = {"weight": float(weight_P[p]), "influence": float(influence_P[p])}
        rows.append({"rank": rank, "image": image_S[p], "truth": truth, **found})
    return rows


class _Thumbnails:
    """Thumbnails by an image's number; none after the first that fails."""

    def __init__(self, image: Callable[[int], Any] | None, pixels: int) -> None:
        self.image, self.pixels = image, pixels

    def __call__(self, number: int) -> bytes | None:
        if self.image is None:
            return None
        try:
            return thumbnail(self.image(number), self.pixels)
        except Exception as error:  # of many kinds; the folder may be gone
            log.warning("attribution: examples without pictures (image %d: %s)", number, first_line(error))
            self.image = None
            return None


def thumbnail(image: Any, pixels: int = 96) -> bytes | None:
    """Return a dataset's image as PNG (a small one) or JPEG; None for a vector.

    Args:
        image: PIL image; clip, uint8 [F, h, w, 3], of which the middle frame is taken; or float [c, h, w] from 0 to 1.
        pixels: longer side at most.
    """
    from torchvision.transforms.functional import to_pil_image

    if isinstance(image, np.ndarray | Tensor):
        array = np.asarray(image)
        if array.ndim < 2:
            return None
        if array.ndim == 4:
            array = array[len(array) // 2]
        image = to_pil_image(torch.from_numpy(array).clamp(0, 1) if array.dtype.kind == "f" else array)
    picture = image.convert("L" if image.mode in ("L", "1", "I;16") else "RGB")
    out = io.BytesIO()
    if max(picture.size) <= _SMALL:
        picture.save(out, "PNG")
    else:
        picture.thumbnail((pixels, pixels))
        picture.save(out, "JPEG", quality=85)
    return out.getvalue()
