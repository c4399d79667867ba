"""Science: the parts of trainer and backbone weights that can change a number and count in digests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iciia_exp.digest import file_digest
from iciia_exp.errors import ConfigError
from iciia_exp.models.backbones.base import BackboneSpec

__all__ = ["trainer_science", "weights_classes", "weights_digest"]

#: Arguments of Lightning's Trainer that change no number; all others count.
_TRAINER_COSMETIC = frozenset(
    {
        *("accelerator", "devices", "num_nodes", "strategy"),
        *("logger", "callbacks", "default_root_dir", "profiler", "log_every_n_steps", "enable_autolog_hparams"),
        *("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "barebones"),
        *("detect_anomaly", "deterministic", "benchmark", "num_sanity_val_steps", "use_distributed_sampler"),
    }
)


def trainer_science(config: dict[str, Any]) -> dict[str, Any]:
    """Return the trainer's arguments that can change a number."""
    return {k: v for k, v in config.items() if k not in _TRAINER_COSMETIC and not k.startswith("_")}


def weights_classes(spec: BackboneSpec) -> str | list[str] | None:
    """Return the classes of the initial weights: the name of a list, or the digest of a file of names."""
    if not isinstance(spec.classes, str):
        return None if spec.classes is None else list(spec.classes)
    path = Path(spec.classes).expanduser()
    return file_digest(path) if path.is_file() else spec.classes


def weights_digest(spec: BackboneSpec) -> str | None:
    """Return the digest of the backbone's file of initial weights; None without one."""
    if spec.weights is None:
        return None
    path = Path(spec.weights).expanduser()
    if not path.is_file():
        raise ConfigError("backbone.weights", path, "no such file; give a .safetensors, .pt or .pth file")
    return file_digest(path)
