"""Jobs: run one Hydra configuration from the command line, a sweep or Python."""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from iciia_exp.engine.terminal import setup_logging
from iciia_exp.errors import ConfigError, NotApplicable, UserError, first_line
from iciia_exp.machine import end_with_parent
from iciia_exp.output import os_error

if TYPE_CHECKING:
    from iciia_exp.engine.stages import Stages
    from iciia_exp.engine.training.data_module import ClientDataModule
    from iciia_exp.serving.run import Run

__all__ = ["client_data", "composed", "run_experiment", "run_job", "take_failure"]

log = logging.getLogger(__name__)

_failure: UserError | None = None


def take_failure() -> UserError | None:
    """Return the `UserError` of this process's last job outside a sweep, and forget it."""
    global _failure
    failure, _failure = _failure, None
    return failure


def run_job(config: DictConfig) -> float | None:
    """Run one configuration and return its val accuracy (for hyper-parameter search), if it has one.

    Outside a sweep a `UserError` is kept for `take_failure`, because Hydra would print more than one line. In a sweep
    every error is recorded and logged, and the other jobs go on; a method that cannot run on these clients is left out.
    """
    global _failure
    setup_logging()
    hydra = HydraConfig.get()
    overrides: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    if hydra.mode != RunMode.MULTIRUN:
        try:
            row = _execute(config, overrides)[1]
        except UserError as error:
            _failure = error
            return None
        return row["val_accuracy"] if row else None

    from iciia_exp.engine.sweeps import record_job

    if multiprocessing.current_process().name.startswith("Loky"):  # a worker of joblib
        end_with_parent()
    folder, number = Path(hydra.sweep.dir).resolve(), int(hydra.job.num)
    log.info("\njob %s: %s", number, " ".join(overrides) or "no overrides")
    start = time.monotonic()
    outcome: dict[str, Any] = {"status": "failed", "evaluation_dir": None, "error": "interrupted"}
    row = None
    try:
        stages, row = _execute(config, overrides, brief=True)
        outcome = {"status": "done", "evaluation_dir": str(stages.evaluation.folder), "error": None}
    except NotApplicable as error:
        outcome |= {"status": "left out", "error": str(error)}
        log.warning("left out: %s", error)
    except Exception as error:
        text = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        outcome |= {"error": first_line(text), "traceback": traceback.format_exc()}
        log.error("%s", outcome["error"])
    finally:
        record_job(folder, number, overrides, {**outcome, "seconds": round(time.monotonic() - start, 2)})
    return row["val_accuracy"] if row else None


def run_experiment(*overrides: str, config_dir: str | Path | None = None) -> Run:
    """Run ``python -m iciia_exp OVERRIDES`` from Python, and return the finished run.

    >>> run = run_experiment("method=iciia", "groups=16")  # doctest: +SKIP

    Args:
        overrides: as on the command line, one value each. Finished artifacts are not made again.
        config_dir: a folder with options of your own, as ``--config-dir``.

    Raises:
        UserError: names a wrong override and a right one.
    """
    config = composed(overrides, config_dir)
    if config.stage not in ("all", "evaluate"):
        raise UserError(f"stage={config.stage}: gives no finished run; leave stage out, or use the command line")
    stages, _ = _execute(config, overrides)
    return stages.load_run(stages.evaluation.folder)


def client_data(*overrides: str, config_dir: str | Path | None = None) -> ClientDataModule:
    """Return the client batches of an experiment as a Lightning data module, for a Trainer and modules of your own.

    >>> data = client_data("dataset=digits", "partition=dirichlet")  # doctest: +SKIP
    >>> lightning.Trainer(max_epochs=5).fit(MyModule(), data)        # doctest: +SKIP

    Features that are missing are extracted first. Batches are those of the experiment's training: chunks of
    ``training.images`` images, ``training.recipe.batch_size`` clients at a time.

    Args:
        overrides: as on the command line, one value each.
        config_dir: a folder with options of your own, as ``--config-dir``.

    Raises:
        UserError: names a wrong override and a right one.
    """
    from iciia_exp.engine.training.train_method import data_of

    for stage in ("backbone", "features"):
        stages, _ = _execute(composed((*overrides, f"stage={stage}"), config_dir), overrides, brief=True)
    store, recipe = stages.open_store(), stages.experiment.training.recipe
    return data_of(stages, stages.readable_clients(store), stages.batches(store), recipe)


def composed(overrides: Sequence[str], config_dir: str | Path | None = None) -> DictConfig:
    """Compose the configuration; raises a `UserError` for wrong overrides."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from iciia_exp.config.hydra_errors import check_choices, check_hidden, explain, of_yaml
    from iciia_exp.config.paths import CONF_DIR

    if wrong := [override for override in overrides if not isinstance(override, str)]:
        problem = "overrides are texts, one by one, as on the command line"
        raise UserError(f"{wrong[0]!r}: {problem}: run_experiment('groups=16'), or run_experiment(*overrides)")
    if options := [override for override in overrides if override.startswith("-")]:
        hint = "config_dir=FOLDER" if options[0].startswith("--config-dir") else "overrides alone, as 'groups=16'"
        raise UserError(f"{options[0]}: is an option of the command line; give run_experiment {hint}")
    own = []
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError("config_dir", config_dir, "no such folder; it has the layout of conf/")
        check_hidden(Path(config_dir))
        own = [f"hydra.searchpath=[{json.dumps(f'file://{Path(config_dir).resolve()}', ensure_ascii=False)}]"]
    check_choices(overrides)
    setup_logging()
    outer = GlobalHydra.instance().hydra  # of a program of the user's that itself runs in @hydra.main
    GlobalHydra.instance().hydra = None
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return compose("config", overrides=[*own, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, overrides)) from error
    except yaml.YAMLError as error:
        raise UserError(of_yaml(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer


def _execute(config: DictConfig, overrides: Sequence[str], brief: bool = False) -> tuple[Stages, dict[str, Any] | None]:
    from iciia_exp.config.build import no_memory
    from iciia_exp.config.experiment import Experiment
    from iciia_exp.engine.execute import execute
    from iciia_exp.engine.stages import Stages

    experiment = Experiment.from_config(config, overrides)
    try:
        stages = Stages(experiment)
        return stages, execute(stages, brief)
    except OSError as error:  # a folder that cannot be written, a full disk
        raise UserError(os_error(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not no_memory(error):
            raise
        hint = "choose smaller sizes (training.images, training.recipe.batch_size, evaluation.history_longest)"
        raise UserError(f"memory is full ({first_line(error)}); {hint}") from error
