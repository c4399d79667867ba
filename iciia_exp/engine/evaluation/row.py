"""Result row: ``results.json``, flat, and the table ``clients.parquet``."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp import __version__
from iciia_exp.config.check import science
from iciia_exp.cost import overheads
from iciia_exp.data.clients import Clients
from iciia_exp.data.store import FeatureStore
from iciia_exp.digest import digest
from iciia_exp.engine.inputs import Inputs
from iciia_exp.engine.ledger import cost_row, sizes_of
from iciia_exp.methods.base import Ask, Method
from iciia_exp.methods.tune.base import Personal
from iciia_exp.results.summary import COUNTS, ClientCounts, summarise

__all__ = ["client_table", "git_revision", "group_accuracy", "result_row"]


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
    """Return one row per test client; ``numbers`` are the numbers of the clients in ``counts``.

    ``decisions`` is the number of decisions: images, times attributes in a multi-label task.
    """
    return pd.DataFrame(
        {
            "client": clients.ids[numbers],
            "client_type": clients.types[numbers],
            "images": counts.images_C,
            "decisions": counts.decisions_C,
            "classes": clients.classes_per_client(labels, "test")[numbers],
            **{name: getattr(counts, f"{name}_C") for name in COUNTS if name != "images"},
        }
    )


def group_accuracy(clients: pd.DataFrame) -> float:
    """Return the mean over client types of the mean accuracy of their clients, as VTAB averages its groups of tasks."""
    accuracy = clients["method_correct"] / clients["decisions"]
    return float(accuracy.groupby(clients["client_type"]).mean().mean())


def result_row(
    inputs: Inputs,
    method: Method,
    store: FeatureStore,
    counts: ClientCounts,
    ledger: pd.DataFrame,
    training: dict[str, Any],
    errors: dict[str, float | None],
    seconds: float,
    clients: pd.DataFrame,
) -> dict[str, Any]:
    """Return the row: identity, averages and further ``errors``, costs, seeds, times, versions and every setting.

    ``ledger`` is that of `iciia_exp.engine.ledger.ledger_table`, ``clients`` that of `client_table`.
    """
    e, images = inputs.experiment, inputs.experiment.cost_images
    one_more = method.budget(sizes_of(inputs))
    sequence, streaming = method.budget(sizes_of(inputs, together=True)).method_macs(), one_more.method_macs()
    cost = overheads(sequence, streaming, images, store.macs)
    settings = inputs.settings
    # of the method, or of its encoder; heads of another attention than that among images are an ordinary setting
    attention = {key.rsplit(".", 1)[-1]: value for key, value in settings.items() if key.startswith("method.")}
    if "num_layers" not in attention:
        attention.pop("heads", None)
    seeds = {
        "seed": e.seed if e.method_class.trainable else inputs.method_config.get("seed"),
        "partition_seed": settings.get("partition.seed"),
        "backbone_seed": settings.get("backbone.seed"),
    }
    return {
        "name": e.name,
        "dataset": e.dataset_class.name,
        "task": e.dataset_class.task,
        "backbone": e.backbone.name,
        "method": e.method_class.name,
        "oracle": Ask.TEST_LABELS in e.method_class.asks,
        **{key: attention.get(key) for key in ("groups", "heads", "num_layers")},
        "digest": inputs.run.digest,
        "evaluation_digest": inputs.evaluation.digest,
        # the same for runs that differ in seeds only
        "setting_digest": digest({"name": e.name, "of": inputs.evaluation.setting}),
        "features_digest": inputs.features.digest,
        "partition_digest": digest([inputs.base.digest, science(e.config["partition"])]),
        **seeds,
        **summarise(counts),
        **errors,
        "group_accuracy": group_accuracy(clients) if "group" in inputs.table else None,
        "dim": store.dim,
        "num_classes": store.num_classes,
        "backbone_macs": store.macs,
        "images": e.images,
        "cost_images": images,
        "sequence_macs": sequence,
        "streaming_macs": streaming,
        "overhead_percent": cost["published"],
        "per_image_overhead_percent": cost["per_image"],
        "streaming_overhead_percent": cost["streaming"],
        "state_bytes": one_more.state_bytes,
        "training_bytes": method.training_bytes() if isinstance(method, Personal) else None,
        "site": method.site or e.evaluation.site,
        **cost_row(inputs, method, ledger),
        "parameters": method.num_parameters(),
        "epochs": training.get("epochs"),
        "best_epoch": training.get("best_epoch"),
        "val_accuracy": training.get("val_accuracy"),
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
