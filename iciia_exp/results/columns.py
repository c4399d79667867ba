"""Columns: the figures of a run that tables average over seeds, share, or send to wandb."""

from __future__ import annotations

__all__ = ["AVERAGED", "DRAWN_TYPES", "SHARED", "SUMMARY"]


#: Client types that are drawn for ``drawn_clients.parquet`` (`iciia_exp.engine.evaluation.drawn_clients`).
DRAWN_TYPES = ("random_classes", "homogeneous", "drifting")


#: What is averaged over runs that differ in seeds alone.
AVERAGED = (
    *("accuracy", "gain", "client_accuracy", "worst_decile", "gain_where_backbone_is_worst", "harmed_share"),
    *("harmed_share_by_chance", "log_loss", "ece", "seconds_train"),
    *("backbone_accuracy", "backbone_client_accuracy", "backbone_worst_decile", "backbone_log_loss", "backbone_ece"),
)


#: What is the same in all of them.
SHARED = (
    *("name", "dataset", "task", "backbone", "method", "oracle", "groups", "heads", "num_layers", "setting_digest"),
    *("overhead_percent", "per_image_overhead_percent", "streaming_overhead_percent", "sequence_macs"),
    *("backbone_macs", "cost_images", "parameters", "state_bytes", "test_clients", "test_images"),
)


#: What a wandb run has in its summary, and the column that it comes from.
SUMMARY = {
    "test/accuracy": "accuracy",
    "test/client_accuracy": "client_accuracy",
    "test/gain": "gain",
    "test/client_gain": "client_gain",
    "test/worst_decile": "worst_decile",
    "test/log_loss": "log_loss",
    "test/harmed_share": "harmed_share",
    "backbone/accuracy": "backbone_accuracy",
    "backbone/client_accuracy": "backbone_client_accuracy",
    "cost/overhead_percent": "overhead_percent",
    "cost/per_image_overhead_percent": "per_image_overhead_percent",
    "cost/streaming_overhead_percent": "streaming_overhead_percent",
    "cost/parameters": "parameters",
}
