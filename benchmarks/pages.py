"""The pages' tables and pictures, made from the stored figures of `benchmarks/results.py`.

The text between `<!-- results: TABLE PART -->` and `<!-- end -->` in a page is that part of that table (`PARTS`);
between `<!-- value: TABLE SETTING COLUMN -->` and `<!-- end -->` it is one figure of a setting, in percent. The
pictures in `docs/images` are those of `FIGURES`, each with the digest of the figures that it was drawn from. Everything
is made again by `python benchmarks/results.py --write`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy.stats import t as student_t
from settings import OWN_LABELS, TABLES

from iciia_exp.results.columns import COLUMNS, Column, backbone_cell, cell, columns_of
from iciia_exp.results.plots import BASELINE, line_styles, new_panels
from iciia_exp.results.published import published_numbers

DOCS = Path(__file__).resolve().parents[1] / "docs"
STORED = DOCS / "results"

#: Images seen before, by the clients that are shown. Drifting clients change their classes after eight images.
LENGTHS = {
    "partition": ("the partition's", (0, 1, 3, 15)),
    "random_classes": ("2 to 20 random classes", (0, 1, 3, 15)),
    "homogeneous": ("all classes", (0, 1, 3, 15)),
    "drifting": ("other classes after eight", (7, 8, 9, 11, 15)),
}

#: Figures of a run that are stored.
KEYS = (
    *("accuracy", "gain", "worst_decile", "harmed_share", "harmed_share_by_chance", "log_loss", "ece"),
    *("overhead_percent", "streaming_overhead_percent", "state_bytes", "seconds_train", "test_clients", "test_images"),
    *("backbone_accuracy", "backbone_worst_decile", "backbone_log_loss", "backbone_ece", "backbone_macs"),
)

#: Figures that the report's tables do not have.
FURTHER = {
    column.key: column
    for column in (
        Column("client_gain", "gain in mean AUC", "gain"),
        Column("improved_share", "users better", "percent"),
        Column("truth_at_half", "right at half", "percent"),
    )
}

#: Tables of one set of clients each, in which methods are compared.
CLIENTS = {
    "tiny_imagenet": "Tiny-ImageNet by parent",
    "digits": "digits, two classes a client",
    "omniglot_drawer": "Omniglot by drawer",
    "omniglot_alphabet": "Omniglot by alphabet",
    "mnist_writers": "MNIST by writer",
}


# ---- stored figures


def stored(name: str) -> pd.DataFrame:
    """Return a table's stored figures, a line for each run."""
    return pd.read_csv(STORED / f"{name}.csv")


def stored_of(names: Iterable[str]) -> list[str]:
    """Return those of some tables that are stored."""
    return [name for name in names if (STORED / f"{name}.csv").is_file()]


def means(name: str) -> pd.DataFrame:
    """Return means and standard errors over the runs of each setting."""
    runs = stored(name)
    groups = runs.drop(columns="seed").groupby("label", sort=False)
    table = groups.mean(numeric_only=True).join(groups.sem(numeric_only=True).add_suffix("_se"))
    return table.assign(oracle=groups["oracle"].first())


def best_first(name: str) -> pd.DataFrame:
    """Return the means, best accuracy first."""
    return means(name).sort_values("accuracy", ascending=False, kind="stable")


def behind(name: str, labels: Iterable[str]) -> pd.DataFrame:
    """Return the differences of some settings to the best of them, paired over the seeds.

    Columns: mean and standard error, whether it is the best, and whether it is that or its 95 % interval has 0.
    """
    by_seed = stored(name).pivot(index="seed", columns="label", values="accuracy")[list(labels)]
    first = by_seed.mean().idxmax()
    differences = by_seed.sub(by_seed[first], axis=0)
    mean, se, best = differences.mean(), differences.sem(), differences.columns == first
    near = best | (mean + student_t.ppf(0.975, len(by_seed) - 1) * se >= 0)
    return pd.DataFrame({"mean": mean, "se": se, "best": best, "near": near})


def ranked(table: pd.DataFrame) -> list[str]:
    """Return the settings that need no label of the clients: neither oracles nor methods that learn on them."""
    return [label for label in table.index if not table.loc[label, "oracle"] and label not in OWN_LABELS]


# ---- tables


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
    differences = behind(name, ranked(table))
    for label, line in table.iterrows():
        cells = [cell(line, c.key, c.form, () if c.form in ("cost", "bytes", "number") else ("se",)) for c in shown]
        text = ""
        if label in differences.index and not (difference := differences.loc[label])["best"]:
            text = f"{100 * difference['mean']:+.1f} ± {100 * difference['se']:.1f}"
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


def grid(name: str) -> pd.DataFrame:
    """Return the means of a table whose labels have two parts, with both in the index: the last word, and the rest."""
    table = means(name)
    table.index = pd.MultiIndex.from_tuples([tuple(label.rsplit(" ", 1)) for label in table.index])
    return table


def grid_part(name: str) -> list[str]:
    """Return accuracy, gain in brackets: a line for each backbone or partition, a column for each method."""
    table = grid(name)
    methods = table.index.unique(level=1)
    costs = table["backbone_macs"].nunique() > 1
    lines = head("", *["MACs"] * costs, "alone", *(f"`{method}`" for method in methods))
    for label, part in table.groupby(level=0, sort=False):
        cells = []
        for method in methods:
            line = part.loc[(label, method)] if (label, method) in part.index else None
            cells.append("–" if line is None else f"{_percent(line, 'accuracy')} ({_percent(line, 'gain', ())})")
        first = part.iloc[0]
        macs = [cell(first, "backbone_macs", "macs")] * costs
        lines.append(row(str(label), *macs, _percent(first, "backbone_accuracy"), *cells))
    return lines


def differences_to(name: str, reference: str) -> pd.DataFrame:
    """Return mean and standard error of each setting's accuracy less that of another, paired over the seeds."""
    by_seed = stored(name).pivot(index="seed", columns="label", values="accuracy")
    difference = by_seed.sub(by_seed[reference], axis=0)
    return pd.DataFrame({"less": difference.mean(), "less_se": difference.sem()})


def sweep_part(name: str) -> list[str]:
    """Return accuracy: a line for each setting, a column for each value; in brackets less the table's reference."""
    table, reference = grid(name), TABLES[name].reference
    values = table.index.unique(level=1)
    lines = head("", *values)
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
                less = differences_to(name, f"{reference} {value}").loc[f"{label} {value}"]
                cells[-1] += f" ({cell(less, 'less', 'gain')})"
        lines.append(row(setting(name, label), *cells))
    return lines


def columns_part(name: str) -> list[str]:
    """Return accuracy and the table's columns for each setting, with the difference to the reference where one is."""
    table, made = TABLES[name], means(name)
    by_key = {column.key: column for column in columns_of(table.task)} | FURTHER
    shown = [by_key["accuracy"], *(by_key[key] for key in table.columns)]
    lines = head("", *(column.title for column in shown), *[f"less `{table.reference}`"] * bool(table.reference))
    if "backbone_accuracy" in made:
        alone = [backbone_cell(made.iloc[0], column, _errors(column)) for column in shown]
        lines.append(row("the backbone alone", *alone, *[""] * bool(table.reference)))
    for label, line in made.iterrows():
        cells = [cell(line, column.key, column.form, _errors(column)) for column in shown]
        if table.reference:
            less = differences_to(name, table.reference).loc[label]
            cells.append("" if label == table.reference else cell(less, "less", "gain"))
        lines.append(row(setting(name, str(label)), *cells))
    return lines


def setting(name: str, label: str) -> str:
    """Return a setting's label as code; a bound is named one."""
    return "bound: " * (label in TABLES[name].bounds) + named(label)


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
}
BLOCK = re.compile(r"(<!-- results: (\w+) (\w+) -->\n)(.*?)(<!-- end -->)", re.S)
#: A figure within a sentence: in percent the mean of a column of a setting.
VALUE = re.compile(r"(<!-- value: (\w+) (\S+) ([\w ]+) -->)([^<]*)(<!-- end -->)")


def filled(text: str) -> str:
    """Return a page's text with the stored figures in it."""

    def value(found: re.Match[str]) -> str:
        start, name, label, key, _, end = found.groups()
        return f"{start}{100 * means(name).loc[label, key]:.1f}{end}"

    def block(found: re.Match[str]) -> str:
        start, name, part, _, end = found.groups()
        return start + "\n" + "\n".join(PARTS[part](name)) + "\n\n" + end

    return VALUE.sub(value, BLOCK.sub(block, text))


# ---- pictures


def styles_of(methods: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return colour and marker of each method."""
    names = list(methods)
    return dict(zip(names, line_styles(names, names), strict=True))


def history_figure() -> Any:
    """Draw accuracy by images seen before, with the standard error over runs, a panel for each table."""
    names = stored_of(CLIENTS)
    methods = ["client_profile", "client_prior", "iciia", "arm_cml"]
    styles = styles_of(methods)
    lengths = (0, 1, 2, 3, 5, 10, 15)
    figure, panels = new_panels("", 1, len(names))
    for axes, name in zip(np.ravel(panels), names, strict=True):
        table = means(name)
        for method in methods:
            if method not in table.index:
                continue
            line = table.loc[method]
            mean, error = (
                np.array([100 * line[f"partition {n} client_accuracy{end}"] for n in lengths]) for end in ("", "_se")
            )
            axes.plot(range(len(lengths)), mean, label=method, **styles[method])
            axes.fill_between(
                range(len(lengths)), mean - error, mean + error, alpha=0.15, color=styles[method]["color"]
            )
        alone = [100 * table.iloc[0][f"partition {n} backbone_client_accuracy"] for n in lengths]
        axes.plot(range(len(lengths)), alone, label="the backbone alone", color="grey", linestyle=":")
        axes.set_title(CLIENTS[name], fontsize=9)
        axes.set_xticks(range(len(lengths)), list(map(str, lengths)))
        axes.set_xlabel("images seen before")
    np.ravel(panels)[0].set_ylabel("accuracy, mean over clients, %")
    lines = {line.get_label(): line for axes in np.ravel(panels) for line in axes.lines}  # not every panel has all
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines), fontsize=9, frameon=False)
    return figure


def _published(table: str, **setting: Any) -> pd.DataFrame:
    """Return the rows of a published table with a setting."""
    found = published_numbers().query("table == @table and dataset == 'imagenet'")
    for key, value in setting.items():
        found = found[found[key] == value]
    return found


def backbones_figure() -> Any:
    """Draw the gain against the backbone's own accuracy, ours and the published, and accuracy against MACs."""
    table = grid("backbones")
    methods = [m for m in table.index.unique(level=1) if m not in OWN_LABELS]
    styles = styles_of(methods)
    figure, panels = new_panels("", 1, 2, sharex=False)
    figure.set_size_inches(9.4, 3.9)
    gains, costs = np.ravel(panels)
    for method in methods:
        line = table.xs(method, level=1).sort_values("backbone_accuracy")
        gains.errorbar(
            *(100 * line["backbone_accuracy"], 100 * line["gain"], 100 * line["gain_se"]),
            **(styles[method] | {"linestyle": ""}),
            label=method,
        )
    alone = _published("results", method="backbone").set_index("backbone")["accuracy"]
    for label, groups, marker in (("ICIIA-B", 1, "D"), ("ICIIA-T", 256, "v")):
        found = _published("results", method="iciia", groups=groups).set_index("backbone")["accuracy"]
        style = (styles.get(label) or {"color": "grey"}) | {"marker": marker, "linestyle": ""}
        gains.plot(alone[found.index], found - alone[found.index], mfc="none", label=f"{label}, published", **style)
    gains.set_xlabel("the backbone alone, accuracy, %")
    gains.set_ylabel("gain, points")
    gains.legend(fontsize=7.5, frameon=False)
    profile = table.xs("client_profile", level=1)
    for marker, (pixels, part) in zip("os", profile.groupby(profile.index.str.split().str[-1]), strict=False):
        label, macs, style = f", {pixels} px", part["backbone_macs"] / 1e6, {"marker": marker}
        costs.plot(macs, 100 * part["accuracy"], label="client_profile" + label, **(styles["client_profile"] | style))
        costs.plot(macs, 100 * part["backbone_accuracy"], **(BASELINE | style), label="the backbone alone" + label)
    costs.set_xlabel("the backbone, million MACs")
    costs.set_ylabel("accuracy, %")
    costs.legend(fontsize=7.5, frameon=False)
    return figure


def heterogeneity_figure() -> Any:
    """Draw the gain against the share of images that keep their parent category, ours and the published."""
    table = grid("heterogeneity")
    methods = table.index.unique(level=1)
    published = _published("heterogeneity")
    styles = styles_of(methods)
    figure, panels = new_panels("", 1, 2)
    figure.set_size_inches(9.4, 3.9)
    ours, theirs = np.ravel(panels)
    for method in methods:
        line = table.xs(method, level=1)
        ours.errorbar(
            *(line.index.astype(float), 100 * line["gain"], 100 * line["gain_se"]), label=method, **styles[method]
        )
    alone = _published("results", method="backbone", backbone="efficientnet_b4")
    for method, part in published.groupby("method", sort=False):
        style = styles.get(str(method)) or {"color": "grey", "marker": "x"}
        theirs.plot(part["ratio"], part["accuracy"] - alone["accuracy"].item(), label=method, mfc="none", **style)
    for axes, title in ((ours, "here: Tiny-ImageNet, MobileNetV2"), (theirs, "published: ImageNet, EfficientNet-B4")):
        axes.axhline(0, **BASELINE)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("share of images that keep their parent category")
        axes.legend(fontsize=7.5, frameon=False)
    ours.set_ylabel("gain over the backbone, points")
    return figure


#: What is drawn from the stored figures, into docs/images: the function, and the tables.
FIGURES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "client_profile_history": (history_figure, tuple(CLIENTS)),
    "backbones": (backbones_figure, ("backbones",)),
    "heterogeneity": (heterogeneity_figure, ("heterogeneity",)),
}


def fingerprint(name: str) -> str:
    """Return a digest of the tables that a picture shows."""
    shown = stored_of(FIGURES[name][1])
    return hashlib.sha256(b"".join((STORED / f"{table}.csv").read_bytes() for table in shown)).hexdigest()


def is_drawn(name: str) -> bool:
    """Whether a picture shows what is stored now: it has the digest of the tables that it was drawn from."""
    path = DOCS / "images" / f"{name}.png"
    if not path.is_file():
        return False
    with Image.open(path) as image:
        return image.info.get("Description") == fingerprint(name)


def write() -> None:
    """Write the stored figures into all pages."""
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        if (text := filled(page.read_text())) != page.read_text():
            page.write_text(text)
            print(f"written: {page.relative_to(DOCS.parent)}")
    for name, (draw, tables) in FIGURES.items():
        if stored_of(tables) and not is_drawn(name):
            path = DOCS / "images" / f"{name}.png"
            draw().savefig(path, dpi=120, bbox_inches="tight", metadata={"Description": fingerprint(name)})
            print(f"written: {path.relative_to(DOCS.parent)}")
