"""Labels: what names a run in a table or plot, and which runs may stand in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["base_of", "label_of", "varying"]


def base_of(row: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return what a row's backbone accuracy depends on, seeds aside: experiment, dataset, backbone and partition."""
    parts = ("config.dataset.", "config.backbone.", "config.partition.")
    kept = {k: v for k, v in row.items() if k.startswith(parts) and not k.endswith(".seed")}
    return tuple(sorted({"name": row["name"], "backbone": row["backbone"], **kept}.items()))


def varying(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Return, for every method, the settings in which its rows differ.

    Left out are seeds, what a label says anyhow, what only decides which numbers are reported, and of methods without
    training the recipe of one.
    """
    said = ("config.method.num_layers", "config.method.heads", "config.method.groups")
    reported = ("config.protocol.history_", "config.protocol.kinds_")
    training = ("config.protocol.recipe.", "config.protocol.train_images", "config.protocol.shuffle_images")
    found: dict[str, list[str]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        group = [row for row in rows if row["method"] == method]
        keys = sorted({k for row in group for k in row if k.startswith("config.")} - set(said))
        if not any(row.get("epochs") for row in group):
            keys = [key for key in keys if not key.startswith(training)]
        found[method] = [
            key
            for key in keys
            if not key.endswith(".seed")
            and not key.startswith(reported)
            and len({str(row.get(key)) for row in group}) > 1
        ]
    return found


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def label_of(row: dict[str, Any], keys: dict[str, list[str]]) -> str:
    """Return what names a run in a table: method, layers, heads, groups, and what else tells it from others.

    ``keys`` are what `varying` finds.
    """
    letters = (("num_layers", "N"), ("heads", "H"), ("groups", "G"))
    parts = [f"{letter}={row[key]}" for key, letter in letters if row.get(key)]
    parts += [f"{key.rsplit('.', 1)[-1]}={_short(row[key])}" for key in keys.get(row["method"], ()) if key in row]
    return " ".join([row["method"], *["(bound)"] * bool(row.get("bound")), *parts])
