"""Read, write and compare the figures that `benchmarks/results.py` stores in `docs/results`: a line for each run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from scipy.stats import t as student_t
from settings import OWN_LABELS

DOCS = Path(__file__).resolve().parents[1] / "docs"
STORED = DOCS / "results"

#: Figures of a run that are stored.
KEYS = (
    *("accuracy", "gain", "worst_decile", "harmed_share", "harmed_share_by_chance", "log_loss", "ece"),
    *("overhead_percent", "streaming_overhead_percent", "state_bytes", "seconds_train", "test_clients", "test_images"),
    *("backbone_accuracy", "backbone_worst_decile", "backbone_log_loss", "backbone_ece", "backbone_macs"),
)

#: Rank correlations of a metric with what is right: over pictures, and over the differences of both models.
AGREEMENT = ("agreement", "agreement_difference")


def file(name: str) -> Path:
    """Return the file of a table's stored figures."""
    return STORED / f"{name}.csv"


def output_file(name: str) -> Path:
    """Return the file of what a benchmark printed."""
    return STORED / f"{name}.txt"


def stored(name: str) -> pd.DataFrame:
    """Return a table's stored figures, a line for each run."""
    return pd.read_csv(file(name))


def store(name: str, runs: pd.DataFrame, labels: Iterable[str]) -> None:
    """Write a table's figures, settings in the order of ``labels``."""
    order = {label: number for number, label in enumerate(labels)}
    runs = runs.sort_values(["label", "seed"], key=lambda c: c.map(order) if c.name == "label" else c)
    file(name).parent.mkdir(exist_ok=True)
    runs.to_csv(file(name), index=False)


def stored_of(names: Iterable[str]) -> list[str]:
    """Return those of some tables that are stored."""
    return [name for name in names if file(name).is_file()]


def means(name: str) -> pd.DataFrame:
    """Return means and standard errors over the runs of each setting."""
    runs = stored(name)
    groups = runs.drop(columns="seed").groupby("label", sort=False)
    table = groups.mean(numeric_only=True).join(groups.sem(numeric_only=True).add_suffix("_se"))
    return table.assign(oracle=groups["oracle"].first())


def best_first(name: str) -> pd.DataFrame:
    """Return the means, best accuracy first."""
    return means(name).sort_values("accuracy", ascending=False, kind="stable")


def by_seed(name: str) -> pd.DataFrame:
    """Return accuracies, a line for each seed and a column for each setting."""
    return stored(name).pivot(index="seed", columns="label", values="accuracy")


def differences(runs: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return each setting's accuracy less that of another, paired over the seeds: ``less`` and its error."""
    found = runs.sub(runs[reference], axis=0)
    return pd.DataFrame({"less": found.mean(), "less_se": found.sem()})


def behind(name: str, labels: Iterable[str]) -> pd.DataFrame:
    """Return `differences` to the best of some settings.

    Further columns: whether it is the best, and whether it is that or its 95 % interval has 0.
    """
    runs = by_seed(name)[list(labels)]
    first = runs.mean().idxmax()
    found = differences(runs, first)
    near = found["less"] + student_t.ppf(0.975, len(runs) - 1) * found["less_se"] >= 0
    return found.assign(best=found.index == first, near=near | (found.index == first))


def ranked(table: pd.DataFrame) -> list[str]:
    """Return the settings that need no label of the clients: neither oracles nor methods that learn on them."""
    return [label for label in table.index if not table.loc[label, "oracle"] and label not in OWN_LABELS]


def grid(name: str) -> pd.DataFrame:
    """Return the means of a table whose labels have two parts, with both in the index: the last word, and the rest."""
    table = means(name)
    table.index = pd.MultiIndex.from_tuples([tuple(label.rsplit(" ", 1)) for label in table.index])
    return table
