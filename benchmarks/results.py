"""The tables of the documents: run what is missing, store the figures, write them into the pages.

    python benchmarks/results.py --list
    python benchmarks/results.py digits
    python benchmarks/results.py omniglot_drawer --data FOLDER
    python benchmarks/results.py mnist_writers --data mnist_writers.npz
    python benchmarks/results.py tiny_imagenet --data FOLDER --weights FOLDER --parents FILE
    python benchmarks/results.py speed_rivals
    python benchmarks/results.py --write

A table is a list of settings, each run with three seeds by the package's own command line, which skips what is
finished. Its figures are stored in `docs/results/TABLE.csv`, a line for each run. Of a benchmark of speed, what it
prints is stored, in `docs/results/TABLE.txt`. The pages' tables (`pages.py`) and pictures (`figures.py`) are made from
the stored figures (`stored.py`), which a test checks; `--write` makes them again without running anything.

Data: Omniglot as images_background_small1.zip and ..._small2.zip; MNIST as arrays `images` [M, 28, 28] uint8, `labels`,
`writers`, `is_test`, which are written in LEAF's form first; Tiny-ImageNet in ImageNet's layout with a table of parent
categories; MovieLens unpacked. Weights: under timm's names in files that begin with the model's name;
mobilenetv2_100, tf_efficientnet_lite0 and tf_efficientnet_lite2 for ImageNet-1K, all trained with mean and standard
deviation 0.5, and vit_small_patch14_dinov2. What each table runs is in `settings.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from figures import draw
from omegaconf import OmegaConf
from pages import fill
from settings import QUANTILES, SEEDS, TABLES
from stored import AGREEMENT, KEYS, output_file, store, stored, stored_of

from iciia_exp.artifacts import atomic_write, load_tensors, replacing_folder, save_tensors
from iciia_exp.data.client_mix import unseen
from iciia_exp.data.clients import Clients
from iciia_exp.engine.evaluation.routes import rank_resamples
from iciia_exp.results.columns import DRAWN_TYPES
from iciia_exp.results.plots import gains
from iciia_exp.results.tables import averages_by_history
from iciia_exp.serving.latency import processor
from iciia_exp.tasks import QUALITY


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
        with atomic_write(folder / split / "all_data.json") as file:
            file.write(json.dumps({"users": users, "num_samples": counts, "user_data": content}))


class Weights:
    """Files of weights in a folder, as ``{weights:NAME}`` or ``{weights:NAME+NAME}`` in a format."""

    def __init__(self, folder: Path | None, out: Path) -> None:
        self.folder, self.out = folder, out

    def __format__(self, names: str) -> str:
        first, *more = names.split("+")
        path = self.file(first)
        if not more:
            return str(path)
        both = self.out / f"{first}+{more[0]}.safetensors"
        if not both.is_file():
            second = {f"second.{name}": tensor for name, tensor in load_tensors(self.file(more[0])).items()}
            save_tensors(both, load_tensors(path) | second)
        return str(both)

    def file(self, name: str) -> Path:
        """Return the file of a model."""
        assert self.folder is not None
        found = sorted(path for path in self.folder.iterdir() if path.name.startswith(name))
        if not found:
            raise SystemExit(f"--weights {self.folder}: no file there begins with {name}")
        return found[0]


class First:
    """A dataset in ImageNet's layout with the first images of each class, as ``{first:TRAIN+VAL}`` in a format."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out

    def __format__(self, numbers: str) -> str:
        made = self.out / f"{self.folder.name}_{numbers.replace('+', '_')}"
        if not made.is_dir():
            with replacing_folder(made, "train", ("train", "val"), "dataset") as folder:
                for split, number in zip(("train", "val"), map(int, numbers.split("+")), strict=True):
                    for category in sorted((self.folder / split).iterdir()):
                        own = folder / split / category.name
                        own.mkdir(parents=True)
                        for image in sorted(category.iterdir())[:number]:
                            (own / image.name).symlink_to(image)
        return str(made)


def words(text: str, options: argparse.Namespace, seed: int = 0) -> list[str]:
    """Return the words of a command line, with the options in them."""
    given = {
        "data": options.data,
        "parents": options.parents,
        "weights": Weights(options.weights, options.out),
        "first": First(options.data, options.out),
        "seed": seed,
    }
    return [word.format(**given) for word in text.split()]


def overrides(name: str, label: str, seed: int, options: argparse.Namespace) -> list[str]:
    """Return the overrides of a run."""
    table = TABLES[name]
    return [
        *words(f"{table.common} {table.settings[label]}", options, seed),
        *("logger=csv", f"output_dir={options.out}"),
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


def answers(row: dict[str, Any]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the answers by images seen before of the partition's clients, and of those of other types."""
    folder = row["folder"]
    if (folder / "history.parquet").is_file():
        data = pd.read_parquet(folder / "history.parquet")
        yield "partition", data
        if held_out := OmegaConf.load(folder.parent / "config.yaml").client_mix.unseen_types:
            types = unseen(Clients.load(folder.parent / "partition.parquet").types, held_out)
            new = data["client_type"].isin(types)
            yield from (("training_types", data[~new]), ("held_out_types", data[new]))
    if (folder / "drawn_clients.parquet").is_file():  # not where nobody can tell the method of drawn clients
        data = pd.read_parquet(folder / "drawn_clients.parquet")
        yield from ((clients, data[data["client_type"] == clients]) for clients in DRAWN_TYPES)


def line_of(name: str, label: str, seed: int, row: dict[str, Any]) -> dict[str, Any]:
    """Return what is stored of a run."""
    line = {"label": label, "seed": seed, "oracle": row["oracle"]}
    further = (key for column in TABLES[name].columns for key in (column, f"backbone_{column}"))
    line |= {key: row[key] for key in (*KEYS, *further) if key in row}
    if TABLES[name].clients:
        return line | by_client(row["folder"])
    for clients, data in answers(row):
        found = averages_by_history(data)
        for n in found.index:
            for key in ("client_accuracy", "log_loss"):
                line[f"{clients} {n} {key}"] = found.loc[n, key]
                line[f"{clients} {n} backbone_{key}"] = found.loc[n, f"backbone_{key}"]
    if (row["folder"] / "rounds.parquet").is_file():
        line |= by_rounds(pd.read_parquet(row["folder"] / "rounds.parquet"))
    if (row["folder"] / "routes.parquet").is_file():
        line |= by_metric(pd.read_parquet(row["folder"] / "routes.parquet"), row)
    return line


def by_client(folder: Path) -> dict[str, Any]:
    """Return quantiles of the gain over clients, and confidence, accuracy and share of decisions by bin."""
    gain_C = gains(pd.read_parquet(folder / "clients.parquet")) / 100
    line = {f"gain {q}": np.quantile(gain_C, q / 100) for q in QUANTILES}
    bins = pd.read_parquet(folder / "calibration.parquet")
    for who, part in bins.groupby("who"):
        for found in part.itertuples():
            line[f"{who} bin {found.bin} confidence"] = found.confidence
            line[f"{who} bin {found.bin} accuracy"] = found.accuracy
            line[f"{who} bin {found.bin} share"] = found.decisions / part["decisions"].sum()
    return line


def by_rounds(rounds: pd.DataFrame) -> dict[str, Any]:
    """Return accuracy and bytes of a device by round, and the last accuracies of other ways to answer."""
    line: dict[str, Any] = {}
    ways = [answer for answer in rounds["answer"].unique() if answer != "backbone"]
    for found in rounds[rounds["answer"] == ways[0]].itertuples():
        line[f"round {found.round} bytes"] = found.down_bytes + found.up_bytes
        line[f"round {found.round} accuracy"] = found.accuracy
    for way in ways[1:]:
        last = rounds[rounds["answer"] == way].iloc[-1]
        line |= {f"{way} {key}": last[key] for key in ("accuracy", "seen_accuracy", "unseen_accuracy")}
    return line


def by_metric(routes: pd.DataFrame, row: dict[str, Any]) -> dict[str, Any]:
    """Return each metric's means over the test prompts, of both models, and how it agrees with what is right."""
    line: dict[str, Any] = {}
    for name in (column.removeprefix("label_") for column in routes if column.startswith("label_")):
        device, cloud = routes[f"device_{name}"], routes[f"cloud_{name}"]
        found = {"device": device.mean(), "cloud": cloud.mean(), "error": (cloud - device).sem()}
        if f"device_true_{name}" in routes:
            found |= {f"{side} right": routes[f"{side}_true_{name}"].mean() for side in ("device", "cloud")}
            found |= {key: row[f"{key}_{name}"] for key in AGREEMENT}
        line |= {f"metric {name} {key}": value for key, value in found.items()}
    return line


def rank_differences(runs: dict[str, list[dict[str, Any]]], reference: str) -> dict[str, dict[str, float]]:
    """Return each router's rank correlation less that of another, mean over seeds, and its 95 % interval over prompts.

    The interval is that of a paired bootstrap. Nothing, if the two have other labels.
    """
    routes = {
        label: [pd.read_parquet(row["folder"] / "routes.parquet") for row in rows] for label, rows in runs.items()
    }
    truth_N = routes[reference][0]["superiority"].to_numpy()

    def correlations(label: str) -> tuple[float, np.ndarray]:
        resamples = [rank_resamples(table["score"].to_numpy(), truth_N) for table in routes[label]]
        return float(np.mean([row["rank_correlation"] for row in runs[label]])), np.mean(resamples, axis=0)

    first, first_R = correlations(reference)
    found: dict[str, dict[str, float]] = {}
    for label, tables in routes.items():
        found[label] = {}
        if all(np.allclose(table["superiority"], truth_N) for table in tables):
            mean, mean_R = correlations(label)
            low, high = np.nanpercentile(mean_R - first_R, [2.5, 97.5])
            found[label] = {"rank less": mean - first, "rank less low": float(low), "rank less high": float(high)}
    return found


def rounded(value: Any) -> Any:
    """Return a figure with six digits."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def make(name: str, options: argparse.Namespace) -> None:
    """Run a table's settings and store their figures."""
    table = TABLES[name]
    labels = [label for label in table.settings if not options.only or label in options.only]
    runs = {label: [result_of(overrides(name, label, seed, options)) for seed in SEEDS] for label in labels}
    lines = [
        line_of(name, label, seed, row) for label, rows in runs.items() for seed, row in zip(SEEDS, rows, strict=True)
    ]
    if table.task is QUALITY and (reference := table.reference):
        if reference not in runs:
            runs[reference] = [result_of(overrides(name, reference, seed, options)) for seed in SEEDS]
        less = rank_differences(runs, reference)
        lines = [line | less[line["label"]] for line in lines]
    new = pd.DataFrame([{k: rounded(v) for k, v in line.items()} for line in lines])
    if stored_of([name]):  # of the settings that were left out
        old = stored(name)
        new = pd.concat([new, old[~old["label"].isin(new["label"])]])
    store(name, new, TABLES[name].settings)


def run_script(name: str, options: argparse.Namespace) -> None:
    """Run the script that makes a table; what a benchmark of speed prints is stored."""
    script, *arguments = words(TABLES[name].script, options)
    command = [sys.executable, "-u", str(Path(__file__).with_name(script)), *arguments]
    lines = [f"$ python benchmarks/{TABLES[name].script}", f"{processor()}, {os.cpu_count()} cores"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if process.returncode:
        raise SystemExit(f"{script} failed (code {process.returncode})")
    if TABLES[name].measured:
        with atomic_write(output_file(name)) as file:
            file.write("\n".join(lines) + "\n")


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
            made = table.script.split()[0] if table.script else f"{len(table.settings)} settings"
            print(f"{name:20} {table.page:12} about {table.minutes} min, {made}")
        return
    if options.table:
        table = TABLES[options.table]
        said = table.common + table.script + "".join(table.settings.values())
        if unknown := set(options.only or ()) - set(table.settings):
            parser.error(f"--only {' '.join(sorted(unknown))}: no such settings; valid: {', '.join(table.settings)}")
        needed = [k for k in ("data", "weights", "parents") if f"{{{k}" in said.replace("{first", "{data")]
        if missing := [f"--{key}" for key in needed if getattr(options, key) is None]:
            parser.error(f"{options.table} needs {' '.join(missing)}")
        if options.data is not None and options.data.suffix == ".npz":
            folder = options.out / "mnist_leaf"
            if not (folder / "test" / "all_data.json").is_file():
                write_leaf(options.data, folder)
            options.data = folder
        if table.script:
            run_script(options.table, options)
        else:
            make(options.table, options)
    elif not options.write:
        parser.error("name a table, or --list, or --write")
    fill()
    draw()


if __name__ == "__main__":
    main()
