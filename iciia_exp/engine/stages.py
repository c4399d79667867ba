"""The stages of a run: backbone, features, train, evaluate. Each makes its artifact once and finds it afterwards."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.utils.data import DataLoader

from iciia_exp.artifacts import (
    atomic_write,
    finished_folder,
    locked,
    make_folder,
    partial_folder,
    read_json,
    write_json,
)
from iciia_exp.config.build import Plan, build
from iciia_exp.data.batches import ClientBatch, ClientBatchSampler, FeatureBatches, Selection
from iciia_exp.data.clients import Clients
from iciia_exp.data.store import FeatureStore
from iciia_exp.data.views import CloudData
from iciia_exp.engine.terminal import console, partition_table, result_table
from iciia_exp.engine.training.train_backbone import (
    backbone_head,
    fit_head,
    in_epochs,
    load_backbone,
    out_of_fold,
    say_accuracy,
    train_backbone,
)
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.machine import process_rank
from iciia_exp.methods.base import Method
from iciia_exp.seeding import derive_seed, generator
from iciia_exp.serving.run import save_method
from iciia_exp.tasks import answers_per_image

__all__ = ["execute"]

log = logging.getLogger(__name__)


def execute(plan: Plan, brief: bool = False) -> dict[str, Any] | None:
    """Do what ``plan.stage`` asks for and is missing; return the results row once there is one.

    Prints the partition and the result table; ``brief``, as in a sweep, prints neither.
    """
    todo: tuple[str, ...] = ("backbone", "features", "train", "evaluate") if plan.stage == "all" else (plan.stage,)
    if "evaluate" in todo and (plan.run_dir / "results.json").is_file():
        log.info("%s: finished before", _shown(plan.run_dir))
        _tell_sweep(plan)
        return _results(plan, brief)
    from iciia_exp.engine.training.extract import extraction_trainer  # late: a finished run needs no Lightning
    from iciia_exp.engine.training.trainer import make_trainer, quiet_lightning

    if process_rank() > 0:  # one of several processes that torchrun or srun started: they share extraction alone
        if "features" in todo and not finished_folder(plan.features_dir):
            _share_features(plan)
        return None
    # errors in the partition or in the trainer show before the first long computation
    clients = plan.clients
    if plan.method_class.trainable:
        _drawn_clients(plan, clients, "train")
    with quiet_lightning():
        make_trainer(plan.config["trainer"])
        if not finished_folder(plan.features_dir):
            extraction_trainer(plan.config["trainer"], plan.extraction)
    log.info("%s", _shown(plan.run_dir))
    if not brief:
        console().print(partition_table(clients.statistics(plan.labels)))
    train = plan.backbone_spec.train
    if "features" in todo and finished_folder(plan.features_dir) and train != "head":
        todo = tuple(stage for stage in todo if stage != "backbone")  # nobody needs it any more
    if "backbone" in todo and train == "none":
        log.info("backbone: %s, nothing to train", plan.backbone_spec.name)
    if "backbone" in todo and train == "all":
        train_backbone(plan)
    if "features" in todo or ("backbone" in todo and train == "head"):
        ready = train != "all" or finished_folder(plan.backbone_dir) or finished_folder(plan.features_dir)
        _require(ready, plan, "features", "backbone", plan.backbone_dir)
        _features(plan)
    if "backbone" in todo and train == "head":
        fit_head(plan)
    if "train" in todo or "evaluate" in todo:
        stage = "train" if "train" in todo else "evaluate"
        _require(finished_folder(plan.features_dir), plan, stage, "features", plan.features_dir)
        _require(train != "head" or finished_folder(plan.backbone_dir), plan, stage, "backbone", plan.backbone_dir)
        _run(plan, clients, todo)
        if "evaluate" in todo:
            return _results(plan, brief)
    return None


def _require(there: bool, plan: Plan, stage: str, needed: str, path: Path) -> None:
    if not there:
        raise UserError(
            f"stage={stage}: needs the {needed} stage first ({path} is not there); "
            f"repeat the command with stage={needed}, or without stage for all that is missing"
        )


def _shown(path: Path) -> Path:
    """Return ``path`` as the user would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# ---- features


def _features_manifest(plan: Plan, made: dict[str, Any]) -> dict[str, Any]:
    return {
        "digest": plan.features_digest,
        "dataset": type(plan.dataset).name,
        "backbone": plan.backbone_spec.name,
        "backbone_digest": plan.backbone_digest,
        "weights_digest": made.get("weights_digest", plan.weights_digest),
        "backbone_seconds": made.get("seconds"),
    }


def _extract(plan: Plan, folder: Path) -> None:
    from iciia_exp.engine.training.extract import extract

    backbone, made = load_backbone(plan)
    extract(
        plan.dataset,
        plan.dataset.table,
        backbone,
        plan.extraction,
        folder,
        plan.config["trainer"],
        _features_manifest(plan, made),
        with_head=plan.backbone_spec.train != "head",
    )


def _features(plan: Plan) -> None:
    what = f"features of {plan.backbone_spec.name}"
    made = make_folder(plan.features_dir, what, lambda folder: _extract(plan, folder))
    manifest = _open_features(plan).manifest
    if not made:
        bad = len(manifest.get("bad_images", ()))
        log.info("features: made before%s", f", without {bad:,} images that could not be read" if bad else "")
    if "accuracy" in manifest:
        say_accuracy(plan, manifest["accuracy"])


def _open_features(plan: Plan) -> FeatureStore:
    store = FeatureStore.open(plan.features_dir)
    bad = store.manifest.get("bad_images")
    if bad and plan.extraction.on_bad_image == "error":
        what, count = f"{bad[0]['what']}: could not be read ({bad[0]['problem']})", f"one of {len(bad)} such images"
        hint = f"repair them and delete {plan.features_dir}, or leave them out with features.on_bad_image=skip"
        raise UserError(f"{what}, {count}; {hint}" if len(bad) > 1 else f"{what}; {hint}")
    return store


def _share_features(plan: Plan) -> None:
    """Take part in an extraction whose first process holds the lock."""
    if plan.backbone_spec.train == "all" and not finished_folder(plan.backbone_dir):
        raise UserError("features.devices: train the backbone first, with stage=backbone in one process")
    _extract(plan, partial_folder(plan.features_dir))


# ---- train and evaluate


def _loader(
    plan: Plan, store: FeatureStore, clients: Clients, role: str, batch_size: int = 64, **order: Any
) -> DataLoader[Any]:
    train = role == "train"
    batches = FeatureBatches(store.array(), plan.labels, out_of_fold(plan) if train else None)
    images = plan.protocol.train_images if train else plan.protocol.images
    sampler = ClientBatchSampler(clients[role], images, batch_size, **order)
    return DataLoader(batches, batch_size=None, sampler=sampler)


def _run(plan: Plan, clients: Clients, todo: tuple[str, ...]) -> None:
    folder = plan.run_dir
    with locked(folder, f"run {folder.name}"):
        store = _open_features(plan)
        if store.bad.any():
            clients = clients.without(store.bad)
        folder.mkdir(parents=True, exist_ok=True)
        tracker = _tracker(plan)
        failed = True
        try:
            if (folder / "weights.safetensors").is_file():
                log.info("train: %s, made before", folder.name)
            else:
                if "train" not in todo:
                    _require(False, plan, "evaluate", "train", folder / "weights.safetensors")
                _train(plan, store, clients, tracker)
            if "evaluate" in todo and not (folder / "results.json").is_file():
                from iciia_exp.engine.evaluation.evaluate import evaluate

                evaluate(plan, store, clients, _loader(plan, store, clients, "test"), tracker.results)
            failed = False
        finally:
            tracker.close(failed)


def _tracker(plan: Plan) -> Any:
    from iciia_exp.engine.tracking import Tracker

    return Tracker(
        plan.tracking,
        plan.run_dir,
        run_id=plan.run_digest,
        name=plan.run_dir.name,
        group=plan.name,
        tags=[type(plan.dataset).name, plan.backbone_spec.name, plan.method_class.name],
        config={**plan.config, "method": plan.method_config},
    )


def _tell_sweep(plan: Plan) -> None:
    """Send the results of a finished run where an agent of ``wandb sweep`` asks for them: it waits for a run."""
    from iciia_exp.engine.tracking import in_wandb_sweep

    if plan.tracking.wandb and in_wandb_sweep():
        tracker = _tracker(plan)
        tracker.results(read_json(plan.run_dir / "results.json"))
        tracker.close()


def _answers(plan: Plan) -> int:
    return answers_per_image(plan.dataset.task, plan.num_classes)


def _train(plan: Plan, store: FeatureStore, clients: Clients, tracker: Any) -> None:
    folder, protocol = plan.run_dir, plan.protocol
    with atomic_write(folder / "config.yaml") as file:
        yaml.safe_dump(plan.config, file, sort_keys=False)
    clients.save(folder / "partition.parquet")
    statistics = clients.statistics(plan.labels)
    write_json(folder / "partition.json", {row["role"]: row for row in statistics.to_dict("records")})
    head = backbone_head(plan, store)
    torch.manual_seed(derive_seed("method", plan.seed))
    method: Method = build(plan.method_config, "method", head=head)
    method.prepare(plan.dataset.task)
    known = plan.client_mix.known(clients)
    batches = FeatureBatches(store.array(), plan.labels)
    data = CloudData(plan.dataset.task, plan.num_classes, known, batches, protocol.images)
    method.study(data)
    record: dict[str, Any] = {"epochs": 0, "seconds": 0.0}
    if plan.method_class.trainable:
        from iciia_exp.engine.training.fit import fit
        from iciia_exp.engine.training.modules import MethodModule

        module = MethodModule(method, head, protocol.recipe, len(clients), _answers(plan))
        order: dict[str, Any] = {"shuffle": True, "shuffle_images": protocol.shuffle_images, "seed": plan.seed}
        if not plan.client_mix.plain:
            order["draw"] = _drawn_clients(plan, clients, "train")
        record = fit(
            module,
            _loader(plan, store, clients, "train", protocol.recipe.batch_size, **order),
            _loader(plan, store, clients, "selection"),
            seed=plan.seed,
            folder=folder / "checkpoints",
            trainer_config=plan.config["trainer"],
            loggers=tracker.loggers(),
            title=f"{plan.method_class.name}",
        )
        note = f"train: {in_epochs(record['epochs'])} in {record['seconds']:.1f} s"
        if record["best_epoch"]:
            best, when = 100 * record["selection_accuracy"], in_epochs(record["best_epoch"])
            note += f", best selection accuracy {best:.1f} % after {when}"
        log.info(note)
        method.to("cpu").eval().requires_grad_(False)
        selection = _calibration_batches(plan, store, clients)
    else:
        method.eval()
        selection = data.chunks("selection")
    if chosen := method.calibrate(selection):
        record["calibration"] = chosen
    write_json(folder / "training.json", record)
    facts = {
        "task": plan.dataset.task,
        "class_names": list(plan.dataset.class_names),
        "backbone": str(plan.backbone_dir) if plan.backbone_spec.train == "all" else None,
        "backbone_arguments": plan.dataset.backbone_arguments(),
    }
    save_method(folder, method, head, plan.method_config, plan.features_dir, protocol.images, facts)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _drawn_clients(plan: Plan, clients: Clients, role: str) -> tuple[Callable[[np.random.Generator], Selection], int]:
    """Return what draws an epoch's clients from the images of a role, and how many sequences it gives."""
    mix, images = plan.client_mix, plan.protocol.train_images
    try:
        mix.check(plan.labels)
    except ConfigError as error:
        raise ConfigError(f"client_mix.{error.key}", error.value, error.problem) from error
    draw = partial(mix.draw, clients[role], clients.kinds, plan.labels, images)
    return draw, mix.count(clients[role], images)


def _calibration_batches(plan: Plan, store: FeatureStore, clients: Clients, orders: int = 4) -> Iterator[ClientBatch]:
    """Yield batches of selection clients, drawn like the training clients, in several orders."""
    draw, _ = _drawn_clients(plan, clients, "selection")
    batches = FeatureBatches(store.array(), plan.labels)
    for order in range(orders):
        rng = generator("calibration", plan.seed, order)
        index_CS, client_C = draw(rng)
        for some in np.array_split(rng.permutation(len(client_C)), -(-len(client_C) // 64)):
            yield batches[Selection(index_CS[some], client_C[some])]


def _results(plan: Plan, brief: bool) -> dict[str, Any]:
    row = read_json(plan.run_dir / "results.json")
    if brief:
        log.info("accuracy %.1f %%, gain %+.1f points", 100 * row["accuracy"], 100 * row["gain"])
        return row
    out = console()
    out.print()
    out.print(result_table([row]))
    tested = f"{row['test_clients']:,} test clients, {row['test_images']:,} test images, chunks of {row['cost_images']}"
    out.print(f"[dim]{tested}; results and plots in {_shown(plan.run_dir)}[/dim]", soft_wrap=True)
    return row
