"""Text tables of a report: for the terminal, Markdown, CSV and LaTeX.

Accuracies in percent, costs in percent of the backbone's for one image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from iciia_exp.results.summary import ALL
from iciia_exp.results.tables import history_of

__all__ = ["by_history", "csv", "latex", "markdown", "summary"]

_COLUMNS = (
    *(
        "method",
        "runs",
        "accuracy",
        "published",
        "gain",
        "client accuracy",
        "worst decile",
        "harmed (chance)",
        "log-loss",
        "ECE",
    ),
    *("overhead", "per image", "one more image", "parameters", "kept"),
)


def _value(row: pd.Series, key: str, scale: float = 100.0, digits: int = 1, sign: str = "") -> str:
    if pd.isna(row.get(key)):
        return "–"
    text = f"{scale * row[key]:{sign}.{digits}f}"
    error, low, high = (row.get(f"{key}_{end}", np.nan) for end in ("se", "low", "high"))
    if pd.notna(error):
        return f"{text} ± {scale * error:.{digits}f}"
    return text if pd.isna(low) else f"{text} [{scale * low:{sign}.{digits}f}, {scale * high:{sign}.{digits}f}]"


def _cost(value: float | None) -> str:
    if value is None or pd.isna(value):
        return "–"
    return "0" if value == 0 else f"{value:.2g} %" if value < 10 else f"{value:,.0f} %"


def _size(number: float | None) -> str:
    if number is None or pd.isna(number):
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of settings (`iciia_exp.results.tables.settings`) as text, the backbone first.

    ``*`` marks settings that none of the same cost or less beats. ``kept`` is a client's state, of all but one image of
    a chunk; ``published`` the paper's number for the same setting, where there is one.
    """
    mean = table.mean(numeric_only=True)
    published = table[["published", "published_backbone"]].notna().any(axis=None)
    base = {name: f"{100 * mean[f'backbone_{key}']:.1f}" for name, key in
            (("accuracy", "accuracy"), ("client accuracy", "client_accuracy"), ("worst decile", "worst_decile"),
             ("ECE", "ece")) if pd.notna(mean.get(f"backbone_{key}"))}  # fmt: skip
    costs = dict.fromkeys(("overhead", "per image", "one more image", "parameters", "kept"), "0")
    lines = [{"method": f"{table['backbone'].iloc[0]} alone", **base, "log-loss": f"{mean['backbone_log_loss']:.2f}"}]
    lines[0] |= costs | {"published": _value(table.iloc[0], "published_backbone")}
    for _, row in table[table["method"] != "backbone"].iterrows():
        chance = 100 * row["harmed_share_by_chance"]
        lines.append(
            {
                "method": row["label"] + " *" * bool(row["front"]),
                "runs": str(row["runs"]),
                "accuracy": _value(row, "accuracy"),
                "published": _value(row, "published"),
                "gain": _value(row, "gain", sign="+"),
                "client accuracy": _value(row, "client_accuracy"),
                "worst decile": _value(row, "worst_decile"),
                "harmed (chance)": f"{100 * row['harmed_share']:.1f} ({chance:.1f})",
                "log-loss": _value(row, "log_loss", 1.0, 2),
                "ECE": _value(row, "ece"),
                "overhead": _cost(row["overhead_percent"]),
                "per image": _cost(row["per_image_overhead_percent"]),
                "one more image": _cost(row["streaming_overhead_percent"]),
                "parameters": f"{row['parameters']:,}",
                "kept": _size(row["state_bytes"]),
            }
        )
    columns = [name for name in _COLUMNS if name != "published" or published]
    return pd.DataFrame(lines, columns=columns).fillna("")


def by_history(
    table: pd.DataFrame, file: str = "history.parquet", client_type: str | None = None
) -> pd.DataFrame | None:
    """Return accuracy by images seen before as text, mean over clients; None where no run has it."""
    lines: list[dict[str, str]] = []
    for _, row in table.iterrows():
        found = history_of(row, file, client_type)
        if found is None:
            continue
        if client_type is not None:  # drawn clients all have the same number of images
            found = found.drop(index=ALL)
        for name in ("backbone_client_accuracy", "client_accuracy")[bool(lines) :]:
            label = f"{row['backbone']} alone" if name.startswith("backbone") else row["label"]
            line = {"images before": label}
            line |= {"all" if n == ALL else str(n): _value(values, name) for n, values in found.iterrows()}
            if row["method"] != "backbone" or name.startswith("backbone"):
                lines.append(line)
    return pd.DataFrame(lines).fillna("–") if lines else None


def markdown(table: pd.DataFrame) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(row) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines) + "\n"


def latex(table: pd.DataFrame, caption: str) -> str:
    """Return a LaTeX table for the ``booktabs`` package."""

    def escaped(row: Sequence[str]) -> str:
        text = " & ".join(row)
        for old, new in (("%", r"\%"), ("_", r"\_"), ("±", r"$\pm$"), ("–", "--"), ("*", "$^*$"), ("#", r"\#")):
            text = text.replace(old, new)
        return text + r" \\"

    columns = "l" + "r" * (len(table.columns) - 1)
    body = [escaped(row) for row in table.itertuples(index=False)]
    return "\n".join(
        [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", escaped(list(table.columns)),
         r"\midrule", *body, r"\bottomrule", r"\end{tabular}", rf"\caption{{{escaped([caption])[:-3]}}}",
         r"\end{table}", ""]
    )  # fmt: skip


def csv(table: pd.DataFrame) -> str:
    """Return the settings with all their numbers, unrounded, one row each."""
    return table.drop(columns=["run_dirs"]).to_csv(index=False)
