"""The pages' pictures, drawn from the stored figures of `benchmarks/results.py`.

Each picture in `docs/images` that is made here (`FIGURES`) has the digest of the figures that it was drawn from.
`python benchmarks/results.py --write` draws them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from pages import CLIENTS
from PIL import Image
from settings import OWN_LABELS, QUANTILES
from stored import DOCS, file, grid, means, stored_of

from iciia_exp.results.calibration import BINS, draw_reliability
from iciia_exp.results.drawing import (
    BASELINE,
    BLUE,
    GREY,
    ORANGE,
    cost_axis,
    legend,
    line_styles,
    new_figure,
    new_panels,
)
from iciia_exp.results.published import published_numbers

ADDED_MACS = "added MACs for 16 images, % of the backbone's for one"


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
    others = cycle(({"color": GREY, "marker": "x"}, {"color": GREY, "marker": "+", "linestyle": "--", "markersize": 8}))
    for method, part in published.groupby("method", sort=False):
        style = styles.get(str(method)) or next(others)
        theirs.plot(part["ratio"], part["accuracy"] - alone["accuracy"].item(), label=method, mfc="none", **style)
    for axes, title in ((ours, "here: Tiny-ImageNet, MobileNetV2"), (theirs, "published: ImageNet, EfficientNet-B4")):
        axes.axhline(0, **BASELINE)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("share of images that keep their parent category")
        axes.legend(fontsize=7.5, frameon=False)
    ours.set_ylabel("gain over the backbone, points")
    return figure


def overhead_figure(name: str) -> Any:
    """Draw accuracy against added MACs of all methods, with the standard error over runs."""
    table = means(name)
    table = table[[" " not in label for label in table.index]].sort_values("accuracy", ascending=False)
    styles = styles_of(label for label in table.index if not table.loc[label, "oracle"])
    figure, axes = new_figure(CLIENTS[name], ADDED_MACS, "accuracy, %")
    base = 100 * table["backbone_accuracy"].mean()
    axes.axhline(base, **BASELINE, label=f"the backbone alone: {base:.1f}")
    for label, line in table.iterrows():
        accuracy = 100 * line["accuracy"]
        if line["oracle"]:
            axes.axhline(accuracy, color=GREY, linestyle=":", label=f"{label} (oracle): {accuracy:.1f}")
            continue
        own = " (own labels)" * (label in OWN_LABELS)
        style = styles[str(label)] | {"linestyle": "none", "capsize": 3, "markersize": 7}
        at = [line["overhead_percent"]], [accuracy], [100 * line["accuracy_se"]]
        axes.errorbar(*at, **style, label=f"{label}{own}: {accuracy:.1f}")
    cost_axis(axes, table["overhead_percent"])
    legend(axes, beside=True)
    return figure


def groups_figure() -> Any:
    """Draw accuracy against added MACs by number of groups, with the standard error over runs."""
    table = means("groups")
    heads, table = table.loc["linear_head"], table.drop(index="linear_head")
    figure, axes = new_figure("", ADDED_MACS, "accuracy, %", height=3.6)
    axes.errorbar(
        table["overhead_percent"], 100 * table["accuracy"], 100 * table["accuracy_se"],
        color=BLUE, marker="o", markersize=6, linewidth=1, capsize=3, label="ICIIA, by number of groups G",
    )  # fmt: skip
    for label, line in table.iterrows():
        text = f"G={str(label).split('=')[1]}"
        at = line["overhead_percent"], 100 * line["accuracy"]
        axes.annotate(text, at, xytext=(8, -11), textcoords="offset points", fontsize=8, color=BLUE)
    plain = {"color": ORANGE, "linestyle": ":", "label": "a new linear head, no overhead"}
    axes.axhline(100 * heads["accuracy"], **plain)
    axes.axhline(100 * table["backbone_accuracy"].mean(), **BASELINE, label="the backbone alone")
    axes.set_xscale("log")
    axes.set_xlim(table["overhead_percent"].min() / 1.5, table["overhead_percent"].max() * 2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(loc="center right", fontsize=8, frameon=False)
    return figure


def clients_figure() -> Any:
    """Draw the gain of the clients in order, and accuracy against confidence, means over runs."""
    table = means("clients")
    styles = styles_of(table.index)
    figure, panels = new_panels("", 1, 2, sharex=False)
    figure.set_size_inches(9.4, 3.9)
    gains, calibration = np.ravel(panels)
    alone = table.iloc[0].to_dict()
    for label, line in table.iterrows():
        mean, error = (np.array([100 * line[f"gain {q}{end}"] for q in QUANTILES]) for end in ("", "_se"))
        style = {"color": styles[str(label)]["color"]}
        gains.plot(QUANTILES, mean, label=label, **style)
        gains.fill_between(QUANTILES, mean - error, mean + error, alpha=0.15, **style)
        _reliability(calibration, line.to_dict(), "method", str(label), styles[str(label)])
    _reliability(
        calibration, alone, "backbone", "the backbone alone", {"color": GREY, "marker": "s", "linestyle": "--"}
    )
    gains.axhline(0, **BASELINE)
    gains.set_xlabel("clients, sorted by gain, %")
    gains.set_ylabel("gain over the backbone, points")
    calibration.plot([0, 100], [0, 100], **BASELINE)
    calibration.set_xlabel("confidence, %")
    calibration.set_ylabel("accuracy, %")
    for axes in (gains, calibration):
        axes.legend(fontsize=8, frameon=False)
    return figure


def _reliability(axes: Any, line: dict[str, float], who: str, label: str, style: dict[str, str]) -> None:
    bins = [b for b in range(BINS) if line.get(f"{who} bin {b} share", 0) >= 0.002]
    x, y, shares = (
        np.array([line[f"{who} bin {b} {key}"] for b in bins]) for key in ("confidence", "accuracy", "share")
    )
    draw_reliability(axes, x, y, shares, label, style)


def layers_figure() -> Any:
    """Draw accuracy by number of groups, a line for each number of layers."""
    table = grid("layers")
    groups = sorted(table.index.unique(level=1), key=int)
    figure, axes = new_figure("digits, two classes a client", "groups", "accuracy, %")
    for number, style in styles_of(table.index.unique(level=0)).items():
        line = table.loc[number].reindex(groups)
        axes.errorbar(range(len(groups)), 100 * line["accuracy"], 100 * line["accuracy_se"], **style, label=number)
    axes.axhline(100 * table["backbone_accuracy"].mean(), **BASELINE, label="the backbone alone")
    axes.set_xticks(range(len(groups)), groups)
    axes.legend(fontsize=8, frameon=False)
    return figure


def rounds_figure(name: str) -> Any:
    """Draw accuracy on all classes against the bytes that a device has sent and received, round by round."""
    table = means(name)
    shown = ("fedavg", "dc_ccl arm=no_control", "dc_ccl", "dc_ccl share_down=0", "dc_ccl payload=int8")
    labels = [label for label in shown if label in table.index]
    figure, axes = new_figure("", "sent to and by a device until then, MiB", "accuracy on all classes, %")
    for label, style in styles_of(labels).items():
        line = table.loc[label]
        numbers = [n for n in range(100) if f"round {n} bytes" in line and pd.notna(line[f"round {n} bytes"])]
        sent, right, error = (
            np.array([line[f"round {n} {key}"] for n in numbers]) for key in ("bytes", "accuracy", "accuracy_se")
        )
        axes.errorbar(sent / 2**20, 100 * right, 100 * error, **style, markersize=4, label=label)
    alone = 100 * table["backbone_accuracy"].mean()
    axes.axhline(alone, **BASELINE, label="the large network alone")
    axes.set_ylim(bottom=alone - 12)  # the small network begins at chance
    legend(axes, beside=True)
    return figure


def tokens_figure() -> Any:
    """Draw accuracy against the bytes of what comes down for an image."""
    parts, methods = means("miet_bytes"), means("miet_tiny_imagenet")
    lines = {
        "linear, last feature": parts[parts.index == "linear, last feature"],
        "linear, sum": parts[parts.index.isin(("linear", "linear, int8"))],
        "attention, sum": parts[parts.index.str.startswith("attention")],
    }
    lines |= {label: methods.loc[[label]] for label in methods.index if not label.startswith(("miet", "linear"))}
    figure, axes = new_figure("", "sent down for an image", "accuracy, %")
    for label, style in styles_of(lines).items():
        line = lines[label].sort_values("request_down_bytes")
        axes.errorbar(
            *(line["request_down_bytes"], 100 * line["accuracy"], 100 * line["accuracy_se"]), **style, label=label
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g} kB")
    legend(axes, beside=True)
    return figure


#: What is drawn from the stored figures, into docs/images: the function, and the tables.
FIGURES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "client_profile_history": (history_figure, tuple(CLIENTS)),
    "backbones": (backbones_figure, ("backbones",)),
    "heterogeneity": (heterogeneity_figure, ("heterogeneity",)),
    "accuracy_vs_overhead": (groups_figure, ("groups",)),
    "clients": (clients_figure, ("clients",)),
    "groups_layers": (layers_figure, ("layers",)),
    "rivals_digits": (partial(overhead_figure, "digits"), ("digits",)),
    "rivals_tiny_imagenet": (partial(overhead_figure, "tiny_imagenet"), ("tiny_imagenet",)),
    "rivals_mnist": (partial(overhead_figure, "mnist_writers"), ("mnist_writers",)),
    "miet_bytes": (tokens_figure, ("miet_bytes", "miet_tiny_imagenet")),
    "dc_ccl_bytes": (partial(rounds_figure, "dc_ccl_tiny_imagenet"), ("dc_ccl_tiny_imagenet",)),
}


def fingerprint(name: str) -> str:
    """Return a digest of the tables that a picture shows."""
    shown = stored_of(FIGURES[name][1])
    return hashlib.sha256(b"".join(file(table).read_bytes() for table in shown)).hexdigest()


def is_drawn(name: str) -> bool:
    """Whether a picture shows what is stored now: it has the digest of the tables that it was drawn from."""
    path = DOCS / "images" / f"{name}.png"
    if not path.is_file():
        return False
    with Image.open(path) as image:
        return image.info.get("Description") == fingerprint(name)


def draw() -> None:
    """Draw the pictures whose figures have changed, once all their tables are stored."""
    for name, (figure, tables) in FIGURES.items():
        if len(stored_of(tables)) == len(tables) and not is_drawn(name):
            path = DOCS / "images" / f"{name}.png"
            figure().savefig(path, dpi=120, bbox_inches="tight", metadata={"Description": fingerprint(name)})
            print(f"written: {path.relative_to(DOCS.parent)}")
