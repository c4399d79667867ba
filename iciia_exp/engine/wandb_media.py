"""Results of a run as wandb shows them: curves, charts, plots, tables, and artifacts."""

import io
import json
import logging
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp.artifacts import read_parquet
from iciia_exp.results.labels import label_of
from iciia_exp.results.summary import ALL
from iciia_exp.results.tables import averages_by_history, read_table

__all__ = ["charts", "history", "media", "model_artifact", "results_artifact", "rounds"]

log = logging.getLogger(__name__)

#: Largest number of rows of a table in wandb; of more clients evenly spaced ones are logged.
TABLE_ROWS = 10_000

#: Tables of an evaluation that a report reads.
REPORTED = (
    *("clients", "history", "drawn_clients", "attribution", "calibration", "rounds"),
    *("routes", "shares", "route_examples"),
)


def history(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield metrics by length of history (``history/...``, with the step ``history/images``)."""
    if (data := read_table(folder / "history.parquet")) is not None:
        for n, found in averages_by_history(data).iterrows():
            if n != ALL:
                yield {"history/images": n, **{f"history/{name}": float(value) for name, value in found.items()}}


def rounds(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield metrics by round (``rounds/...``, with the step ``rounds/round``): those of the served answer.

    ``rounds/backbone_accuracy`` is that of the backbone alone.
    """
    if (data := read_table(folder / "rounds.parquet")) is None:
        return
    served = next(name for name in data["answer"] if name != "backbone")
    alone = data.loc[data["answer"] == "backbone", "accuracy"].iloc[0]
    for step in data[data["answer"] == served].drop(columns="answer").to_dict("records"):
        found = {f"rounds/{name}": value for name, value in step.items() if not np.isnan(value)}
        yield found | {"rounds/backbone_accuracy": alone}


def charts(row: dict[str, Any]) -> dict[str, Any]:
    """Return this run's point in the chart of accuracy against overhead."""
    import wandb

    table = wandb.Table(columns=["run", "overhead, %", "accuracy, %"])
    if row["overhead_percent"] is not None:
        table.add_data(label_of(row, {}), row["overhead_percent"], 100 * row["accuracy"])
    return {
        "accuracy_vs_overhead": wandb.plot.scatter(
            table, "overhead, %", "accuracy, %", title="Accuracy against overhead (published convention)"
        )
    }


def media(folder: Path) -> dict[str, Any]:
    """Return the plots, a table with a row per client (at most 10,000), and one with the attribution examples."""
    import wandb

    found: dict[str, Any] = {
        f"plots/{path.stem}": wandb.Image(str(path)) for path in sorted((folder / "plots").glob("*.png"))
    }
    shown = clients = read_parquet(folder / "clients.parquet")
    if len(clients) > TABLE_ROWS:
        log.info("wandb: its table has every %.1fth of %s clients", len(clients) / TABLE_ROWS, f"{len(clients):,}")
        shown = clients.iloc[np.linspace(0, len(clients) - 1, TABLE_ROWS).round().astype(int)]
    rows = shown.to_dict("split")["data"]  # plain values: several times as fast as from a frame
    found["clients"] = wandb.Table(columns=[str(c) for c in clients], data=rows)
    if (examples := read_table(folder / "attribution.parquet")) is not None:
        found["attribution"] = _attribution(examples)
    return found


def _attribution(examples: pd.DataFrame) -> Any:
    """Return a table of examples: target, predictions, and the most influential images of the client."""
    import wandb
    from PIL import Image

    def picture(row: Mapping[Hashable, Any], caption: str) -> Any:
        if row["thumbnail"] is None:
            return caption
        return wandb.Image(Image.open(io.BytesIO(row["thumbnail"])), caption=caption)

    others = int(examples["rank"].max())
    columns = ["case", "client", "truth", "target", "before", "after"]
    table = wandb.Table(columns=[*columns, *(f"image {i}" for i in range(1, others + 1))])
    for _, rows in examples.groupby("example"):
        target, *rest = rows.sort_values("rank").to_dict("records")
        answers = [
            f"{target[f'{who}_prediction']} ({100 * target[f'{who}_confidence']:.0f} %)"
            for who in ("backbone", "method")
        ]
        images = []
        for other in rest:
            share = "" if np.isnan(other["weight"]) else f"{100 * other['weight']:.0f} %, "
            images.append(picture(other, f"{other['truth']}: {share}{other['influence']:+.2f}"))
        images += [None] * (others - len(images))
        known = target["case"], target["client"], target["truth"], picture(target, target["truth"])
        table.add_data(*known, *answers, *images)
    return table


def results_artifact(folder: Path, row: dict[str, Any]) -> Any:
    """Return the files that a report reads as the artifact ``results-<digest>``."""
    import wandb

    facts = {key: row.get(key) for key in ("method", "dataset", "backbone", "accuracy", "gain", "overhead_percent")}
    artifact = wandb.Artifact(f"results-{row['digest']}", type="results", metadata=facts)
    with artifact.new_file("results.json") as file:
        json.dump(row, file, indent=2)
    for name in REPORTED:
        if (path := folder / f"{name}.parquet").is_file():
            artifact.add_file(str(path))
    return artifact


def model_artifact(folder: Path, row: dict[str, Any]) -> Any:
    """Return the trained method, the files of `iciia_exp.serving.run.Run.load`, as the artifact ``model-<digest>``."""
    import wandb

    facts = {key: row.get(key) for key in ("method", "dataset", "backbone", "accuracy", "gain")}
    artifact = wandb.Artifact(f"model-{row['digest']}", type="model", metadata=facts)
    for name in ("run.json", "config.yaml", "weights.safetensors"):
        artifact.add_file(str(folder / name))
    return artifact
