"""Loggers: CSV always, wandb on request; a failing logger never stops a run.

Names in a wandb run:

- its summary: ``test/accuracy``, ``test/client_accuracy``, ``test/gain``, ``test/client_gain``, ``test/worst_decile``,
  ``test/log_loss``, ``test/harmed_share``, ``backbone/accuracy``, ``backbone/client_accuracy``,
  ``cost/overhead_percent`` (published convention), ``cost/per_image_overhead_percent``,
  ``cost/streaming_overhead_percent``, ``cost/parameters``, and the best ``val/accuracy``;
- curves: ``train/loss``, ``val/accuracy``, ``val/log_loss`` over ``epoch``; ``history/client_accuracy``,
  ``history/worst_decile``, ``history/log_loss`` and the backbone's over ``history/images``;
- the chart ``accuracy_vs_overhead``, a point per run; images ``plots/...``; tables ``clients`` and ``attribution``;
- the artifact ``results-<digest>``: the files that `iciia_exp.report` reads.
"""

import io
import json
import logging
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp.config.settings import Tracking
from iciia_exp.errors import first_line
from iciia_exp.results.columns import SUMMARY
from iciia_exp.results.labels import label_of
from iciia_exp.results.summary import ALL
from iciia_exp.results.tables import averages_by_history, read_table

__all__ = ["METRICS", "Tracker", "in_wandb_sweep"]

log = logging.getLogger(__name__)


#: Largest number of rows of a table in wandb; of more clients evenly spaced ones are logged.
TABLE_ROWS = 10_000


#: Step and summary of each metric.
METRICS: dict[str, dict[str, str]] = {
    "epoch": {},
    "train/*": {"step_metric": "epoch"},
    "val/*": {"step_metric": "epoch"},
    "val/accuracy": {"step_metric": "epoch", "summary": "max"},
    "history/images": {},
    "history/*": {"step_metric": "history/images"},
}


def in_wandb_sweep() -> bool:
    """Whether an agent of ``wandb sweep`` started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


class Tracker:
    """The loggers of one run, opened on first use and closed by `close`.

    A failure inside wandb is reported once and turns wandb off; the run goes on.
    """

    def __init__(
        self, tracking: Tracking, run_dir: Path, *, run_id: str, name: str, group: str, tags: list[str], config: dict
    ) -> None:
        self.tracking, self.run_dir = tracking, run_dir
        self._init: dict[str, Any] = {
            "name": name,
            "group": group,
            "job_type": "train",
            "tags": [*tags, *tracking.tags],
            "config": config,
            "project": tracking.project,
            "entity": tracking.entity,
            "dir": str(run_dir),
        }
        if not in_wandb_sweep():  # an agent of `wandb sweep` has an id from the server
            self._init |= {"id": run_id, "resume": "allow"}
        self._run: Any = None
        self._off = not tracking.wandb

    def _guard(self, what: str, action: Callable[[], Any]) -> Any:
        if self._off:
            return None
        try:
            return action()
        except Exception as error:  # the results are on disk anyway
            self._off = True
            why = f"{type(error).__name__}: {first_line(error)}"
            log.warning("wandb: %s failed (%s); the run goes on without it", what, why)
            return None

    def _start(self) -> Any:
        if self._run is None:
            import wandb

            mode = self.tracking.resolved_mode()
            if mode == "disabled":
                self._off = True
                return None
            settings = wandb.Settings(silent=True, console="off", init_timeout=30)
            try:
                self._run = wandb.init(**self._init, mode=mode, settings=settings)
            except Exception as error:
                if mode != "online":
                    raise
                log.warning("wandb: no connection (%s), logging offline", first_line(error))
                self._run = wandb.init(**self._init, mode="offline", settings=settings)
            for name, options in METRICS.items():
                self._run.define_metric(name, **options)
        return self._run

    def loggers(self) -> list[Any]:
        """Return the Lightning loggers for a training."""
        from lightning.pytorch.loggers import CSVLogger, WandbLogger

        loggers: list[Any] = [CSVLogger(self.run_dir, name="csv")]  # a resumed training gets its next version
        if (run := self._guard("start", self._start)) is not None:

            class Guarded(WandbLogger):
                """Metrics go to wandb through the tracker's guard."""

                def log_metrics(inner, metrics: Any, step: int | None = None) -> None:
                    self._guard("logging", lambda: super(Guarded, inner).log_metrics(metrics, step))

            if (logger := self._guard("start", lambda: Guarded(experiment=run))) is not None:
                loggers.append(logger)
        return loggers

    def results(self, row: dict[str, Any], folder: Path) -> None:
        """Log the results: summary keys, curve by history, chart, plots, tables, and the files as an artifact.

        Args:
            row: of ``results.json``.
            folder: of the evaluation; the rest is read from it.
        """

        def send() -> None:
            if (run := self._start()) is None:
                return
            run.summary.update({key: row[name] for key, name in SUMMARY.items() if row.get(name) is not None})
            for step in _history(folder):
                run.log(step)
            run.log({**_charts(row), **_media(folder)})
            run.log_artifact(_artifact(folder, row))

        self._guard("logging the results", send)

    def close(self, failed: bool = False) -> None:
        """Finish the wandb run, if there is one."""
        if self._run is not None:
            run, self._run = self._run, None
            try:
                run.finish(exit_code=int(failed))
            except Exception as error:
                log.warning("wandb: finishing failed (%s: %s)", type(error).__name__, error)


def _history(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield metrics by length of history (``history/...``, with the step ``history/images``)."""
    if (data := read_table(folder / "history.parquet")) is not None:
        for n, found in averages_by_history(data).iterrows():
            if n != ALL:
                yield {"history/images": n, **{f"history/{name}": float(value) for name, value in found.items()}}


def _charts(row: dict[str, Any]) -> dict[str, Any]:
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


def _media(folder: Path) -> dict[str, Any]:
    """Return the plots, a table with a row per client (at most 10,000), and one with the attribution examples."""
    import wandb

    media: dict[str, Any] = {
        f"plots/{path.stem}": wandb.Image(str(path)) for path in sorted((folder / "plots").glob("*.png"))
    }
    shown = clients = pd.read_parquet(folder / "clients.parquet")
    if len(clients) > TABLE_ROWS:
        log.info("wandb: its table has every %.1fth of %s clients", len(clients) / TABLE_ROWS, f"{len(clients):,}")
        shown = clients.iloc[np.linspace(0, len(clients) - 1, TABLE_ROWS).round().astype(int)]
    rows = shown.to_dict("split")["data"]  # plain values: several times as fast as from a frame
    media["clients"] = wandb.Table(columns=[str(c) for c in clients], data=rows)
    if (examples := read_table(folder / "attribution.parquet")) is not None:
        media["attribution"] = _attribution(examples)
    return media


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


def _artifact(folder: Path, row: dict[str, Any]) -> Any:
    """Return the files that a report reads as the artifact ``results-<digest>``."""
    import wandb

    facts = {key: row.get(key) for key in ("method", "dataset", "backbone", "accuracy", "gain", "overhead_percent")}
    artifact = wandb.Artifact(f"results-{row['digest']}", type="results", metadata=facts)
    with artifact.new_file("results.json") as file:
        json.dump(row, file, indent=2)
    for name in ("clients", "history", "drawn_clients", "attribution"):
        if (path := folder / f"{name}.parquet").is_file():
            artifact.add_file(str(path))
    return artifact
