"""Labels: what names a run in a table or plot, and which runs may stand in one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["REPORTED", "base_of", "label_of", "unique_rows", "varying"]

#: Settings of an evaluation that decide what is reported beside the main table, and change none of its numbers.
REPORTED = frozenset(
    f"evaluation.{key}"
    for key in (
        *("history_lengths", "history_orders", "history_longest", "history_clients"),
        *("drawn_clients", "examples", "neighbours", "pixels"),
    )
)


def unique_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without repetitions: several evaluations of a run that differ in what they report count once."""
    return list({(row["digest"], row["setting_digest"]): row for row in rows}.values())


def base_of(row: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return what a row's backbone accuracy depends on, seeds aside: experiment, dataset, backbone and partition."""
    parts = ("config.dataset.", "config.backbone.", "config.partition.")
    kept = {k: v for k, v in row.items() if k.startswith(parts) and not k.endswith(".seed")}
    return tuple(sorted({"name": row["name"], "backbone": row["backbone"], **kept}.items()))


def varying(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Return, for every method, the settings in which its rows differ.

    Left out are seeds, what a label says anyhow, and what only decides which numbers are reported.
    """
    of_method = (f"config.method.{part}{key}" for part in ("", "encoder.") for key in ("num_layers", "heads", "groups"))
    left_out = {*of_method, *(f"config.{key}" for key in REPORTED)}
    found: dict[str, list[str]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        group = [row for row in rows if row["method"] == method]
        keys = sorted({k for row in group for k in row if k.startswith("config.")} - left_out)
        found[method] = [
            key for key in keys if not key.endswith(".seed") and len({str(row.get(key)) for row in group}) > 1
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
    return " ".join([row["method"], *["(oracle)"] * bool(row.get("oracle")), *parts])
