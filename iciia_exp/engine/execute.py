"""Execute: make the missing artifacts of an experiment's stage, and show the results."""

import logging
from contextlib import ExitStack, nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from iciia_exp.artifacts import in_use, read_json
from iciia_exp.data.views import require_own_labels
from iciia_exp.engine.data_check import compared, findings, split_table, unreadable, weights_problem
from iciia_exp.engine.graph import Artifact, NotMade, ensure
from iciia_exp.engine.rounds import check_sites
from iciia_exp.engine.stages import Stages
from iciia_exp.engine.terminal import console, log_file, partition_table, result_table
from iciia_exp.engine.tracking import in_wandb_sweep
from iciia_exp.engine.training.processes import join, leave_group, only_first_logs
from iciia_exp.engine.training.train_method import draw_clients
from iciia_exp.errors import ConfigError, UserError, printable
from iciia_exp.machine import check_started, process_count, process_rank
from iciia_exp.methods.adapt.stream import StreamMethod
from iciia_exp.methods.base import Ask
from iciia_exp.methods.cotrain.base import CoTrained
from iciia_exp.methods.tune.cloud_samples import CloudSamples

__all__ = ["execute"]

log = logging.getLogger(__name__)

#: Kinds of artifacts that a stage makes.
KINDS: dict[str, tuple[str, ...]] = {
    "check": (),
    "backbone": ("backbone", "head"),
    "features": ("features",),
    "train": ("run", "states", "rounds"),
    "evaluate": ("evaluation",),
    "all": ("backbone", "features", "head", "run", "states", "rounds", "evaluation"),
}

_STAGE_OF = {"head": "backbone", "run": "train", "states": "train", "rounds": "train", "evaluation": "evaluate"}


def execute(stages: Stages, brief: bool = False) -> dict[str, Any] | None:
    """Make the missing artifacts of the experiment's stage; return the row of results, or None before evaluation.

    Prints the partition and the result table unless ``brief``.
    """
    stage, run = stages.experiment.stage, stages.run
    parts = [part for part in (run, stages.states, stages.rounds, stages.evaluation) if part is not None]
    if stages.features.finished:
        stages.facts.remember()  # the data as it was last, for runs without its files
        if stages.experiment.extraction.on_bad_image == "error":
            stages.open_store()  # also of a finished run, which may lack images
    if "evaluation" in KINDS[stage] and all(part.finished for part in parts):
        log.info("%s: finished before", _shown(run.folder))
        if in_wandb_sweep() and stages.tracker.wandb:  # the sweep's agent waits for a run
            stages.tracker.results(read_json(stages.evaluation.folder / "results.json"), stages.evaluation.folder)
            stages.tracker.close()
        return _results(stages, brief)
    if process_rank() > 0:  # of several processes that torchrun or srun started
        if not (shared := _shared(stages)):
            log.info("process %d of %d: leaves the work to the first", process_rank(), process_count())
        else:
            log.info("process %d of %d: waits for the first, and takes its part", process_rank(), process_count())
        only_first_logs()
        for goal in shared:
            join(goal)
        leave_group()
        return None
    if stage == "check":
        _check_data(stages)
        return None
    _check(stages)
    in_run = stage in ("train", "evaluate", "all")
    _check_folders(stages, in_run)
    with log_file(run.folder / "run.log") if in_run else nullcontext():
        log.info("%s", _shown(run.folder))
        if not brief:
            console().print(partition_table(stages.clients.statistics(stages.labels)))
        for found in findings(stages, whole=not stages.features.finished):
            log.warning("data: %s", found)
        _make(stages)
    return _results(stages, brief) if "evaluation" in KINDS[stage] else None


def _check_folders(stages: Stages, in_run: bool) -> None:
    """Raise a `ConfigError` before any work if a folder that will be written to cannot be."""
    experiment = stages.experiment
    folders = {"output_dir": experiment.output_dir} if in_run else {}
    if not stages.features.finished:  # finished features may lie in a cache that is read-only
        folders["cache_dir"] = experiment.cache_dir
    for key, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(key, folder, f"{error.strerror}; give a folder that can be written to") from error


def _check_data(stages: Stages) -> None:
    """Print what is in the dataset, and what may be wrong with it and with the configuration."""
    out, found, wrong = console(), list[str](), None
    out.print(split_table(stages))
    out.print()
    try:
        out.print(partition_table(stages.clients.statistics(stages.labels)))
        out.print()
        _check(stages)
        found += findings(stages, whole=True)
    except UserError as error:  # raised below: what is wrong with the images is said all the same
        wrong = error
    bad, decoded = unreadable(stages)
    images = len(stages.table)
    found += bad
    if (problem := weights_problem(stages)) is not None:
        found.append(problem)
    for line in found:
        log.warning("data: %s", line)
    if wrong is not None:
        raise wrong
    if not found:
        notes = [f"{decoded:,} of {images:,} images were decoded"] * (decoded < images)
        if not compared(stages):
            notes.append("images were not compared with each other")
        log.info("data: nothing found that is wrong%s", f" ({'; '.join(notes)})" if notes else "")


def _make(stages: Stages) -> None:
    """Make the missing artifacts of the stage."""
    stage, spec = stages.experiment.stage, stages.experiment.backbone
    if stage in ("all", "backbone") and spec.train == "none":
        log.info("backbone: %s, nothing to train", spec.name)
    failed, shared, read = True, _shared(stages), ExitStack()
    parts = [part for part in (stages.backbone, stages.features, stages.head) if part is not None]
    try:
        for goal in _goals(stages):
            for part in [part for part in parts if part.finished]:
                read.enter_context(in_use(part.folder))
                parts.remove(part)
            if not shared:  # the other processes have ended
                leave_group()
            shared = [other for other in shared if other is not goal]
            try:
                ensure(goal, _kinds(stages))
            except NotMade as error:
                needed = _STAGE_OF.get(error.artifact.kind, error.artifact.kind)
                raise UserError(
                    f"stage={stage}: needs the {needed} stage first ({error.artifact.folder} is not there); "
                    f"repeat the command with stage={needed}, or without stage for all that is missing"
                ) from error
        failed = False
    finally:
        read.close()
        stages.tracker.close(failed)


def _kinds(stages: Stages) -> tuple[str, ...]:
    """Return the kinds of artifacts that may be made; a fitted classifier needs the features as well."""
    stage = stages.experiment.stage
    return (*KINDS[stage], "features") if stage == "backbone" and stages.head is not None else KINDS[stage]


def _goals(stages: Stages) -> list[Any]:
    """Return the artifacts to ensure, in order; those before the last are there for their log lines."""
    stage = stages.experiment.stage
    network = stages.backbone if stage == "backbone" or not stages.features.finished else None
    goals: dict[str, list[Any]] = {
        "backbone": [network, stages.features if stages.head else None, stages.head],
        "features": [stages.features],
        "train": [stages.run, stages.states, stages.rounds],
        "evaluate": [stages.evaluation],
        "all": [
            *(network, stages.features, stages.head, stages.run, stages.states, stages.rounds),
            stages.evaluation,
        ],
    }
    return [goal for goal in goals[stage] if goal is not None]


def _shared(stages: Stages) -> list[Artifact]:
    """Return the unfinished artifacts of the stage that all processes of torchrun or srun make together."""
    kinds = ["features", "states"]
    if process_count() > 1 and stages.processes > 1:
        kinds += ["backbone", "run"] if stages.experiment.method_class.trainable else ["backbone"]
    return [goal for goal in _goals(stages) if goal.kind in kinds and not goal.finished]


def _check(stages: Stages) -> None:
    """Raise errors of method, partition, trainer, callbacks and loggers before the first long computation."""
    from iciia_exp.engine.training.callbacks import configured
    from iciia_exp.engine.training.extract import extraction_trainer
    from iciia_exp.engine.training.trainer import make_trainer, quiet_lightning

    e = stages.experiment
    if e.evaluation.site == "cloud" and (site := e.method_class.site) is not None:
        where = {"device": "on the devices", "cloud": "in the cloud", "both": "by device and cloud"}[site]
        problem = f"has no effect with method={e.method_class.name}, whose requests are served {where}; leave it out"
        raise ConfigError("evaluation.site", e.evaluation.site, problem)
    method = stages.untrained_method()
    if isinstance(method, CoTrained):
        check_sites(stages, method)
    known = e.client_mix.known(stages.clients)
    if Ask.CLIENT_LABELS in e.method_class.asks:
        require_own_labels(known, e.method_class.name)
    if isinstance(method, CloudSamples):
        method.check_clients(known)
    if "clients" in stages.trained_with:
        draw_clients(stages, stages.clients, "train")
    if isinstance(method, StreamMethod):  # it is calibrated on val clients that are drawn like the training clients
        draw_clients(stages, stages.clients, "val")
    configured(e.config["callbacks"])
    stages.tracker.check()
    config = e.config["trainer"]
    check_started("trainer", config.get("devices"), config.get("num_nodes", 1), stages.processes, or_alone=True)
    with quiet_lightning():
        make_trainer(config)
        if not stages.features.finished:
            extraction_trainer(config, e.extraction)


def _shown(path: Path) -> Path:
    """Return ``path`` relative to the working directory where it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _results(stages: Stages, brief: bool) -> dict[str, Any]:
    row = read_json(stages.evaluation.folder / "results.json")
    if brief:
        log.info("accuracy %.1f %%, gain %+.1f points", 100 * row["accuracy"], 100 * row["gain"])
        return row
    out, folder = console(), _shown(stages.evaluation.folder)
    out.print()
    out.print(result_table([row]))
    if row.get("cloud_share") is not None:
        out.print(_share_text(row), soft_wrap=True)
    tested = f"{row['test_clients']:,} test clients, {row['test_images']:,} test images, chunks of {row['images']}"
    out.print(printable(f"{tested}; results and plots in {folder}"), style="dim", soft_wrap=True)
    return row


def _share_text(row: dict[str, Any]) -> str:
    """Return the share of a router's requests in the cloud, in words."""
    cloud, asked, expected, low, high = (
        100 * row[f"{key}_share" if key in ("cloud", "asked", "expected") else f"share_{key}"]
        for key in ("cloud", "asked", "expected", "low", "high")
    )
    stated = f"at most {asked:.0f} % were asked for, {expected:.1f} % expected [{low:.1f}, {high:.1f}]"
    return f"{cloud:.1f} % of the test requests are in the cloud; {stated}"
