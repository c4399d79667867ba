"""Rounds of a run: accuracy on the test images after every round, and the bytes sent until then.

Legend: C clients, S images of a client, K classes.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from iciia_exp.artifacts import read_json
from iciia_exp.data.batches import ClientBatch, ClientIndex, cut_chunks
from iciia_exp.data.rounds import read_round
from iciia_exp.engine.evaluation.history import Setup
from iciia_exp.methods.cotrain.base import CoTrained

__all__ = ["rounds_table"]

_CLIENTS = 16  # of a batch


@torch.inference_mode()
def rounds_table(
    setup: Setup,
    folder: Path,
    unseen: Sequence[int],
    images: int,
    progress: Callable[[float], None] = lambda share: None,
) -> pd.DataFrame:
    """Return one row for each round and way to answer, from before the first round on.

    Columns: ``round``, ``answer`` (see `CoTrained.beside`; ``backbone`` is the backbone alone), ``accuracy``,
    ``seen_accuracy`` and ``unseen_accuracy`` (on the classes that the backbone has and has not learned from; NaN
    without such), and ``down_bytes`` and ``up_bytes``, sent so far, mean over the devices.

    Args:
        setup: the method, whose network is that of the last round afterwards; the test images of its clients.
        folder: of the rounds.
        unseen: numbers of the classes that the backbone has not learned from.
        images: S.
        progress: called with the share that is done.
    """
    method, device = setup.method, torch.device(setup.device)
    assert isinstance(method, CoTrained)
    index_CS, client_C = cut_chunks(setup.clients.test, images)
    parts = [slice(at, at + _CLIENTS) for at in range(0, len(client_C), _CLIENTS)]

    def batches() -> Iterator[ClientBatch]:
        for part in parts:
            yield setup.batches[ClientIndex(index_CS[part], client_C[part])].moved(device)

    head, labels, beside = setup.head.to(device), [], []
    for batch in batches():  # what no round changes
        labels.append(batch.y_CS[batch.mask_CS])
        beside.append((head(batch.x_CSD[batch.mask_CS]), method.beside(batch)))
    y_N = torch.cat(labels)
    unseen_N = np.isin(y_N.cpu().numpy(), unseen)
    groups = {"accuracy": np.ones_like(unseen_N), "seen_accuracy": ~unseen_N, "unseen_accuracy": unseen_N}
    manifest = read_json(folder / "manifest.json")
    sent = {site: _sum(manifest["payloads"], site, "client_once") / manifest["devices"] for site in ("cloud", "device")}
    rows: list[dict[str, Any]] = []
    for number in range(manifest["rounds"] + 1):
        weights, facts = read_round(folder, number)
        method.load({name: t.to(device) for name, t in weights.items()})
        answers: dict[str, list[Tensor]] = {}
        for batch, (backbone_NK, ways) in zip(batches(), beside, strict=True):
            small_NK = method.small(method.read(batch))
            answers.setdefault("backbone", []).append(backbone_NK.argmax(-1))
            for name, added_NK in ways.items():
                logits_NK = small_NK if added_NK is None else added_NK + small_NK
                answers.setdefault(name, []).append(logits_NK.argmax(-1))
        for site in sent:
            sent[site] += _sum(facts["payloads"], site, "round") / manifest["devices"]
        for name, found in answers.items():
            right_N = (torch.cat(found) == y_N).cpu().numpy()
            shares = {key: float(right_N[chosen].mean()) if chosen.any() else np.nan for key, chosen in groups.items()}
            bytes_sent = {"down_bytes": round(sent["cloud"]), "up_bytes": round(sent["device"])}
            rows.append({"round": number, "answer": name, **shares, **bytes_sent})
        progress((number + 1) / (manifest["rounds"] + 1))
    return pd.DataFrame(rows)


def _sum(payloads: Sequence[Sequence[Any]], sender: str, phase: str) -> int:
    return sum(size for p, site, _, _, size in payloads if (p, site) == (phase, sender))
