"""Columns: the figures of a run, which of them tables show, seeds average and wandb logs, and their printed form."""

import numpy as np
import pandas as pd

__all__ = ["AVERAGED", "COLUMNS", "DRAWN_TYPES", "SHARED", "SUMMARY", "cell"]

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


def cell(row: pd.Series, key: str, form: str = "percent") -> str:
    """Return a figure as text, in one of the forms of `COLUMNS`."""
    value = row.get(key)
    if pd.isna(value):
        return "–"
    if form == "number":
        return f"{value:,}"
    if form == "cost":
        return "0" if value == 0 else f"{value:.2g} %" if value < 10 else f"{value:,.0f} %"
    if form == "bytes":
        for unit in ("B", "KiB", "MiB"):
            if value < 1024:
                return f"{value:.0f} {unit}"
            value /= 1024
        return f"{value:.1f} GiB"
    if form == "harm":
        return f"{100 * value:.1f} ({100 * row[f'{key}_by_chance']:.1f})"
    scale, digits, sign = (1, 2, "") if form == "nats" else (100, 1, "+" if form == "gain" else "")
    text = f"{scale * value:{sign}.{digits}f}"
    error, low, high = (row.get(f"{key}_{end}", np.nan) for end in ("se", "low", "high"))
    if pd.notna(error):
        return f"{text} ± {scale * error:.{digits}f}"
    return text if pd.isna(low) else f"{text} [{scale * low:{sign}.{digits}f}, {scale * high:{sign}.{digits}f}]"
