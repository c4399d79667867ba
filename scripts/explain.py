"""Draw how the images of a client change an answer, from the examples of a finished run: docs/images/adaptation.png.

python scripts/explain.py outputs/digits/iciia-... [--example 0] [--out docs/images/adaptation.png]
"""

import argparse
import io
from pathlib import Path

import matplotlib.image
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

INK, BLUE, ORANGE, GREY = "#222222", "#1f5fa8", "#b8631a", "#777777"


def draw_picture(axes, picture, x, y, size, colour=None):
    """Draw the bytes of an image with a frame."""
    pixels = matplotlib.image.imread(io.BytesIO(picture))
    axes.imshow(pixels, cmap="gray", extent=(x, x + size, y, y + size), interpolation="nearest", zorder=2)
    axes.add_patch(
        Rectangle((x, y), size, size, fill=False, edgecolor=colour or "#bbbbbb", linewidth=2 if colour else 0.8)
    )


def arrow(axes, start, end, width, colour, bend=0.0):
    """Draw an arrow."""
    style = f"Simple,tail_width={width},head_width={width + 4},head_length=5"
    axes.add_patch(
        FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle=style, color=colour, linewidth=0)
    )


def draw(rows, path, shown=5):
    """Draw an example: ``rows`` of attribution.parquet, the target first, then others by attention."""
    target, others = rows.iloc[0], rows.iloc[1 : shown + 1]
    figure = Figure(figsize=(9, 3.4), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 9), ylim=(0, 3.4))
    axes.set_axis_off()
    axes.text(0.3, 3.08, "the client's other images, without labels", color=INK, fontsize=10)
    for place, (_, other) in enumerate(others.iterrows()):
        x, y = 0.3 + 0.85 * place, 2.2
        draw_picture(axes, other["thumbnail"], x, y, 0.72)
        axes.text(x + 0.36, y - 0.17, f"{100 * other['weight']:.0f} %", ha="center", fontsize=7.5, color=BLUE)
    axes.text(0.3, 1.78, "share of the attention", color=BLUE, fontsize=8)
    axes.text(0.3, 1.3, "one image to recognise", color=INK, fontsize=10)
    draw_picture(axes, target["thumbnail"], 0.3, 0.25, 0.85, INK)
    for x, y, wide, high, text, colour in (
        (1.9, 0.3, 1.5, 0.75, "frozen\nbackbone", GREY),
        (5.2, 1.95, 1.75, 0.85, "attention among the\nclient's images", BLUE),
    ):
        axes.add_patch(Rectangle((x, y), wide, high, facecolor="white", edgecolor=colour, linewidth=1.5, zorder=3))
        axes.text(x + wide / 2, y + high / 2, text, ha="center", va="center", fontsize=9.5, color=colour, zorder=4)
    arrow(axes, (1.2, 0.68), (1.85, 0.68), 1.5, GREY)
    arrow(axes, (3.45, 0.68), (7.15, 0.68), 1.5, GREY)
    arrow(axes, (4.55, 2.45), (5.15, 2.4), 3, BLUE)
    arrow(axes, (4.3, 0.74), (6.0, 1.9), 1.5, BLUE, 0.25)
    arrow(axes, (7.0, 2.37), (7.2, 2.37), 1.5, BLUE)
    for y, who, name in ((0.68, "backbone", "alone"), (2.37, "method", "with the client's images")):
        right = target[f"{who}_prediction"] == target["truth"]
        answer = f"{target[f'{who}_prediction']} ({100 * target[f'{who}_confidence']:.0f} %)"
        axes.text(7.3, y + 0.22, name, fontsize=8.5, color=GREY, va="center")
        axes.text(7.3, y - 0.1, answer, fontsize=14, color=BLUE if right else ORANGE, va="center", weight="bold")
    axes.text(7.3, 1.5, f"it is a {target['truth']}", fontsize=9, color=INK, va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main():
    """Draw an example of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--example", type=int, default=0, help="number among the corrected ones")
    parser.add_argument("--out", type=Path, default=Path("docs/images/adaptation.png"))
    options = parser.parse_args()
    (path,) = sorted(options.run.glob("evaluation-*/attribution.parquet"))[:1]
    table = pd.read_parquet(path)
    corrected = table[table["case"] == "corrected"]
    number = sorted(corrected["example"].unique())[options.example]
    draw(corrected[corrected["example"] == number].sort_values("rank"), options.out)


if __name__ == "__main__":
    main()
