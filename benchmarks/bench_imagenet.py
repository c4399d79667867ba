"""Training at ImageNet's size, the whole way through: vectors in, every client's accuracy out.

    python benchmarks/bench_imagenet.py                          # ICIIA-T: N = 3, G = 256
    python benchmarks/bench_imagenet.py --groups 1 --share 0.1   # ICIIA-B, a tenth of an epoch
    python benchmarks/bench_imagenet.py --method client_profile

Vectors of 1,281,167 train and 50,000 test images of 1,000 classes, D = 1,280, float16 (3.4 GB in a temporary folder),
are synthetic: a mean of each class and noise. Clients have the classes of one parent category each. The vectors are
read as a user's own (`+experiment=features`), and the package's command line does the rest; a classifier is fitted on
one in a hundred train images first. Printed: seconds of each stage, of an epoch and of 20, peak memory, accuracies.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd

TRAIN, TEST, K = 1_281_167, 50_000, 1000


def write_vectors(folder: Path, images: int, dim: int) -> None:
    """Write ``features.npy`` and ``images.csv`` of ``images`` train images, and of test images in proportion."""
    rng, test = np.random.default_rng(0), round(TEST * images / TRAIN)
    labels = np.concatenate([np.arange(count) % K for count in (images, test)])
    mean_KD = rng.standard_normal((K, dim), dtype=np.float32)
    vectors = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, (len(labels), dim))
    for start in range(0, len(labels), 1 << 16):
        rows = labels[start : start + (1 << 16)]
        noise = 4 * rng.standard_normal((len(rows), dim), dtype=np.float32)
        vectors[start : start + len(rows)] = np.maximum(mean_KD[rows] + noise, 0)
    vectors.flush()
    with (files("iciia_exp.data.tables") / "imagenet_parents.csv").open(encoding="utf-8") as file:
        parents = pd.read_csv(file)
    parent = np.resize(pd.factorize(parents.iloc[:, -1])[0], K)
    table = pd.DataFrame(
        {"label": labels, "split": np.repeat(["train", "test"], (images, test)), "parent": parent[labels]}
    )
    table.to_csv(folder / "images.csv", index=False)


def main() -> None:
    """Write the vectors, then train and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="iciia")
    parser.add_argument("--groups", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of an epoch's batches")
    parser.add_argument("--images", type=int, default=TRAIN, help="train images")
    parser.add_argument("--dim", type=int, default=1280, help="numbers of a vector")
    parser.add_argument("--batch", type=int, default=64, help="clients of a step")
    parser.add_argument("--folder", type=Path, help="for vectors and runs; kept (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(exist_ok=True)
        if not (folder / "images.csv").is_file():
            start = time.perf_counter()
            write_vectors(folder, options.images, options.dim)
            print(f"vectors written in {time.perf_counter() - start:.0f} s", flush=True)
        arguments = [
            *("+experiment=features", f"data_dir={folder}", "partition=parent_category", "backbone.reserve=0.01"),
            *(f"method={options.method}", "num_layers=3", f"groups={options.groups}", "features=large"),
            *(f"training.recipe.epochs={options.epochs}", f"training.recipe.batch_size={options.batch}"),
            *(f"+trainer.limit_train_batches={options.share}", "logger=csv", "evaluation.examples=0"),
            *(f"output_dir={folder}/outputs", f"cache_dir={folder}/cache"),
        ]
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "iciia_exp", *arguments], check=True)
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
        newest = max(folder.glob("outputs/features/*/*/results.json"), key=lambda path: path.stat().st_mtime)
        row = json.loads(newest.read_text())
        print(f"{options.method}, G={options.groups}: {row['test_clients']:,} test clients")
        for stage in ("backbone", "features", "train", "evaluate"):
            print(f"  {stage:10} {row.get(f'seconds_{stage}') or 0:8.0f} s")
        print(f"  together   {seconds:8.0f} s; peak memory {memory:.1f} GiB, mapped pages of the vectors included")
        if options.method == "iciia":
            epoch = row["seconds_train"] / options.epochs / options.share
            print(f"  an epoch   {epoch:8.0f} s, 20 epochs {20 * epoch / 3600:.2f} hours")
        print(f"  accuracy {100 * row['backbone_accuracy']:.1f} alone, {100 * row['accuracy']:.1f} with the method")


if __name__ == "__main__":
    main()
