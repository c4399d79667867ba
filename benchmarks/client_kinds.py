"""What runs give to clients of kinds that they were, or were not, trained on.

    python benchmarks/client_kinds.py RUN [RUN ...]

RUN is a run directory (several of one setting, with different seeds, are averaged). The test images of its partition
are drawn to clients of four kinds, 16 images each, and every image is answered after n images before it:

- seen: the partition's test clients of the kinds the run was trained on (`client_mix.unseen_kinds` keeps some back);
- unseen: those of the kinds that were kept back;
- random: clients with a random set of `--classes` classes, all equally frequent;
- all: clients with all classes.

Beside the method stand the backbone alone and the prior of classes estimated by EM from all 16 images (Saerens,
Latinne and Decaestecker 2002), as the last column of a history of 15.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from iciia_exp import Run
from iciia_exp.data.batches import FeatureBatches, Selection
from iciia_exp.data.client_mix import ClientMix, unseen
from iciia_exp.data.dataset import dense_labels
from iciia_exp.engine.run import Run as RunType

LENGTHS = (0, 1, 2, 3, 5, 10, 15)
IMAGES = 16


def kinds_of(run: RunType, labels: np.ndarray, classes: int, drawn: int) -> dict[str, Selection]:
    """Return the sequences of every kind of client."""
    clients, rng = run.partition, np.random.default_rng(123)
    kept_back = unseen(clients.kinds, run.config["client_mix"]["unseen_kinds"])
    new_C = np.isin(clients.kinds.astype(str), kept_back)
    parts = {}
    for name, who in (("seen", ~new_C), ("unseen", new_C)):
        rows = [
            rng.permutation(clients.test[i])[:IMAGES]
            for i in np.flatnonzero(who & (clients.test.lengths >= IMAGES))
            for _ in range(8)
        ]
        if rows:
            parts[name] = Selection(np.stack(rows), np.zeros(len(rows), np.int64))
    size = drawn * IMAGES / len(clients.test.values)
    for name, mix in (
        ("random", ClientMix(0.0, 1.0, fewest_classes=classes, most_classes=classes, size=size)),
        ("all", ClientMix(0.0, 0.0, 1.0, size=size)),
    ):
        parts[name] = mix.draw(clients.test, clients.kinds, labels, IMAGES, rng)
    return parts


def em(logits_SK: torch.Tensor, steps: int = 50) -> torch.Tensor:
    """Return log posteriors under the prior that EM finds in the images of each client, [..., S, K]."""
    log_p = logits_SK.log_softmax(-1)
    log_prior = torch.zeros_like(log_p[..., :1, :])
    for _ in range(steps):
        log_prior = (log_p + log_prior).softmax(-1).mean(-2, keepdim=True).clamp(min=1e-8).log()
    return (log_p + log_prior).log_softmax(-1)


@torch.inference_mode()
def measure(run: RunType, classes: int, drawn: int) -> pd.DataFrame:
    """Return accuracy and log-loss of every kind of client and length."""
    store = run.features
    table = store.table
    labels = dense_labels(table["label"], run.info["task"], store.num_classes)
    batches = FeatureBatches(store.array(), labels)
    rows = []
    for kind, sequences in kinds_of(run, labels, classes, drawn).items():
        seen: dict[tuple[str, int], list[torch.Tensor]] = {}
        for start in range(0, len(sequences.index_CS), 64):
            some = slice(start, start + 64)
            batch = batches[Selection(sequences.index_CS[some], sequences.client_C[some])]
            plain_CSK = run.head(batch.x_CSD)
            whole = run.method.stream(batch.x_CSD) if run.method.causal else None
            for n in LENGTHS:
                logits_CK = run.method(batch.x_CSD[:, : n + 1])[:, n] if whole is None else whole[:, n]
                answers = {"method": logits_CK, "backbone": plain_CSK[:, n]}
                if n == LENGTHS[-1]:
                    answers["em"] = em(plain_CSK)[:, n]
                for who, logits in answers.items():
                    y_C = batch.y_CS[:, n]
                    hit_C = (logits.argmax(-1) == y_C).double()
                    loss_C = torch.nn.functional.cross_entropy(logits.double(), y_C, reduction="none")
                    seen.setdefault((who, n), []).append(torch.stack([hit_C, loss_C]))
        for (who, n), parts in seen.items():
            hit, loss = torch.cat(parts, 1).mean(1).tolist()
            rows.append({"kind": kind, "who": who, "n": n, "accuracy": 100 * hit, "log_loss": loss})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--classes", type=int, default=4, help="of the random sets")
    parser.add_argument("--drawn", type=int, default=2000, help="clients of the random kinds")
    options = parser.parse_args()
    settings: dict[str, list[pd.DataFrame]] = {}
    for path in options.runs:
        run = Run.load(path)
        mix = run.config["client_mix"]
        shares = "/".join(f"{mix[k]:g}" for k in ("natural", "random_classes", "homogeneous", "drifting"))
        name = f"{run.method.name} attention={run.config['method'].get('attention', 'causal')} mix={shares}"
        name += f" unseen={mix['unseen_kinds']:g} recipe={run.config['protocol']['recipe']['optimizer']}"
        settings.setdefault(name, []).append(measure(run, options.classes, options.drawn))
    for name, frames in settings.items():
        print(f"\n{name}, {len(frames)} run(s); accuracy after n images, in brackets the log-loss")
        every = pd.concat(frames).groupby(["kind", "who", "n"], sort=False)[["accuracy", "log_loss"]]
        mean, spread = every.mean(), every.std() / len(frames) ** 0.5
        for kind, who in dict.fromkeys((k, w) for k, w, _ in mean.index):
            cells = []
            for n in LENGTHS:
                if (kind, who, n) not in mean.index:
                    cells.append(f"{'':>18}")
                    continue
                value, error = mean.loc[(kind, who, n)], spread.loc[(kind, who, n)]
                about = f"±{error['accuracy']:.1f}" if len(frames) > 1 else ""
                cells.append(f"{value['accuracy']:>6.1f}{about} ({value['log_loss']:.2f})".rjust(18))
            print(f"{kind:<8}{who:<9}" + "".join(cells))


if __name__ == "__main__":
    main()
