"""The evaluation of a trained run: every client, every length of history, other kinds of clients, examples, plots."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from iciia_exp.artifacts import atomic_write, read_json, write_json
from iciia_exp.config.build import Plan
from iciia_exp.data.batches import FeatureBatches
from iciia_exp.data.clients import Clients
from iciia_exp.data.store import FeatureStore
from iciia_exp.engine.evaluation.attribution import retrieval_table
from iciia_exp.engine.evaluation.drawn_clients import kinds_table
from iciia_exp.engine.evaluation.history import history_table
from iciia_exp.engine.evaluation.row import client_table, result_row
from iciia_exp.engine.training.modules import MethodModule
from iciia_exp.engine.training.progress import fraction_bar
from iciia_exp.engine.training.trainer import interruptible, make_trainer, quiet_lightning
from iciia_exp.errors import UserError
from iciia_exp.results.plots import accuracy_vs_history, accuracy_vs_overhead, gain_per_client, retrieval_examples
from iciia_exp.results.summary import ClientCounts
from iciia_exp.results.tables import history_summary
from iciia_exp.serving.run import Run
from iciia_exp.tasks import answers_per_image

__all__ = ["evaluate"]


def evaluate(
    plan: Plan, store: FeatureStore, clients: Clients, loader: DataLoader[Any], tell: Callable[[dict[str, Any]], None]
) -> None:
    """Evaluate a trained run on every test client; write its tables, its plots and, last, ``results.json``.

    Args:
        plan: of the run.
        store: the features.
        clients: the partition, without images that cannot be read.
        loader: gives the test clients' chunks.
        tell: gets the results' row, before the run counts as finished.
    """
    folder = plan.run_dir
    run = Run.load(folder)
    start, answers = time.monotonic(), answers_per_image(plan.dataset.task, plan.num_classes)
    module = MethodModule(run.method, run.head, plan.protocol.recipe, len(clients), answers)
    with quiet_lightning():
        trainer = make_trainer(plan.config["trainer"], limit_test_batches=None)  # every client, always
        with interruptible(trainer):
            trainer.test(module, loader, verbose=False)
    numbers, counts = module.test_counts.counts()
    _require_numbers(clients, numbers, counts)
    batches = FeatureBatches(store.array(), plan.labels)
    histories = None
    parts = (run.method, run.head, batches, clients, plan.protocol, answers, trainer.strategy.root_device)
    if plan.protocol.history_lengths:
        with fraction_bar("histories") as progress:
            histories = history_table(*parts, progress)
    if plan.protocol.kinds_clients and not run.method.by_client:  # drawn clients are nobody's
        with fraction_bar("kinds of clients") as progress, atomic_write(folder / "kinds.parquet", "wb") as file:
            kinds_table(*parts, progress).to_parquet(file, index=False)
    examples = retrieval_table(
        *(run.method, run.head, batches, clients, plan.protocol.images, plan.retrieval),
        *(list(plan.dataset.shown_names()), plan.dataset.task, plan.dataset.__getitem__, trainer.strategy.root_device),
    )
    seconds = time.monotonic() - start
    table = client_table(clients, numbers, counts, plan.labels)
    training, errors = read_json(folder / "training.json"), module.calibration_errors()
    row = result_row(plan, run.method, store, counts, training, errors, seconds)
    with atomic_write(folder / "clients.parquet", "wb") as file:
        table.to_parquet(file, index=False)
    plots = folder / "plots"
    if histories is not None:
        with atomic_write(folder / "history.parquet", "wb") as file:
            histories.to_parquet(file, index=False)
        summary = history_summary(histories[histories["protocol"] == "stream"])
        accuracy_vs_history(summary, row, plots / "accuracy_vs_history.png")
    if len(examples):
        with atomic_write(folder / "retrieval.parquet", "wb") as file:
            examples.to_parquet(file, index=False)
        retrieval_examples(examples, row, plots / "retrieval.png")
    gain_per_client(table, row, plots / "gain_per_client.png")
    others = [*_siblings(plan, row), row]
    accuracy_vs_overhead(others, plots / "accuracy_vs_overhead.png", row["setting_digest"])
    tell(row)
    write_json(folder / "results.json", row)


def _require_numbers(clients: Clients, numbers: np.ndarray, counts: ClientCounts) -> None:
    """Refuse results that are not numbers, with the name of a client."""
    for who, loss_C in (("features", counts.backbone_loss_C), ("the method's answers", counts.method_loss_C)):
        if len(wrong := np.flatnonzero(~np.isfinite(loss_C))):
            first = clients.ids[numbers[wrong[0]]]
            raise UserError(f"client {first}: {who} are not finite numbers ({len(wrong):,} such clients)")


def _siblings(plan: Plan, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the experiment's other finished runs on the same clients, for comparison in the plot."""
    rows = []
    for path in sorted(plan.run_dir.parent.glob("*/results.json")):
        if path.parent != plan.run_dir:
            try:
                other = read_json(path)
            except (OSError, UserError):
                continue
            if other.get("partition_digest") == row["partition_digest"]:
                rows.append(other)
    return rows
