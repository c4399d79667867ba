"""What runs give to clients of types that they were, or were not, trained on.

    python benchmarks/client_types.py RUN [RUN ...]
    python benchmarks/client_types.py RUN [RUN ...] --images 6 --drawn 20000 --classes 2 20 --iid_bonus 0 1 2

RUN is a run directory; several of one setting, with different seeds, are averaged. The test images of its partition
are drawn to clients of four types, `--images` each, and every image is answered after n images before it:

- seen: the partition's test clients of the types the run was trained on (`client_mix.unseen_types` keeps some back);
- unseen: those of the types that were kept back;
- random: clients with a random set of `--classes` classes, all equally frequent;
- all: clients with all classes.

Beside the method stand the backbone alone and, in the last column, the prior of classes estimated by EM from all images
of a client (Saerens, Latinne and Decaestecker 2002). `--iid_bonus` answers again with so many nats of
iid_bonus after any number of images, instead of what the run chose (`method=iciia_prior`, `client_prior`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from iciia_exp import Run
from iciia_exp.config.settings import Evaluation
from iciia_exp.data.batches import FeatureBatches
from iciia_exp.data.client_mix import ClientMix, clients_in_order, unseen
from iciia_exp.data.clients import Clients
from iciia_exp.data.dataset import dense_labels
from iciia_exp.engine.evaluation.history import Setup, history_table
from iciia_exp.methods.adapt.heads import BackboneOnly
from iciia_exp.methods.adapt.prior_em import PriorEM
from iciia_exp.methods.base import Facts, Method
from iciia_exp.serving.run import Run as RunType

LENGTHS = (0, 1, 2, 3, 5, 10, 15)


def kinds_of(run: RunType, labels: np.ndarray, options: argparse.Namespace) -> dict[str, Clients]:
    """Return the clients of every type."""
    clients, rng, images, classes = run.partition, np.random.default_rng(123), options.images, options.classes
    kept_back = unseen(clients.types, run.config["client_mix"]["unseen_types"])
    new_C = np.isin(clients.types.astype(str), kept_back)
    parts = {}
    for name, who in (("seen", ~new_C), ("unseen", new_C)):
        rows = [
            rng.permutation(clients.test[i])[:images]
            for i in np.flatnonzero(who & (clients.test.lengths >= images))
            for _ in range(options.orders)
        ]
        if rows:
            parts[name] = clients_in_order(np.stack(rows), name)
    size = options.drawn * images / len(clients.test.values)
    for name, mix in (
        ("random", ClientMix(0.0, 1.0, fewest_classes=classes[0], most_classes=classes[-1], size=size)),
        ("all", ClientMix(0.0, 0.0, 1.0, size=size)),
    ):
        parts[name] = clients_in_order(mix.draw(clients.test, clients.types, labels, images, rng).index_CS, name)
    return parts


def answered(method: Method, run: RunType, batches: FeatureBatches, clients: Clients, lengths: list) -> pd.DataFrame:
    """Return a method's accuracy and gain over the backbone, in percent, and its log-loss, by length of history."""
    options = Evaluation(history_lengths=lengths, history_clients=len(clients))
    table = history_table(Setup(method, run.head, batches, clients), options, protocols=("stream",))
    sums = table[table["history"] >= 0].groupby("history").sum(numeric_only=True)
    correct, gained, loss = (
        sums["method_correct"],
        sums["method_correct"] - sums["backbone_correct"],
        sums["method_loss"],
    )
    columns = {"accuracy": 100 * correct, "gain": 100 * gained, "log_loss": loss}
    return pd.DataFrame(columns).div(sums["targets"], axis=0).reset_index()


def measure(run: RunType, options: argparse.Namespace) -> pd.DataFrame:
    """Return one row for every client type, who answers, and length."""
    store = run.features
    labels = dense_labels(store.table["label"], run.info["task"], store.num_classes)
    batches = FeatureBatches(store.array(), labels)
    em = PriorEM(Facts.of(run.head), calibrator="none").eval()
    iid_bonus = getattr(getattr(run.method, "prior", None), "iid_bonus", None)
    chosen = None if iid_bonus is None else iid_bonus.clone()
    frames, lengths = [], [n for n in LENGTHS if n < options.images]
    for client_type, clients in kinds_of(run, labels, options).items():
        tables = {
            "backbone": answered(BackboneOnly(Facts.of(run.head)), run, batches, clients, lengths),
            "em": answered(em, run, batches, clients, lengths[-1:]),
            "method": answered(run.method, run, batches, clients, lengths),
        }
        for nats in options.iid_bonus if iid_bonus is not None else ():
            iid_bonus.fill_(nats)
            tables[f"iid_bonus={nats:g}"] = answered(run.method, run, batches, clients, lengths)
            iid_bonus.copy_(chosen)
        frames += [table.assign(client_type=client_type, who=who) for who, table in tables.items()]
    return pd.concat(frames)


def show(name: str, frames: list[pd.DataFrame]) -> None:
    """Print one setting's table: means over its runs, and their standard errors."""
    print(f"\n{name}, {len(frames)} run(s); accuracy after n images, gain over the backbone, in brackets the log-loss")
    every = pd.concat(frames).groupby(["client_type", "who", "history"], sort=False)[["accuracy", "gain", "log_loss"]]
    mean, error = every.mean(), every.sem()
    lengths = sorted(set(mean.index.get_level_values("history")))
    print(" " * 22 + "".join(f"n = {n}".rjust(24) for n in lengths))
    for client_type, who in dict.fromkeys((k, w) for k, w, _ in mean.index):
        cells = []
        for n in lengths:
            if (client_type, who, n) not in mean.index:
                cells.append(" " * 24)
                continue
            value = mean.loc[(client_type, who, n)]
            about = f"±{error.loc[(client_type, who, n), 'gain']:.1f}" if len(frames) > 1 and who != "backbone" else ""
            gain = "" if who == "backbone" else f" {value['gain']:+.1f}{about}"
            cells.append(f"{value['accuracy']:.1f}{gain} ({value['log_loss']:.3f})".rjust(24))
        print(f"{client_type:<8}{who:<14}" + "".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--classes", type=int, nargs="+", default=[4], help="of the random sets; fewest and most")
    parser.add_argument("--images", type=int, default=16, help="of a client")
    parser.add_argument("--drawn", type=int, default=2000, help="clients of the drawn types")
    parser.add_argument("--orders", type=int, default=8, help="of each of the partition's clients")
    parser.add_argument("--iid_bonus", type=float, nargs="*", default=[], help="in nats, beside what the run chose")
    options = parser.parse_args()
    settings: dict[str, list[pd.DataFrame]] = {}
    for path in options.runs:
        run = Run.load(path)
        mix = run.config["client_mix"]
        shares = "/".join(f"{mix[k]:g}" for k in ("natural", "random_classes", "homogeneous", "drifting"))
        name = f"{run.method.name} attention={run.config['method'].get('attention', 'causal')} mix={shares}"
        name += f" unseen={mix['unseen_types']:g} recipe={run.config['training']['recipe']['optimizer']}"
        settings.setdefault(name, []).append(measure(run, options))
    for name, frames in settings.items():
        show(name, frames)


if __name__ == "__main__":
    main()
