"""Arguments of Lightning's Trainer that a configuration can give, checked without importing Lightning."""

from collections.abc import Callable
from typing import Any

from iciia_exp.config.settings import PRECISIONS
from iciia_exp.errors import ConfigError

__all__ = ["check_trainer"]

#: Arguments of the Trainer that a configuration cannot give, and why.
_REFUSED = {
    "callbacks": "callbacks are objects of the group callbacks: +callbacks.NAME._target_=...",
    "logger": "loggers are objects of the group logger: logger=csv, +logger.NAME._target_=...",
    "default_root_dir": "everything is written into the run directory (output_dir, name)",
    "gradient_clip_val": "training.recipe.clip_norm and backbone.recipe.clip_norm set it",
    "gradient_clip_algorithm": "gradients are clipped by norm",
    "enable_checkpointing": "an interrupted training resumes from its checkpoint",
    "use_distributed_sampler": "the samplers share the clients out between processes",
    "inference_mode": "evaluation and extraction choose it",
    "limit_test_batches": "every test client is evaluated",
    "limit_predict_batches": "the features of all images are extracted",
    "fast_dev_run": "it leaves out checkpoints and test clients; use trainer=smoke",
    "barebones": "it leaves out checkpoints and loggers",
    "overfit_batches": "the samplers share out the clients; use trainer.limit_train_batches",
    "max_time": "training is timed already; add a Timer: +callbacks.timer._target_=lightning.pytorch.callbacks.Timer",
    "max_steps": "training ends after an epoch, with val images and a checkpoint; use training.recipe.epochs",
}

#: What other arguments must be: a check of the value, and its description.
_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_epochs": (lambda v: v is None or v == -1 or v >= 1, "must be 1 or more, or -1 for those of the recipe"),
    "limit_train_batches": (lambda v: v is None or v > 0, "must be above 0: nothing would be trained"),
    "limit_val_batches": (lambda v: v is None or v > 0, "must be above 0: val images choose the epoch"),
    "accumulate_grad_batches": (lambda v: v >= 1, "must be 1 or more"),
    "precision": (
        lambda v: v is None or str(v) in PRECISIONS,
        "cannot be used: weights are float32; one of 32-true, 16-mixed, bf16-mixed",
    ),
}

#: Strategies by the first part of their name.
_STRATEGIES = ("auto", "ddp")


def check_trainer(config: dict[str, Any]) -> None:
    """Raise a `ConfigError` for an argument of the `trainer` group that cannot be honoured."""
    for key, value in config.items():
        if key in _REFUSED:
            raise ConfigError(f"trainer.{key}", value, f"cannot be used: {_REFUSED[key]}")
        if key in _LIMITS and not _holds(_LIMITS[key][0], value):
            raise ConfigError(f"trainer.{key}", value, _LIMITS[key][1])
    if isinstance(strategy := config.get("strategy", "auto"), str) and strategy.split("_")[0] not in _STRATEGIES:
        raise ConfigError("trainer.strategy", strategy, f"cannot be used; one of {', '.join(_STRATEGIES)}")


def _holds(allowed: Callable[[Any], bool], value: Any) -> bool:
    try:
        return allowed(value)
    except TypeError:  # a text where a number is due
        return False
