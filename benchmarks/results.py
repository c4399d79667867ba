"""The tables of the documents: run what is missing, store the figures, write them into the pages.

    python benchmarks/results.py --list
    python benchmarks/results.py digits
    python benchmarks/results.py omniglot_drawer --data FOLDER
    python benchmarks/results.py mnist_writers --data mnist_writers.npz
    python benchmarks/results.py tiny_imagenet --data FOLDER --weights FOLDER --parents FILE
    python benchmarks/results.py --write

A table is a list of settings, each run with three seeds by the package's own command line, which skips what is
finished. Its figures are stored in `docs/results/TABLE.csv`, a line for each run. The pages' tables and pictures are
made from them (`pages.py`), which a test checks; `--write` makes them again without running anything.

Data: Omniglot as images_background_small1.zip and ..._small2.zip; MNIST as arrays `images` [M, 28, 28] uint8, `labels`,
`writers`, `is_test`, which are written in LEAF's form first; Tiny-ImageNet in ImageNet's layout with a table of parent
categories. Weights: for ImageNet-1K under timm's names, of mobilenetv2_100, tf_efficientnet_lite0 and
tf_efficientnet_lite2, in files that begin with these names; all trained with mean and standard deviation 0.5.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pages import KEYS, OWN_LABELS, STORED, write

from iciia_exp.results.columns import DRAWN_TYPES
from iciia_exp.results.tables import averages_by_history

SEEDS = (0, 1, 2)

STREAMING = "training=streaming client_mix=all_types"

POOLED = "training=streaming client_mix.pool=client_type"

#: Methods that are compared everywhere, as overrides; the recommended one first.
METHODS = {
    name: f"method={name}"
    for name in (
        *("client_profile", "iciia_prior", "iciia_stream", "iciia", "arm_cml", "context_token", "feedforward"),
        *("linear_head", "conv_across_images", "client_types", "client_prior", "prior_em", "prior_map"),
        *("smoothed_prior", "lame", "t3a", "stata", "oracle_classes"),
    )
}
METHODS |= {name: f"{METHODS[name]} {STREAMING}" for name in ("iciia_prior", "iciia_stream")}
#: The recommended method without client vector, without changes, and with more; and `iciia_prior` on the partition.
PARTS_OF_PROFILE = {
    "client_profile vector=0": "method=client_profile method.vector=0",
    "client_profile change=0": "method=client_profile method.change=0",
    "client_profile change=0.05": "method=client_profile method.change=0.05",
    "iciia_prior natural": "method=iciia_prior training=streaming",
}
TUNED = {name: f"method={name}" for name in OWN_LABELS}


class Table(NamedTuple):
    """A table of the documents.

    Attributes:
        page: the page with its main part.
        minutes: duration on two CPU cores, roughly.
        common: overrides of every run; ``{data}`` and ``{parents}`` are the options of those names, ``{weights:NAME}``
            is the file of a model's weights.
        settings: overrides of each setting, by its label.
    """

    page: str
    minutes: int
    common: str
    settings: dict[str, str]


ALL_SEEDS = "partition.seed={seed} backbone.seed={seed} seed={seed}"
TINY = (
    "+experiment=mobilenetv2_tiny_imagenet data_dir={data} dataset.parents={parents} backbone.train=head "
    "backbone.model.mean=[0.5,0.5,0.5] backbone.model.std=[0.5,0.5,0.5] partition.seed={seed} seed={seed} "
    "name=tiny_imagenet"
)
#: The same with the classifier of the weights, as in the paper.
TINY_OWN = TINY.replace(" backbone.train=head", "")
MOBILENET = "backbone.weights={weights:mobilenetv2_100} backbone.model.options={{pad_type:same}}"
LITE = (
    "backbone.name=efficientnet_lite{n} backbone.model.model=tf_efficientnet_lite{n} "
    "backbone.weights={{weights:tf_efficientnet_lite{n}}}"
)
BACKBONES = {"MobileNetV2": MOBILENET, "EfficientNet-lite0": LITE.format(n=0), "EfficientNet-lite2": LITE.format(n=2)}
#: The paper's two sizes, ICIIA-B and ICIIA-T, and others, behind each backbone.
SIZES = {
    "client_profile": "method=client_profile",
    "ICIIA-B": "method=iciia num_layers=3 groups=1",
    "ICIIA-T": "method=iciia num_layers=3 groups=256",
    "client_types": "method=client_types",
    **TUNED,
}
OMNIGLOT = f"+experiment=omniglot data_dir={{data}} {ALL_SEEDS} dataset.seed={{seed}}"

TABLES = {
    "digits": Table("rivals.md", 40, f"name=digits groups=16 {ALL_SEEDS}", METHODS | PARTS_OF_PROFILE),
    "groups": Table(
        "results.md",
        30,
        f"name=digits {ALL_SEEDS}",
        {"linear_head": "method=linear_head"}
        | {f"iciia groups={groups}": f"method=iciia groups={groups}" for groups in (512, 64, 16, 4, 1)},
    ),
    "own_classifier": Table(
        "results.md",
        40,
        f"{TINY_OWN} {MOBILENET} num_layers=1 groups=256",
        {label: f"method={label}" for label in ("linear_head", "iciia", "client_types", "client_profile")},
    ),
    "omniglot_drawer": Table("rivals.md", 20, f"{OMNIGLOT} name=omniglot_drawer", METHODS | PARTS_OF_PROFILE),
    "omniglot_alphabet": Table(
        "rivals.md",
        20,
        f"{OMNIGLOT} name=omniglot_alphabet partition=parent_category",
        METHODS | PARTS_OF_PROFILE,
    ),
    "mnist_writers": Table(
        "rivals.md",
        90,
        "+experiment=cnn_femnist data_dir={data} dataset.num_classes=10 backbone.reserve=0.1 backbone.recipe.epochs=10 "
        f"training=default training.recipe.epochs=10 groups=256 name=mnist_writers {ALL_SEEDS}",
        METHODS,
    ),
    "tiny_imagenet": Table("rivals.md", 120, f"{TINY} {MOBILENET} num_layers=2 groups=256", METHODS | TUNED),
    "streams": Table(
        "streams.md",
        180,
        f"{TINY.replace('name=tiny_imagenet', 'name=tiny_streams')} {MOBILENET} num_layers=2 groups=256",
        {
            "iciia, training=published": "method=iciia training=published",
            "iciia": "method=iciia",
            "iciia, causal": f"method=iciia method.attention=causal {POOLED}",
            "iciia_stream, perceptron=0": f"method=iciia_stream method.image.perceptron=0 {POOLED}",
            "iciia_stream, client_mix=all_types": f"method=iciia_stream {STREAMING}",
            "iciia_prior": f"method=iciia_prior {POOLED}",
            "iciia_prior, client_mix=all_types": f"method=iciia_prior {STREAMING}",
            "iciia_prior, client_mix=all_types, iid_bonus=0": "method=iciia_prior method.prior.iid_bonus=0 "
            + STREAMING,
            "client_prior": "method=client_prior",
            "client_prior, iid_bonus=0": "method=client_prior method.prior.iid_bonus=0",
        },
    ),
    "backbones": Table(
        "results.md",
        400,
        TINY,
        {
            f"{name} {pixels} {label}": f"{backbone} backbone.model.image_size={pixels} {way}"
            for name, backbone in BACKBONES.items()
            for pixels in (128, 224)
            for label, way in SIZES.items()
        },
    ),
    "heterogeneity": Table(
        "results.md",
        200,
        f"{TINY_OWN} {MOBILENET} partition=reserve_ratio num_layers=2 groups=256",
        {
            f"{ratio} {label}": f"partition.ratio={ratio} method={label}"
            for ratio in (0, 0.25, 0.5, 0.75, 1)
            for label in ("client_profile", "client_types", "iciia", *OWN_LABELS)
        },
    ),
}


# ---- running


def write_leaf(arrays: Path, folder: Path) -> None:
    """Write arrays as LEAF's JSON, split by user; ink is dark, as in FEMNIST."""
    data = np.load(arrays)
    for split, chosen in (("train", ~data["is_test"].astype(bool)), ("test", data["is_test"].astype(bool))):
        users, counts, content = [], [], {}
        images, labels, writers = (data[k][chosen] for k in ("images", "labels", "writers"))
        for writer in np.unique(writers):
            own = np.flatnonzero(writers == writer)
            pixels = np.round((255 - images[own].reshape(len(own), -1)) / 255, 6)
            users.append(f"f{writer:04d}")
            counts.append(len(own))
            content[users[-1]] = {"x": pixels.tolist(), "y": labels[own].tolist()}
        (folder / split).mkdir(parents=True, exist_ok=True)
        partial = folder / split / "all_data.partial"
        partial.write_text(json.dumps({"users": users, "num_samples": counts, "user_data": content}))
        partial.rename(folder / split / "all_data.json")


class Weights:
    """Files of weights in a folder, as ``{weights:NAME}`` in a format."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def __format__(self, name: str) -> str:
        assert self.folder is not None
        found = sorted(path for path in self.folder.iterdir() if path.name.startswith(name))
        if not found:
            raise SystemExit(f"--weights {self.folder}: no file there begins with {name}")
        return str(found[0])


def overrides(name: str, label: str, seed: int, options: argparse.Namespace) -> list[str]:
    """Return the overrides of a run."""
    table = TABLES[name]
    given = {"data": options.data, "parents": options.parents, "weights": Weights(options.weights), "seed": seed}
    return [
        *(text.format(**given) for text in f"{table.common} {table.settings[label]}".split()),
        *("evaluation.drawn_clients=500", "logger=csv", f"output_dir={options.out}"),
    ]


def result_of(arguments: list[str]) -> dict[str, Any]:
    """Run an experiment, if it is not finished, and return its results with their folder."""
    print("$ python -m iciia_exp", shlex.join(arguments), flush=True)
    command = [sys.executable, "-m", "iciia_exp", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the run failed (code {done.returncode}); the same command goes on here when it is repeated")
    lines = done.stdout.splitlines()
    (last,) = (line.rsplit(" in ", 1)[1] for line in lines if "results and plots in" in line)
    return json.loads((Path(last) / "results.json").read_text()) | {"folder": Path(last)}


def line_of(label: str, seed: int, row: dict[str, Any]) -> dict[str, Any]:
    """Return what is stored of a run."""
    line = {"label": label, "seed": seed, "oracle": row["oracle"]} | {key: row.get(key) for key in KEYS}
    tables = {"partition": "history.parquet"} | dict.fromkeys(DRAWN_TYPES, "drawn_clients.parquet")
    for clients, file in tables.items():
        if not (row["folder"] / file).is_file():  # nobody can tell the method of drawn clients
            continue
        data = pd.read_parquet(row["folder"] / file)
        if clients != "partition":
            data = data[data["client_type"] == clients]
        found = averages_by_history(data)
        for n in found.index:
            for key in ("client_accuracy", "log_loss"):
                line[f"{clients} {n} {key}"] = found.loc[n, key]
                line[f"{clients} {n} backbone_{key}"] = found.loc[n, f"backbone_{key}"]
    return line


def rounded(value: Any) -> Any:
    """Return a figure with six digits."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def make(name: str, options: argparse.Namespace) -> None:
    """Run a table's settings and store their figures."""
    lines = []
    for label in TABLES[name].settings:
        if options.only and label not in options.only:
            continue
        for seed in SEEDS:
            lines.append(line_of(label, seed, result_of(overrides(name, label, seed, options))))
    new = pd.DataFrame([{k: rounded(v) for k, v in line.items()} for line in lines])
    path = STORED / f"{name}.csv"
    if path.is_file():  # of the settings that were left out
        old = pd.read_csv(path)
        new = pd.concat([new, old[~old["label"].isin(new["label"])]])
    order = {label: number for number, label in enumerate(TABLES[name].settings)}
    new = new.sort_values(["label", "seed"], key=lambda c: c.map(order) if c.name == "label" else c)
    path.parent.mkdir(exist_ok=True)
    new.to_csv(path, index=False)


def main() -> None:
    """Make a table, or write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=TABLES)
    parser.add_argument("--list", action="store_true", help="list the tables, their pages and durations")
    parser.add_argument("--write", action="store_true", help="write the pages from what is stored")
    parser.add_argument("--only", nargs="*", help="labels of the settings to run; others keep what is stored")
    for name, text in (("data", "dataset"), ("weights", "folder of the weights"), ("parents", "parent categories")):
        parser.add_argument(f"--{name}", type=lambda path: Path(path).resolve(), help=text)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("ICIIA_EXP_OUTPUT", "outputs")).resolve())
    options = parser.parse_args()
    if options.list:
        for name, table in TABLES.items():
            print(f"{name:20} {table.page:12} about {table.minutes} min, {len(table.settings)} settings")
        return
    if options.table:
        table = TABLES[options.table]
        said = table.common + "".join(table.settings.values())
        if unknown := set(options.only or ()) - set(table.settings):
            parser.error(f"--only {' '.join(sorted(unknown))}: no such settings; valid: {', '.join(table.settings)}")
        needed = [k for k in ("data", "weights", "parents") if f"{{{k}" in said]
        if missing := [f"--{key}" for key in needed if getattr(options, key) is None]:
            parser.error(f"{options.table} needs {' '.join(missing)}")
        if options.data is not None and options.data.suffix == ".npz":
            folder = options.out / "mnist_leaf"
            if not (folder / "test" / "all_data.json").is_file():
                write_leaf(options.data, folder)
            options.data = folder
        make(options.table, options)
    elif not options.write:
        parser.error("name a table, or --list, or --write")
    write()


if __name__ == "__main__":
    main()
