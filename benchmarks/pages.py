"""The pages' tables, made from the stored figures of `benchmarks/results.py`.

The text between `<!-- results: TABLE PART -->` and `<!-- end -->` in a page is that part of that table (`PARTS`);
between `<!-- value: TABLE SETTING COLUMN -->` and `<!-- end -->` it is one figure of a setting, in percent; a setting
with blanks is in quotes. What a benchmark of speed printed is shown as it is (the part ``output``).
`python benchmarks/results.py --write` makes them again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
from settings import OWN_LABELS, TABLES
from stored import (
    AGREEMENT,
    DOCS,
    KEYS,
    behind,
    best_first,
    by_seed,
    differences,
    grid,
    means,
    output_file,
    ranked,
    stored_of,
)

from iciia_exp.results.columns import COLUMNS, Column, backbone_cell, cell, columns_of
from iciia_exp.tasks import QUALITY

#: Images seen before, by the clients that are shown. Drifting clients change their classes after eight images.
LENGTHS = {
    "partition": ("the partition's", (0, 1, 3, 15)),
    "random_classes": ("2 to 20 random classes", (0, 1, 3, 15)),
    "homogeneous": ("all classes", (0, 1, 3, 15)),
    "drifting": ("other classes after eight", (7, 8, 9, 11, 15)),
}

#: Figures that the report's tables do not have.
FURTHER = {
    column.key: column
    for column in (
        Column("client_gain", "gain in mean AUC", "gain"),
        Column("improved_share", "users better", "percent"),
        Column("truth_at_half", "right at half", "percent"),
    )
}

#: How a device answers that trains together with the cloud: by the two networks that it has.
SMALL = "control + small"

#: Tables of one set of clients each, in which methods are compared.
CLIENTS = {
    "tiny_imagenet": "Tiny-ImageNet by parent",
    "digits": "digits, two classes a client",
    "omniglot_drawer": "Omniglot by drawer",
    "omniglot_alphabet": "Omniglot by alphabet",
    "mnist_writers": "MNIST by writer",
}


def named(label: str, oracle: bool = False) -> str:
    """Return a setting's label as code."""
    return f"`{label}`" + " (oracle)" * oracle


def row(*cells: str) -> str:
    """Return a line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def head(*cells: str) -> list[str]:
    """Return the first two lines of a Markdown table."""
    return [row(*cells), row(*["---"] * len(cells))]


#: Labels of the recommended method with other settings begin with this; they have a table of their own.
VARIANTS = "client_profile "


def main_part(name: str) -> list[str]:
    """Return the table of accuracy and cost; *behind* is the paired difference to the best method."""
    table = best_first(name)
    table = table[~table.index.str.startswith(VARIANTS)]
    shown = [c for c in COLUMNS if c.key in KEYS and c.title]
    lines = head("method", *(c.title for c in shown), "behind the best")
    first = table.iloc[0]
    alone = {key: first[f"backbone_{key}"] for key in ("accuracy", "worst_decile", "log_loss", "ece")}
    cells = [cell(pd.Series(alone), c.key, c.form, ()) if c.key in alone else "" for c in shown]
    lines.append(row("the backbone alone", *cells, ""))
    to_best = behind(name, ranked(table))
    for label, line in table.iterrows():
        cells = [cell(line, c.key, c.form, () if c.form in ("cost", "bytes", "number") else ("se",)) for c in shown]
        text = ""
        if label in to_best.index and not to_best.loc[label, "best"]:
            text = cell(to_best.loc[label], "less", "gain")
        lines.append(row(named(str(label), line["oracle"]), *cells, text))
    return lines


def history_part(name: str, variants: bool = False) -> list[str]:
    """Return the table of accuracy by images seen before, for each type of clients."""
    table = best_first(name)
    chosen = table.index.str.startswith(VARIANTS)
    table = table[chosen | (table.index == VARIANTS.strip())] if variants else table[~chosen]
    lines = head("clients", *(f"{title}: {' / '.join(map(str, ns))}" for title, ns in LENGTHS.values()))

    def texts(line: pd.Series, prefix: str) -> list[str]:
        cells = []
        for clients, (_, lengths) in LENGTHS.items():
            values = [100 * line[f"{clients} {n} {prefix}client_accuracy"] for n in lengths]
            cells.append("–" if np.isnan(values).any() else " / ".join(f"{value:.1f}" for value in values))
        return cells

    adapted = table[table["drifting 15 client_accuracy"].notna()].iloc[0]  # the backbone is the same for all
    lines.append(row("the backbone alone", *texts(adapted, "backbone_")))
    return lines + [row(named(str(k), line["oracle"]), *texts(line, "")) for k, line in table.iterrows()]


def lengths_part(name: str) -> list[str]:
    """Return the table of accuracy by images seen before, with errors, for the partition's clients; -1: all others."""
    table = means(name)
    lengths = [n for n in (0, 1, 2, 3, 5, 10, 15, -1) if f"partition {n} client_accuracy" in table]
    lines = head("images seen before", *("all" if n == -1 else str(n) for n in lengths))
    alone = [_percent(table.iloc[0], f"partition {n} backbone_client_accuracy", ()) for n in lengths]
    lines.append(row("the backbone alone", *alone))
    for label, line in table.iterrows():
        lines.append(row(named(str(label)), *(_percent(line, f"partition {n} client_accuracy") for n in lengths)))
    return lines


def _percent(line: pd.Series, key: str, errors: tuple[str, ...] = ("se",)) -> str:
    return cell(line, key, "gain" if key.endswith("gain") else "percent", errors)


def across_part(_: str) -> list[str]:
    """Return accuracy by method and clients. Bold: the best, and what is within the paired 95 % interval of it."""
    names = stored_of(CLIENTS)
    tables = {name: means(name) for name in names}
    labels = [label for label in dict.fromkeys(k for t in tables.values() for k in t.index) if " " not in label]
    labels = [label for label in labels if sum(label in t.index for t in tables.values()) > 1]
    near = {name: behind(name, ranked(table[table.index.isin(labels)]))["near"] for name, table in tables.items()}
    # by the mean distance to the best, over the tables that have the method
    distance = pd.DataFrame({name: table["accuracy"].max() - table["accuracy"] for name, table in tables.items()})
    lines = head("method", *(CLIENTS[name] for name in names))
    lines.append(row("the backbone alone", *(f"{100 * t['backbone_accuracy'].mean():.1f}" for t in tables.values())))
    for label in distance.loc[labels].mean(axis=1).sort_values(kind="stable").index:
        cells = []
        for name, table in tables.items():
            text = _percent(table.loc[label], "accuracy") if label in table.index else "–"
            cells.append(f"**{text}**" if near[name].get(label, False) else text)
        oracle = any(label in t.index and t.loc[label, "oracle"] for t in tables.values())
        lines.append(row(named(label, oracle) + " (own labels)" * (label in OWN_LABELS), *cells))
    return lines


def varied(name: str, part: int) -> str:
    """Return the key of the values that are a part of all labels, as code, or nothing if they are of no key."""
    if not TABLES[name].settings:  # a script's
        return ""
    label, way = next(iter(TABLES[name].settings.items()))
    value = label.rsplit(" ", 1)[part]
    keys = [word.split("=")[0] for word in way.split() if word.split("=")[-1] == value]
    return f"`{keys[0]}`" if keys else ""


def grid_part(name: str) -> list[str]:
    """Return accuracy, gain in brackets: a line for each backbone or partition, a column for each method."""
    table = grid(name)
    methods = table.index.unique(level=1)
    costs = table["backbone_macs"].nunique() > 1
    lines = head(varied(name, 0), *["MACs"] * costs, "alone", *(f"`{method}`" for method in methods))
    for label, part in table.groupby(level=0, sort=False):
        cells = []
        for method in methods:
            line = part.loc[(label, method)] if (label, method) in part.index else None
            cells.append("–" if line is None else f"{_percent(line, 'accuracy')} ({_percent(line, 'gain', ())})")
        first = part.iloc[0]
        macs = [cell(first, "backbone_macs", "macs")] * costs
        lines.append(row(str(label), *macs, _percent(first, "backbone_accuracy"), *cells))
    return lines


def sweep_part(name: str) -> list[str]:
    """Return accuracy: a line for each setting, a column for each value; in brackets less the table's reference."""
    table, reference = grid(name), TABLES[name].reference
    values = table.index.unique(level=1)
    less = {value: differences(by_seed(name), f"{reference} {value}") for value in values if reference}
    lines = head(varied(name, 1), *values)
    if "backbone_accuracy" in table:
        first = [_percent(table.xs(value, level=1).iloc[0], "backbone_accuracy") for value in values]
        lines.append(row("the backbone alone", *first))
    for label in table.index.unique(level=0):
        cells = []
        for value in values:
            if (label, value) not in table.index:
                cells.append("–")
                continue
            cells.append(_percent(table.loc[(label, value)], "accuracy"))
            if reference and label != reference:
                cells[-1] += f" ({cell(less[value].loc[f'{label} {value}'], 'less', 'gain')})"
        lines.append(row(setting(name, label), *cells))
    return lines


def columns_part(name: str) -> list[str]:
    """Return accuracy and the table's columns for each setting, with the difference to the reference where one is."""
    table, made = TABLES[name], means(name)
    by_key = {column.key: column for column in columns_of(table.task)} | FURTHER
    shown = [by_key["accuracy"], *(by_key[key] for key in table.columns)]
    several = "backbone_accuracy" in made and made["backbone_accuracy"].round(4).nunique() > 1  # each with its own
    alone = "the device alone" if table.task is QUALITY else "the backbone alone"
    titles = [*[alone] * several, *(column.title for column in shown)]
    over_prompts = "rank less" in made
    title = "rank correlation less" if over_prompts else "less"
    lines = head("", *titles, *[f"{title} {setting(name, table.reference)}"] * bool(table.reference))
    if "backbone_accuracy" in made and not several:
        cells = [backbone_cell(made.iloc[0], column, _errors(column)) for column in shown]
        lines.append(row(alone, *cells, *[""] * bool(table.reference)))
    less = differences(by_seed(name), table.reference) if table.reference else None
    for label, line in made.iterrows():
        cells = [backbone_cell(line, shown[0], _errors(shown[0]))] * several
        cells += [cell(line, column.key, column.form, _errors(column)) for column in shown]
        if less is not None:
            text = _rank_difference(line) if over_prompts else cell(less.loc[label], "less", "gain")
            cells.append("" if label == table.reference else text)
        lines.append(row(setting(name, str(label)), *cells))
        if label == table.reference and f"{SMALL} accuracy" in line:
            keys = [f"{SMALL} {column.key}" for column in shown]
            cells = [cell(line, key, "percent") if key in line else "" for key in keys]
            lines.append(row("the same, answered on the device", *cells, ""))
    return lines


def _rank_difference(line: pd.Series) -> str:
    """Return the difference and its 95 % interval over prompts, in points."""
    values = [100 * line[f"rank less{end}"] for end in ("", " low", " high")]
    return "–" if np.isnan(values).any() else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*values)


def setting(name: str, label: str) -> str:
    """Return a setting's label, as code if it says what to type; a bound is named one."""
    return "bound: " * (label in TABLES[name].bounds) + (label if TABLES[name].script else named(label))


def _errors(column: Column) -> tuple[str, ...]:
    return ("se",) if column.form in ("percent", "gain", "nats") else ()


def held_out_part(name: str) -> list[str]:
    """Return accuracy by images seen before, for clients of the training clients' types and of others."""
    table = best_first(name)
    sets = {"training_types": "of the types of training clients", "held_out_types": "of held-out types"}
    lengths = LENGTHS["partition"][1]

    def texts(line: pd.Series, prefix: str) -> list[str]:
        return [" / ".join(f"{100 * line[f'{s} {n} {prefix}client_accuracy']:.1f}" for n in lengths) for s in sets]

    lines = head("", *(f"{title}: {' / '.join(map(str, lengths))}" for title in sets.values()))
    lines.append(row("the backbone alone", *texts(table.iloc[0], "backbone_")))
    return lines + [row(named(str(label)), *texts(line, "")) for label, line in table.iterrows()]


def clients_part(name: str) -> list[str]:
    """Return quantiles over clients of each method's gain."""
    shown = {0: "worst client", 10: "10 %", 25: "25 %", 50: "median", 75: "75 %", 90: "90 %", 100: "best client"}
    lines = head("gain, points", *shown.values(), "harmed (chance)")
    for label, line in means(name).iterrows():
        cells = [cell(line, f"gain {q}", "gain", ("se",)) for q in shown]
        lines.append(row(named(str(label)), *cells, cell(line, "harmed_share", "harm")))
    return lines


def pair_part(name: str) -> list[str]:
    """Return both models' mean quality in each metric, and how it agrees with what is right in the pictures."""
    line = means(name).iloc[0]  # the same pair for all settings
    titles = ("device", "cloud", "difference", "right, device", "right, cloud", "rank correlation (of differences)")
    lines = head("metric", *titles)
    for metric in dict.fromkeys(key.split()[1] for key in line.index if key.startswith("metric ")):
        device, cloud, error = (line[f"metric {metric} {key}"] for key in ("device", "cloud", "error"))
        cells = [f"{device:.3f}", f"{cloud:.3f}", f"{cloud - device:.3f} ± {error:.3f}", "", "", ""]
        if f"metric {metric} agreement" in line:
            cells[3:5] = (f"{100 * line[f'metric {metric} {side} right']:.0f} %" for side in ("device", "cloud"))
            ranks = [line[f"metric {metric} {key}"] for key in AGREEMENT]
            cells[5] = f"{ranks[0]:.2f} ({ranks[1]:.2f})"
        lines.append(row(metric, *cells))
    return lines


def output_part(name: str) -> list[str]:
    """Return what a benchmark printed, below its command."""
    return ["```text", *output_file(name).read_text().splitlines(), "```"]


#: Parts of the tables, by name.
PARTS: dict[str, Callable[[str], list[str]]] = {
    "main": main_part,
    "history": history_part,
    "variants": partial(history_part, variants=True),
    "lengths": lengths_part,
    "across": across_part,
    "grid": grid_part,
    "sweep": sweep_part,
    "columns": columns_part,
    "held_out": held_out_part,
    "clients": clients_part,
    "pair": pair_part,
    "output": output_part,
}
BLOCK = re.compile(r"(<!-- results: (\w+) (\w+) -->\n)(.*?)(<!-- end -->)", re.S)
#: A figure within a sentence: in percent the mean of a column of a setting.
VALUE = re.compile(r"(<!-- value: (\w+) (\"[^\"]+\"|\S+) ([\w ]+) -->)([^<]*)(<!-- end -->)")


def filled(text: str) -> str:
    """Return a page's text with the stored figures in it."""

    def value(found: re.Match[str]) -> str:
        start, name, label, key, _, end = found.groups()
        figure = means(name).loc[label.strip('"'), key]
        return f"{start}{100 * figure:.1f}{end}"

    def block(found: re.Match[str]) -> str:
        start, name, part, _, end = found.groups()
        return start + "\n" + "\n".join(PARTS[part](name)) + "\n\n" + end

    return VALUE.sub(value, BLOCK.sub(block, text))


def fill() -> None:
    """Write the stored figures into all pages."""
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        if (text := filled(page.read_text())) != page.read_text():
            page.write_text(text)
            print(f"written: {page.relative_to(DOCS.parent)}")
