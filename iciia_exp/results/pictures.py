"""Pictures of a run's examples: images that count most for an answer, and generated pictures of routed prompts."""

import io
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd

from iciia_exp.results.drawing import ORANGE, new_figure, save

__all__ = ["draw_examples", "draw_routes"]


def draw_examples(examples: pd.DataFrame, row: dict[str, Any], path: Path, each: int = 2) -> Path | None:
    """Draw targets, and beside each the images of its client with most influence, with weight and influence.

    Args:
        examples: the run's ``attribution.parquet``; without pictures nothing is drawn.
        row: the run's results.
        path: the PNG to write.
        each: examples of each case, at most.

    Returns:
        ``path``; None where nothing is drawn.
    """
    from PIL import Image

    targets = examples[examples["rank"] == 0]
    targets = targets[targets["thumbnail"].notna()].groupby("case", sort=False).head(each)
    if targets.empty:
        return None
    columns, rows, step = 1 + int(examples["rank"].max()), len(targets), 1.45
    figure, axes = new_figure(width=1.5 * columns, height=1.82 * rows + 0.75)
    figure.set_layout_engine("none")  # one pair of axes for all pictures: forty pairs take a second to lay out
    axes.set_position((0.01, 0.0, 0.98, 1 - 0.55 / (1.82 * rows + 0.75)))
    text: dict[str, Any] = {"fontsize": 7.5, "ha": "center", "va": "bottom"}
    for line, (_, target) in enumerate(targets.iterrows()):
        images = examples[examples["example"] == target["example"]].sort_values("rank")
        for column, (_, image) in enumerate(images.iterrows()):
            x, y = 1.18 * column, step * line
            if image["thumbnail"] is not None:
                with Image.open(io.BytesIO(image["thumbnail"])) as picture:
                    small, (w, h) = max(picture.size) <= 40, (side / max(picture.size) / 2 for side in picture.size)
                    where = (x + 0.5 - w, x + 0.5 + w, y + 0.5 + h, y + 0.5 - h)
                    axes.imshow(picture, cmap="gray", extent=where, interpolation="nearest" if small else "bilinear")
            if image["rank"]:
                share = f"{100 * image['weight']:.0f} %, " if pd.notna(image["weight"]) else ""
                axes.text(x + 0.5, y - 0.02, f"{_short(image['truth'])}\n{share}{image['influence']:+.2f} nats", **text)
        before, after = (
            f"{_short(target[f'{who}_prediction'])} ({100 * target[f'{who}_confidence']:.0f} %)"
            for who in ("backbone", "method")
        )
        title = f"{target['case']}: {_short(target['truth'])}\n{before} \u2192\n{after}"
        axes.text(0.5, step * line - 0.02, title, **text)
    axes.set(xlim=(-0.08, 1.18 * columns - 0.1), ylim=(step * rows - 0.4, -0.45))
    axes.set_axis_off()
    what = "share of attention, " * bool(examples["weight"].notna().any()) + "influence on the answer"
    title = f"{row['method']} on {row['dataset']}: targets, answer before and after;\n"
    figure.suptitle(f"{title}images of the client that count most ({what})", x=0.01, ha="left", fontsize=10)
    return save(figure, path)


def draw_routes(routes: pd.DataFrame, pictures: Any, row: dict[str, Any], path: Path, each: int = 5) -> Path | None:
    """Draw prompts with the pictures of both models: those that most clearly go to the cloud, and those that stay.

    Args:
        routes: the run's ``routes.parquet``.
        pictures: the stored pictures of all prompts, [M, 2, P, H, W, 3]; None where they were thrown away.
        row: the run's results.
        path: the PNG to write.
        each: prompts of each side, at most.
    """
    if pictures is None:
        return None
    ordered = routes.sort_values("score", kind="stable")
    groups = {"cloud": ordered[ordered["cloud"]].head(each), "device": ordered[~ordered["cloud"]].tail(each).iloc[::-1]}
    columns = [(side, item) for side, part in groups.items() for _, item in part.iterrows()]
    if not columns:
        return None
    wide, high = 1.12 * len(columns) + 0.25, 3.45
    figure, axes = new_figure(width=1.2 * wide, height=1.2 * high + 0.4)
    figure.set_layout_engine("none")
    axes.set_position((0.0, 0.0, 1.0, 1.2 * high / (1.2 * high + 0.4)))
    text: dict[str, Any] = {"fontsize": 6.5, "ha": "center"}
    for place, (side, item) in enumerate(columns):
        x = 1.12 * place
        for number, who in enumerate(("device", "cloud")):
            y = 1.0 + 1.2 * number
            where = (x, x + 1, y + 1, y)
            axes.imshow(pictures[int(item["image"]), number, 0], extent=where, interpolation="nearest")
            if who == side:
                frame = {"color": ORANGE, "linewidth": 2}
                axes.plot([x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y], **frame)
        axes.text(x + 0.5, 0.92, "\n".join(textwrap.wrap(str(item["prompt"]), 19)[:6]), va="bottom", **text)
        scores = f"score {item['score']:.2f}\ntrue {item['superiority']:.2f}"
        axes.text(x + 0.5, 3.27, scores, va="top", **text)
    for number, who in enumerate(("device", "cloud")):
        axes.text(-0.06, 1.5 + 1.2 * number, who, fontsize=8, ha="right", va="center", rotation=90)
    axes.set(xlim=(-0.25, 1.12 * len(columns)), ylim=(3.7, 0.25))
    axes.set_axis_off()
    title = f"{row['method']} on {row['dataset']}: pictures of both models, and who answers (framed)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return save(figure, path)


def _short(text: str, length: int = 22) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"
