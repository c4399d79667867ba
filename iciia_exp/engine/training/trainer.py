"""Trainer: Lightning's Trainer from the `trainer` group, quiet and interruptible."""

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.io import CheckpointIO

from iciia_exp.config.check import check_keys, class_of
from iciia_exp.config.trainer import check_trainer
from iciia_exp.engine.training.checkpoints import AtomicCheckpoints
from iciia_exp.errors import ConfigError, UserError, first_line

__all__ = ["interruptible", "make_trainer", "on_one_device", "quiet_lightning"]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's messages that a user cannot act on (devices found, tips, few workers)."""
    logger = logging.getLogger("lightning.pytorch")
    fabric = logging.getLogger("lightning.fabric")
    levels = logger.level, fabric.level
    logger.setLevel(logging.ERROR)
    fabric.setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # its report is what the user asked for
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers.*",
                ".*exists and is not empty.*",
                ".*The number of training batches.*is smaller than the logging interval.*",
                ".*Checkpoint directory.*",
                ".*isinstance.treespec, LeafSpec.*",
                ".*GPU available but not used.*",
                ".*tensorboardX.*",
                ".*litlogger.*",
                ".*lr_scheduler.step.*",
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.setLevel(levels[0])
        fabric.setLevel(levels[1])


@contextmanager
def interruptible(trainer: pl.Trainer) -> Iterator[None]:
    """End at once on Ctrl-C and SIGTERM, with a KeyboardInterrupt or exit status 143.

    By itself Lightning ends the process with ``exit(1)`` on Ctrl-C and ignores further signals (issue 13560). After
    SIGTERM it stops at the end of a batch of training, with exit status 0, and in ``predict`` not at all.
    """
    handler = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()  # only there can handlers be set
    if own := main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # a launcher's own handler stays
        signal.signal(signal.SIGTERM, _end)
    try:
        yield
    except SystemExit as ended:
        if (launcher := trainer.strategy.launcher) is not None:  # this process would wait for those that it started
            launcher.kill(signal.SIGKILL)
        if not (trainer.interrupted and ended.code == 1):  # any exception interrupts a trainer
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None
    finally:
        if own:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def make_trainer(config: dict[str, Any], **arguments: Any) -> pl.Trainer:
    """Build the Trainer of the `trainer` group; the engine's ``arguments`` take precedence.

    Raises a `UserError` for arguments that cannot be honoured.
    """
    target = class_of(config, "trainer", pl.Trainer, "Lightning's Trainer or a subclass of it")
    check_keys(config, "trainer")
    check_trainer(config)
    own = {k: v for k, v in config.items() if not k.startswith("_")}
    arguments = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 10,
        "logger": False,
        "enable_checkpointing": False,
        **own,
        "plugins": _plugins(own.get("plugins")),
        "use_distributed_sampler": False,  # our samplers shard by rank
        **arguments,
    }
    try:
        return target(**arguments)
    except Exception as error:  # of many kinds, each with a clear first line
        text = first_line(error)
        for key, value in own.items():
            if key in text or (isinstance(value, str) and value in text):
                raise ConfigError(f"trainer.{key}", value, text) from error
        raise UserError(f"trainer: {text}") from error


def _plugins(given: Any) -> list[Any]:
    """Return the user's plugins, and the writer of checkpoints if they have none."""
    plugins = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    return plugins if any(isinstance(p, CheckpointIO) for p in plugins) else [*plugins, AtomicCheckpoints()]


def on_one_device(config: dict[str, Any]) -> dict[str, Any]:
    """Return the `trainer` group for work that is not shared between processes."""
    return {k: v for k, v in config.items() if k not in ("num_nodes", "strategy")} | {"devices": 1}
