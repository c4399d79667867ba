"""Trainer: Lightning's Trainer from the `trainer` group, quiet and interruptible."""

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

from iciia_exp.config.check import check_keys, parameters_of
from iciia_exp.errors import ConfigError, UserError, first_line

__all__ = ["interruptible", "make_trainer", "quiet_lightning"]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's messages that a user cannot act on (devices found, tips, few workers)."""
    logger = logging.getLogger("lightning.pytorch")
    fabric = logging.getLogger("lightning.fabric")
    levels = logger.level, fabric.level
    logger.setLevel(logging.ERROR)
    fabric.setLevel(logging.ERROR)
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
    """Raise KeyboardInterrupt on Ctrl-C: Lightning ends the process with ``exit(1)`` and ignores further signals."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
    if trainer.interrupted:
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt


def make_trainer(config: dict[str, Any], sharded: bool = False, **arguments: Any) -> pl.Trainer:
    """Build Lightning's Trainer from the `trainer` group; the engine's ``arguments`` take precedence.

    ``sharded`` allows more than one process.
    """
    check_keys(config, "trainer")
    own = {k: v for k, v in config.items() if not k.startswith("_")}
    if taken := sorted(set(own) & {"callbacks", "logger", "default_root_dir", "gradient_clip_val", "inference_mode"}):
        raise UserError(f"trainer.{taken[0]}: is set by the engine; leave it out")
    known = parameters_of(pl.Trainer)
    arguments = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # our samplers shard by rank
        "log_every_n_steps": 10,
        "logger": False,
        "enable_checkpointing": False,
        **own,
        **arguments,
    }
    arguments = {k: v for k, v in arguments.items() if k in known}
    try:
        trainer = pl.Trainer(**arguments)
    except Exception as error:  # of many kinds, each with a clear first line
        text = first_line(error)
        for key, value in own.items():
            if key in text or (isinstance(value, str) and value in text):
                raise ConfigError(f"trainer.{key}", value, text) from error
        raise UserError(f"trainer: {text}") from error
    if trainer.world_size > 1 and not sharded:
        # a method trains on stored features, in minutes; and the stages' locks are per process
        problem = "only extraction is shared out, with features.devices; use one job per device for the rest"
        raise ConfigError("trainer.devices", own.get("devices"), problem)
    return trainer
