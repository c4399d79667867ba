"""The README's results on real images: three seeds of each row, printed as tables.

    python benchmarks/real_images.py tiny --data tiny_imagenet --weights mobilenetv2.safetensors --parents groups.csv
    python benchmarks/real_images.py streams --data tiny_imagenet --weights mobilenetv2.safetensors --parents groups.csv
    python benchmarks/real_images.py omniglot --data FOLDER      (with images_background_small1.zip and ..._small2.zip)
    python benchmarks/real_images.py mnist --data mnist_writers.npz

`tiny`: Tiny-ImageNet in ImageNet's layout; weights of MobileNetV2 for ImageNet-1K under timm's names, trained with
"same" padding and mean and standard deviation 0.5; a table of parent categories. `mnist`: arrays `images` [M, 28, 28]
uint8, `labels`, `writers`, `is_test` (MNIST with its NIST writers), written out in LEAF's form first. `streams`: the
same images as `tiny`, with a classifier fitted on the frozen features as the backbone's own; accuracy by images seen
before. Everything else is the command line of the package; the commands are printed. What is finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
from results import write_leaf

from iciia_exp.engine.terminal import console, result_table
from iciia_exp.results.labels import base_of
from iciia_exp.results.summary import ClientCounts, summarise
from iciia_exp.results.tables import history_summary

SEEDS = "seed=0,1,2"
OWN_SEEDS = ["partition.seed=${seed}"]


def run(out: Path, name: str, *overrides: str) -> list[dict]:
    """Run a sweep and return the rows of the runs that it asked for."""
    command = [sys.executable, "-m", "iciia_exp", "-m", *overrides, f"name={name}", f"output_dir={out}", "logger=csv"]
    print("$ python -m iciia_exp", " ".join(f"'{a}'" if set(a) & set("${[ ") else a for a in command[3:]), flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    sweep = max((out / "sweeps").iterdir(), key=lambda p: p.stat().st_mtime)
    jobs = [json.loads(p.read_text()) for p in sorted(sweep.glob("**/*.json"))]
    folders = {job["run_dir"] for job in jobs if isinstance(job, dict) and job.get("run_dir")}
    return [json.loads((Path(f) / "results.json").read_text()) | {"run_dir": f} for f in sorted(folders)]


def show(rows: list[dict], title: str) -> None:
    """Print one table for each set of clients."""
    print(f"\n{title}", flush=True)
    groups: dict = {}
    for row in rows:
        groups.setdefault(base_of(row), []).append(row)
    for part in groups.values():
        console().print(result_table(part))
        first = part[0]
        print(f"{first['test_clients']} test clients, {first['test_images']:,} test images")


def of_parents_with(rows: list[dict], classes: int, table: Path) -> list[dict]:
    """Return the rows again, over the clients alone whose parent category has at least so many of the classes."""
    result = []
    for row in rows:
        folder = Path(row["run_dir"])
        known = json.loads((folder.parent / "run.json").read_text())["class_names"]
        parents = pd.read_csv(table).set_index("wnid")["group_name"].reindex(known)
        large = parents.value_counts().loc[lambda n: n >= classes].index
        clients = pd.read_parquet(folder / "clients.parquet")
        clients = clients[clients["client_type"].isin(large)]
        fields = ("images", "backbone_correct", "method_correct", "both_correct", "backbone_loss", "method_loss")
        counts = ClientCounts(*(clients[name].to_numpy() for name in fields))
        result.append(row | summarise(counts))
    return result


def show_history(rows: list[dict], title: str) -> None:
    """Print accuracy and log-loss by images seen before, mean and standard error over the runs."""
    frames = [history_summary(pd.read_parquet(Path(r["run_dir"]) / "history.parquet")) for r in rows]
    every = pd.concat(frames).query("protocol == 'stream'").groupby("history", sort=False)
    mean, error = every.mean(numeric_only=True), every.sem(numeric_only=True)
    print(f"\n{title}: {len(frames)} runs, mean ± s.e. over them; images seen before (-1: all)")
    for label, key, scale, digits in (
        ("accuracy, mean over clients", "client_accuracy", 100, 1),
        ("  the backbone's", "backbone_client_accuracy", 100, 1),
        ("  gain", "client_gain", 100, 1),
        ("worst decile", "worst_decile", 100, 1),
        ("  the backbone's", "backbone_worst_decile", 100, 1),
        ("log-loss", "log_loss", 1, 2),
        ("  the backbone's", "backbone_log_loss", 1, 2),
    ):
        cells = [
            f"{scale * mean.loc[n, key]:.{digits}f} ± {scale * error.loc[n, key]:.{digits}f}".rjust(13)
            for n in mean.index
        ]
        print(f"{label:<28}" + "".join(cells))
    print(f"{'':<28}" + "".join(str(n).rjust(13) for n in mean.index), flush=True)


def tiny_images(options: argparse.Namespace) -> list[str]:
    """Return the overrides for Tiny-ImageNet behind an ImageNet-trained MobileNetV2, clients by parent category."""
    return [
        "+experiment=mobilenetv2_tiny_imagenet",
        f"data_dir={options.data}",
        f"backbone.weights={options.weights}",
        "backbone.model.options={pad_type: same}",
        "backbone.model.mean=[0.5,0.5,0.5]",
        "backbone.model.std=[0.5,0.5,0.5]",
        f"dataset.parents={options.parents}",
        *OWN_SEEDS,
        SEEDS,
    ]


def tiny(options: argparse.Namespace) -> None:
    """Run Tiny-ImageNet with the weights' own classifier."""
    common = tiny_images(options)
    rows = run(options.out, "tiny_imagenet", *common, "method=linear_head,iciia", "groups=256")
    show(rows, "Tiny-ImageNet, MobileNetV2, all clients")
    show(of_parents_with(rows, 4, options.parents), "the clients of parent categories with at least 4 classes")


def streams(options: argparse.Namespace) -> None:
    """Compare ways to serve one image after the other, behind a classifier fitted on the same features."""
    common = [*tiny_images(options), "backbone.train=head", "num_layers=2", "groups=256"]
    pool = "client_mix.pool=client_type"
    ways = {
        "iciia": ["method=iciia"],
        "iciia, causal": [
            "method=iciia",
            "method.attention=causal",
            "training=streaming",
            "client_mix.pool=client_type",
        ],
        "iciia_stream": ["method=iciia_stream", "training=streaming", pool],
        "iciia_stream, all types": ["method=iciia_stream", "training=streaming", "client_mix=all_types"],
        "iciia_prior, all types": ["method=iciia_prior", "training=streaming", "client_mix=all_types"],
        "iciia_prior": ["method=iciia_prior", "training=streaming", pool],
        "client_prior": ["method=client_prior"],
    }
    if options.published:
        ways["iciia, published protocol"] = ["method=iciia", "training=published"]
    for title, way in ways.items():
        rows = run(options.out, "tiny_streams", *common, *way)
        show(rows, title)
        show_history(rows, title)


def omniglot(options: argparse.Namespace) -> None:
    """Omniglot by drawer and by alphabet."""
    seeds = [*OWN_SEEDS, "backbone.seed=${seed}", "dataset.seed=${seed}", SEEDS]
    common = [f"data_dir={options.data}", *seeds, "method=linear_head,iciia", "groups=1,16"]
    show(run(options.out, "omniglot", "+experiment=omniglot", *common), "Omniglot by drawer")
    by_alphabet = ["+experiment=omniglot", "partition=parent_category", *common]
    show(run(options.out, "omniglot_alphabet", *by_alphabet), "Omniglot by alphabet")


def mnist(options: argparse.Namespace) -> None:
    """MNIST by writer, in LEAF's form, behind LEAF's network."""
    folder = options.out / "mnist_leaf"
    if not (folder / "test" / "all_data.json").is_file():
        print(f"writing {options.data} in LEAF's form into {folder}", flush=True)
        write_leaf(options.data, folder)
    seeds = [*OWN_SEEDS, "backbone.seed=${seed}", SEEDS]
    # a tenth of the writers teaches the backbone and is no client
    few = ["backbone.reserve=0.1", "backbone.recipe.epochs=10", "training=default", "training.recipe.epochs=10"]
    common = ["+experiment=cnn_femnist", f"data_dir={folder}", "dataset.num_classes=10", *few]
    rows = run(options.out, "mnist_writers", *common, *seeds, "method=linear_head,iciia", "groups=256")
    show(rows, "MNIST by writer, LEAF's network")


def main() -> None:
    """Run one of the sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("tiny", "streams", "omniglot", "mnist"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="of tiny and streams")
    parser.add_argument("--parents", type=Path, help="of tiny and streams")
    parser.add_argument(
        "--published", action="store_true", help="streams: the published protocol too, three times as long"
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("ICIIA_EXP_OUTPUT", "outputs")).resolve())
    options = parser.parse_args()
    if options.which in ("tiny", "streams") and not (options.weights and options.parents):
        parser.error(f"{options.which} needs --weights and --parents")
    {"tiny": tiny, "streams": streams, "omniglot": omniglot, "mnist": mnist}[options.which](options)


if __name__ == "__main__":
    main()
