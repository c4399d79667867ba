"""Columns: the figures of a run, and which of them tables show, seeds average and wandb logs."""

from __future__ import annotations

__all__ = ["AVERAGED", "COLUMNS", "DRAWN_TYPES", "SHARED", "SUMMARY"]

#: Types of the clients in ``drawn_clients.parquet`` (`iciia_exp.engine.evaluation.drawn_clients`).
DRAWN_TYPES = ("random_classes", "homogeneous", "drifting")


#: Columns of the table of settings (`iciia_exp.report.text.summary`): title, key in ``results.json``, and printed form:
#: ``percent``, ``gain`` (percent with a sign), ``nats``, ``harm`` (percent, and the percentage by chance), ``cost``
#: (percent of the backbone's cost), ``number`` or ``bytes``.
COLUMNS = {
    "runs": ("runs", "number"),
    "accuracy": ("accuracy", "percent"),
    "published": ("published", "percent"),
    "gain": ("gain", "gain"),
    "client accuracy": ("client_accuracy", "percent"),
    "worst decile": ("worst_decile", "percent"),
    "harmed (chance)": ("harmed_share", "harm"),
    "log-loss": ("log_loss", "nats"),
    "ECE": ("ece", "percent"),
    "overhead": ("overhead_percent", "cost"),
    "per image": ("per_image_overhead_percent", "cost"),
    "one more image": ("streaming_overhead_percent", "cost"),
    "parameters": ("parameters", "number"),
    "kept": ("state_bytes", "bytes"),
}

#: Figures that are averaged over runs that differ in seeds alone.
AVERAGED = (
    *("accuracy", "gain", "client_accuracy", "worst_decile", "gain_where_backbone_is_worst", "harmed_share"),
    *("harmed_share_by_chance", "log_loss", "ece", "seconds_train"),
    *("backbone_accuracy", "backbone_client_accuracy", "backbone_worst_decile", "backbone_log_loss", "backbone_ece"),
)

#: Values that such runs have in common.
SHARED = (
    *("name", "dataset", "task", "backbone", "method", "oracle", "groups", "heads", "num_layers", "setting_digest"),
    *("overhead_percent", "per_image_overhead_percent", "streaming_overhead_percent", "sequence_macs"),
    *("backbone_macs", "cost_images", "parameters", "state_bytes", "test_clients", "test_images"),
)

_TEST = ("accuracy", "client_accuracy", "gain", "client_gain", "worst_decile", "log_loss", "harmed_share")
_COST = ("overhead_percent", "per_image_overhead_percent", "streaming_overhead_percent", "parameters")

#: Summary of a wandb run: its keys, and the figure of each.
SUMMARY = {
    **{f"test/{key}": key for key in _TEST},
    **{f"backbone/{key}": f"backbone_{key}" for key in ("accuracy", "client_accuracy")},
    **{f"cost/{key}": key for key in _COST},
}
