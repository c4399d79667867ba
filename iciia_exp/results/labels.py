"""Labels: the name of a run in a table or plot, and the runs that one table may compare."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["REPORTED", "base_of", "grouped", "label_of", "unique_rows", "varying"]

#: Settings of an evaluation that add tables and plots to a run and change none of its numbers.
REPORTED = {
    *("evaluation.history_lengths", "evaluation.history_orders", "evaluation.history_longest"),
    *("evaluation.history_clients", "evaluation.drawn_clients"),
    *("evaluation.examples", "evaluation.neighbours", "evaluation.pixels"),
}


def grouped(rows: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> dict[Any, list[dict[str, Any]]]:
    """Return the rows by their value of ``key(row)``, values and rows in order of appearance."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def unique_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per run and setting; evaluations of a run that differ in `REPORTED` settings count once."""
    return list({(row["digest"], row["setting_digest"]): row for row in rows}.values())


def base_of(row: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return what the backbone accuracy of a row depends on, without seeds.

    These are the experiment, the dataset, the backbone, its features and the partition.
    """
    parts = ("config.dataset.", "config.backbone.", "config.features.", "config.partition.")
    of_tokens = "config.backbone.model.gather_"  # which the backbone's own classifier does not read
    kept = {
        k: v for k, v in row.items() if k.startswith(parts) and not k.startswith(of_tokens) and not k.endswith(".seed")
    }
    return tuple(sorted({"name": row["name"], "backbone": row["backbone"], **kept}.items()))


def varying(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Return, for every method, the settings in which its rows differ.

    Seeds, layers, heads, groups (a label has them anyway) and `REPORTED` settings are left out.
    """
    reported = {f"config.{key}" for key in REPORTED}
    found: dict[str, list[str]] = {}
    for method, group in grouped(rows, lambda row: row["method"]).items():
        shown = [key for key in ("num_layers", "heads", "groups") if any(row.get(key) for row in group)]
        left_out = reported | {f"config.method.{part}{key}" for part in ("", "encoder.") for key in shown}
        keys = sorted({k for row in group for k in row if k.startswith("config.") and not k.endswith(".seed")})
        found[method] = [k for k in keys if k not in left_out and len({str(row.get(k)) for row in group}) > 1]
    return found


def label_of(row: dict[str, Any], keys: dict[str, list[str]]) -> str:
    """Return the name of a run in a table: method, layers, heads, groups, and the settings that vary.

    Args:
        row: of ``results.json``.
        keys: the settings to show for every method, as `varying` returns them.
    """
    parts = [row["method"]]
    if row.get("oracle"):
        parts.append("(oracle)")
    letters = (("num_layers", "N"), ("heads", "H"), ("groups", "G"))
    parts += [f"{letter}={row[key]}" for key, letter in letters if row.get(key)]
    for key in keys.get(row["method"], ()):
        if key in row:
            value = f"{row[key]:.7g}" if isinstance(row[key], float) else row[key]
            parts.append(f"{key.rsplit('.', 1)[-1]}={value}")
    return " ".join(parts)
