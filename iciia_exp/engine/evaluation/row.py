"""The flat row of a run (``results.json``) and its table of clients (``clients.parquet``)."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp import __version__
from iciia_exp.config.build import Plan, science
from iciia_exp.cost import overheads
from iciia_exp.data.clients import Clients
from iciia_exp.data.store import FeatureStore
from iciia_exp.digest import digest
from iciia_exp.methods.base import Method
from iciia_exp.results.summary import ClientCounts, summarise

__all__ = ["client_table", "flatten", "git_revision", "result_row"]


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level with dotted names; lists become text.

    >>> flatten({"a": {"b": 1}, "c": [1, 2]})
    {'a.b': 1, 'c': '1,2'}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + str(key)] = ",".join(map(str, value)) if isinstance(value, list) else value
    return flat


def git_revision() -> str | None:
    """Return the revision of the checkout that the package runs from, ``-dirty`` if it was changed; else None."""
    package = Path(__file__).resolve().parents[3]
    if not (package / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def client_table(clients: Clients, numbers: np.ndarray, counts: ClientCounts, labels: np.ndarray) -> pd.DataFrame:
    """Return one row per test client; ``numbers`` are the clients that ``counts`` speaks of.

    ``answers`` is what hits are out of: images, times attributes of a multi-label task.
    """
    return pd.DataFrame(
        {
            "client": clients.ids[numbers],
            "kind": clients.kinds[numbers],
            "images": counts.images_C,
            "answers": counts.answers_C,
            "classes": clients.classes_per_client(labels, "test")[numbers],
            "backbone_hits": counts.backbone_hits_C,
            "method_hits": counts.method_hits_C,
            "both_hits": counts.both_hits_C,
            "backbone_loss": counts.backbone_loss_C,
            "method_loss": counts.method_loss_C,
        }
    )


def _settings(plan: Plan) -> dict[str, Any]:
    """Return every setting that can change a number, flat, with dotted names."""
    groups = {g: science(plan.config[g]) for g in ("dataset", "backbone", "partition", "protocol")}
    if not plan.client_mix.plain and plan.method_class.trainable:
        groups["client_mix"] = science(plan.config["client_mix"])
    elif plan.client_mix.unseen_kinds:
        groups["client_mix"] = {"unseen_kinds": plan.client_mix.unseen_kinds}
    settings = flatten(groups | {"method": science(plan.method_config)})
    return {k: v for k, v in settings.items() if not k.endswith("_target_")}


def result_row(
    plan: Plan,
    method: Method,
    store: FeatureStore,
    counts: ClientCounts,
    training: dict[str, Any],
    errors: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    """Return the row: identity, averages, calibration ``errors``, costs, seeds, times, versions and every setting."""
    images = plan.protocol.cost_images
    sequence, streaming = method.macs(images), method.streaming_macs(images)
    cost = overheads(sequence, streaming, images, store.macs)
    settings = _settings(plan)
    trainable = plan.method_class.trainable
    seeds = {
        "seed": plan.seed if trainable else None,
        "partition_seed": settings.get("partition.seed"),
        "backbone_seed": settings.get("backbone.seed"),
    }
    seedless = {k: v for k, v in settings.items() if not k.endswith(".seed")}
    setting = {
        "name": plan.name,
        "method": plan.method_class.name,
        "settings": seedless,
        "trainer": plan.config["trainer"].get("precision"),
    }
    return {
        "name": plan.name,
        "dataset": type(plan.dataset).name,
        "task": plan.dataset.task,
        "backbone": plan.backbone_spec.name,
        "method": plan.method_class.name,
        "bound": plan.method_class.bound,
        "groups": plan.method_config.get("groups"),
        "heads": plan.method_config.get("heads"),
        "num_layers": plan.method_config.get("num_layers"),
        "digest": plan.run_digest,
        "setting_digest": digest(setting),  # the same for runs that differ in seeds only
        "features_digest": plan.features_digest,
        "partition_digest": digest([plan.base_digest, science(plan.config["partition"])]),
        **seeds,
        **summarise(counts),
        **errors,
        "dim": store.dim,
        "num_classes": store.num_classes,
        "backbone_macs": store.macs,
        "cost_images": images,
        "sequence_macs": sequence,
        "streaming_macs": streaming,
        "overhead_percent": cost["published"],
        "per_image_overhead_percent": cost["per_image"],
        "streaming_overhead_percent": cost["streaming"],
        "state_bytes": method.state_bytes(images - 1),
        "parameters": method.num_parameters(),
        "epochs": training.get("epochs"),
        "best_epoch": training.get("best_epoch"),
        "selection_accuracy": training.get("selection_accuracy"),
        "seconds_backbone": store.manifest.get("backbone_seconds"),
        "seconds_features": store.manifest.get("seconds"),
        "seconds_train": training.get("seconds"),
        "seconds_evaluate": round(seconds, 2),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "iciia_exp": __version__,
        "git_revision": git_revision(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning", "timm", "numpy")},
        **{f"config.{key}": value for key, value in settings.items()},
    }
