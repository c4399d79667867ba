"""Evaluation of a run: every test client, every length of history, drawn clients, examples, plots."""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lightning.pytorch.callbacks import Checkpoint

from iciia_exp.artifacts import atomic_write, read_json, write_json
from iciia_exp.data.clients import Clients
from iciia_exp.engine.evaluation.attribution import attribution_table
from iciia_exp.engine.evaluation.drawn_clients import drawn_clients_table
from iciia_exp.engine.evaluation.history import Setup, history_table
from iciia_exp.engine.evaluation.rounds import rounds_table
from iciia_exp.engine.evaluation.route_examples import route_examples
from iciia_exp.engine.evaluation.routes import route_counts, route_measures, routed_figures, routes_table
from iciia_exp.engine.evaluation.row import client_table, result_row
from iciia_exp.engine.inputs import Inputs
from iciia_exp.engine.ledger import ledger_table
from iciia_exp.engine.terminal import fraction_bar
from iciia_exp.engine.training.callbacks import configured
from iciia_exp.engine.training.data_module import ClientDataModule
from iciia_exp.engine.training.modules import MethodModule
from iciia_exp.engine.training.trainer import interruptible, make_trainer, on_one_device, quiet_lightning
from iciia_exp.errors import UserError
from iciia_exp.methods.route.base import PromptRouter, Routed
from iciia_exp.results.calibration import calibration_table, reliability_diagram
from iciia_exp.results.pictures import draw_examples, draw_routes
from iciia_exp.results.plots import (
    accuracy_vs_history,
    accuracy_vs_overhead,
    accuracy_vs_rounds,
    gain_per_client,
    quality_vs_share,
)
from iciia_exp.results.summary import ClientCounts
from iciia_exp.results.tables import history_summary
from iciia_exp.serving.run import Run
from iciia_exp.tasks import CLICK

__all__ = ["evaluate"]


def evaluate(inputs: Inputs, folder: Path) -> None:
    """Evaluate a run on every test client; write its tables, its plots and, last, ``results.json``."""
    e, start = inputs.experiment, time.monotonic()
    shutil.rmtree(folder / "plots", ignore_errors=True)  # of an attempt that was killed
    run = inputs.load_run(inputs.run.folder)
    store = inputs.open_store()
    clients = inputs.readable_clients(store)
    batches = inputs.batches(store)
    if isinstance(run.method, PromptRouter):
        _evaluate_routes(inputs, run, clients, folder, start)
        return
    module = MethodModule(run.method, run.head, e.training.recipe, len(clients), inputs.unseen_classes)
    data = ClientDataModule(clients, batches, e.images, loading=e.training.loading)
    callbacks = [c for c in configured(e.config["callbacks"]).values() if not isinstance(c, Checkpoint)]
    with quiet_lightning():
        exact = on_one_device(e.config["trainer"]) | {"precision": "32-true"}  # as in serving
        trainer = make_trainer(exact, callbacks=callbacks)
        with interruptible(trainer):
            trainer.test(module, data, verbose=False)
    numbers, counts = module.test_counts.counts()
    _require_finite(clients, numbers, counts)
    table = client_table(clients, numbers, counts, inputs.labels)
    setup = Setup(run.method, run.head, batches, clients, trainer.strategy.root_device)
    histories = None
    ranked = run.method.task == CLICK  # all items of a client together: there are no targets one by one
    if e.evaluation.history_lengths and not ranked:
        with fraction_bar("histories") as progress:
            histories = history_table(setup, e.evaluation, progress)
    if e.evaluation.drawn_clients and not ranked and not run.method.asks:  # nobody can tell it of drawn clients
        with fraction_bar("drawn clients") as progress:
            _write(folder, "drawn_clients", drawn_clients_table(setup, e.evaluation, e.images, progress))
    examples = pd.DataFrame()
    if not ranked:
        examples = attribution_table(setup, e.evaluation, e.images, inputs.facts.shown_names, inputs.image)
    curve = None
    if inputs.rounds is not None:
        with fraction_bar("rounds") as progress:
            curve = rounds_table(setup, inputs.rounds.folder, inputs.unseen_classes or (), e.images, progress)
        _write(folder, "rounds", curve)
    routed = routed_figures(setup, run.method, e.images) if isinstance(run.method, Routed) else {}
    seconds = time.monotonic() - start
    training = read_json(inputs.run.folder / "training.json")
    errors = module.calibration_errors() | module.class_accuracies() | routed
    ledger = ledger_table(inputs, run.method, cloud_share=routed.get("cloud_share"))
    row = result_row(inputs, run.method, store, counts, ledger, training, errors, seconds, table)
    _write(folder, "clients", table)
    _write(folder, "ledger", ledger)
    plots = folder / "plots"
    if not ranked:
        calibration = calibration_table(module.confidences())
        _write(folder, "calibration", calibration)
        reliability_diagram(calibration, row, plots / "calibration.png")
    if curve is not None:
        accuracy_vs_rounds(curve, row, plots / "accuracy_vs_rounds.png")
    if histories is not None:
        _write(folder, "history", histories)
        summary = history_summary(histories[histories["protocol"] == "stream"])
        accuracy_vs_history(summary, row, plots / "accuracy_vs_history.png")
    if len(examples):
        _write(folder, "attribution", examples)
        draw_examples(examples, row, plots / "attribution.png")
    gain_per_client(table, row, plots / "gain_per_client.png")
    accuracy_vs_overhead([row], plots / "accuracy_vs_overhead.png")
    inputs.tracker.results(row, folder)
    write_json(folder / "results.json", row)


def _evaluate_routes(inputs: Inputs, run: Run, clients: Clients, folder: Path, start: float) -> None:
    """Evaluate a router of prompts."""
    store, method, options = inputs.open_store(), run.method, inputs.experiment.evaluation
    assert isinstance(method, PromptRouter)
    stored = {name: store.array(name) for name in ("pictures", "truth") if name in store.manifest["arrays"]}
    routes = routes_table(method, clients, inputs.batches(store), inputs.experiment.images, stored.get("truth"))
    numbers, counts = route_counts(routes)
    figures, curve = route_measures(method, routes)
    table = client_table(clients, numbers, counts, inputs.labels)
    training = read_json(inputs.run.folder / "training.json")
    ledger = ledger_table(inputs, method, routes)
    row = result_row(inputs, method, store, counts, ledger, training, figures, time.monotonic() - start, table)
    for name, found in (("clients", table), ("ledger", ledger), ("routes", routes), ("shares", curve)):
        _write(folder, name, found)
    plots = folder / "plots"
    quality_vs_share(curve, row, plots / "quality_vs_share.png")
    draw_routes(routes, stored.get("pictures"), row, plots / "routes.png")
    if options.examples:
        examples = route_examples(run, routes, stored.get("pictures"), options.examples, options.pixels)
        _write(folder, "route_examples", examples)
    inputs.tracker.results(row, folder)
    write_json(folder / "results.json", row)


def _write(folder: Path, name: str, table: pd.DataFrame) -> None:
    with atomic_write(folder / f"{name}.parquet", "wb") as file:
        table.to_parquet(file, index=False)


def _require_finite(clients: Clients, numbers: np.ndarray, counts: ClientCounts) -> None:
    """Refuse results that are not finite, with the name of a client."""
    losses: dict[str, Any] = {"features": counts.backbone_loss_C, "the method's logits": counts.method_loss_C}
    for who, loss_C in losses.items():
        if len(wrong := np.flatnonzero(~np.isfinite(loss_C))):
            first = clients.ids[numbers[wrong[0]]]
            raise UserError(f"client {first}: {who} are not finite numbers ({len(wrong):,} such clients)")
