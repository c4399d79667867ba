"""Rounds of a run: accuracy on the test images after every round, and the bytes sent until then.

Legend: C clients, S images of a client, K classes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from iciia_exp.artifacts import read_json
from iciia_exp.data.batches import ClientIndex, cut_chunks
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

    Columns: ``round``, ``answer`` (see `CoTrained.served`; ``backbone`` is the backbone alone), ``accuracy``,
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
    manifest = read_json(folder / "manifest.json")
    unseen_K = np.isin(np.arange(method.num_classes), unseen)
    sent = {site: _sum(manifest["payloads"], site, "client_once") / manifest["devices"] for site in ("cloud", "device")}
    rows: list[dict[str, Any]] = []
    for number in range(manifest["rounds"] + 1):
        weights, facts = read_round(folder, number)
        method.load({name: t.to(device) for name, t in weights.items()})
        right: dict[str, list[np.ndarray]] = {}
        labels = []
        for at in range(0, len(client_C), _CLIENTS):
            part = slice(at, at + _CLIENTS)
            batch = setup.batches[ClientIndex(index_CS[part], client_C[part])].moved(device)
            y = batch.y_CS[batch.mask_CS]
            answers = {"backbone": setup.head.to(device)(batch.x_CSD[batch.mask_CS])} | method.served(batch)
            for name, logits_NK in answers.items():
                right.setdefault(name, []).append((logits_NK.argmax(-1) == y).cpu().numpy())
            labels.append(y.cpu().numpy())
        y_N = np.concatenate(labels)
        for site in sent:
            sent[site] += _sum(facts.get("payloads", []), site, "round") / manifest["devices"]
        for name, parts in right.items():
            right_N = np.concatenate(parts)
            groups = {"accuracy": y_N >= 0, "seen_accuracy": ~unseen_K[y_N], "unseen_accuracy": unseen_K[y_N]}
            shares = {key: float(right_N[chosen].mean()) if chosen.any() else np.nan for key, chosen in groups.items()}
            bytes_sent = {"down_bytes": round(sent["cloud"]), "up_bytes": round(sent["device"])}
            rows.append({"round": number, "answer": name, **shares, **bytes_sent})
        progress((number + 1) / (manifest["rounds"] + 1))
    return pd.DataFrame(rows)


def _sum(payloads: Sequence[Sequence[Any]], sender: str, phase: str) -> int:
    return sum(size for p, site, _, _, size in payloads if (p, site) == (phase, sender))
