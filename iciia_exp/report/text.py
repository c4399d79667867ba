"""Text tables: settings and histories for the terminal, Markdown, CSV and LaTeX.

Accuracies are in percent, costs in percent of the backbone's cost of one image.
"""

import pandas as pd

from iciia_exp.errors import printable
from iciia_exp.results.columns import backbone_cell, cell, columns_of
from iciia_exp.results.summary import ALL
from iciia_exp.results.tables import backbone_history, backbone_line, cost_images, counted, history_of, unbalanced

__all__ = ["by_history", "csv", "latex", "markdown", "note", "summary"]

_FORMULA = ("=", "+", "-", "@", "\t", "\r")

_LATEX = {"±": r"$\pm$", "–": "--", "*": "$^*$", **{character: f"\\{character}" for character in "%_#&${}"}}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of settings (`iciia_exp.results.tables.settings`) as text, the backbone first.

    ``*`` marks the settings on the Pareto front of cost and accuracy. ``kept`` is a client's state, of all but one
    image of a chunk; ``published`` is the paper's number for the same setting, where there is one. Payloads and MACs by
    site, the backbone's included, are shown where settings differ in them.
    """
    shown = [column for column in columns_of(table["task"].iloc[0]) if column.title]
    if not table[["published", "published_backbone"]].notna().any(axis=None):
        shown = [column for column in shown if column.key != "published"]
    if not table["latency_percent"].notna().any():  # no run was exported
        shown = [column for column in shown if column.key != "latency_percent"]
    shown = [c for c in shown if not c.total or table[c.key].map(str).nunique() > 1]
    alone = backbone_line(table)
    base = {column.title: backbone_cell(alone, column) for column in shown}
    base |= {"runs": str(alone["runs"]), "published": cell(table.iloc[0], "published_backbone")}
    lines = [{"method": f"{table['backbone'].iloc[0]} alone", **base}]
    for _, row in table[table["method"] != "backbone"].iterrows():
        cells = {column.title: cell(row, column.key, column.form) for column in shown}
        lines.append({"method": row["label"] + " *" * bool(row["front"]), **cells})
    return pd.DataFrame(lines, columns=pd.Index(["method", *(column.title for column in shown)]))


def note(table: pd.DataFrame) -> str:
    """Return a line that explains the table of `summary`."""
    clients, images = (counted(table, key) for key in ("test_clients", "test_images"))
    return (
        f"{clients} test clients, {images} test images. Percent; ± standard error over "
        "runs, [95 % interval over clients]. Overhead in multiply-accumulates, of the backbone's for one image: "
        f"{cost_images(table)} images together, each of them, one more where state is kept. Payloads and MACs "
        "by site: of a client, once, and of a request, the backbone's included. * none of the same cost or less "
        f"is better. {unbalanced(table)}".rstrip()
    )


def by_history(table: pd.DataFrame, client_type: str | None = None) -> pd.DataFrame | None:
    """Return accuracy by images seen before as text, mean over clients; None where no run has it.

    ``client_type`` is that of `iciia_exp.results.tables.history_of`.
    """
    alone = f"{table['backbone'].iloc[0]} alone"
    histories = [(alone, "backbone_client_accuracy", backbone_history(table, client_type))]
    for _, row in table[table["method"] != "backbone"].iterrows():
        histories.append((row["label"], "client_accuracy", history_of(row, client_type)))
    lines: list[dict[str, str]] = []
    for label, key, found in histories:
        if found is not None:
            # drawn clients all have the same number of images
            counts = [n for n in found.index if n != ALL or client_type is None]
            cells = {"all" if n == ALL else str(n): cell(found.loc[n], key) for n in counts}
            lines.append({"images before": label, **cells})
    return pd.DataFrame(lines).fillna("–") if lines else None


def markdown(table: pd.DataFrame) -> str:
    """Return a Markdown table, its columns aligned."""
    align = ["left"] + ["right"] * (len(table.columns) - 1)
    plain = table.map(lambda cell: printable(cell, lines=False).replace("|", r"\|"))
    return plain.to_markdown(index=False, disable_numparse=True, colalign=align) + "\n"


def latex(table: pd.DataFrame, caption: str) -> str:
    """Return a LaTeX table for the ``booktabs`` package."""
    escape = str.maketrans(_LATEX)

    def plain(text: str) -> str:
        found = printable(text, lines=False).translate(escape)
        return "{}" + found if found.startswith("[") else found  # after \\ it would be its argument

    escaped = table.map(plain).rename(columns=plain)
    return escaped.style.hide(axis="index").to_latex(
        hrules=True,
        position_float="centering",
        column_format="l" + "r" * (len(table.columns) - 1),
        caption=plain(caption),
    )


def csv(table: pd.DataFrame) -> str:
    """Return the settings with all their numbers, unrounded, one row each.

    A text that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    kept = table.drop(columns=["run_dirs", "partition_digests", *table.filter(like="alone_")])

    def plain(cell: object) -> object:
        return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell

    return kept.map(plain).to_csv(index=False)
