"""The device phase of a run: 10,000 devices, undisturbed, and killed and finished by two processes.

    python benchmarks/bench_device_phase.py [--devices 10000] [--classes 100] [--features 128]

The clients are the owners of random feature vectors in a folder, 40 each, of which `method=finetune` trains a linear
classifier for every client. The second run is killed (SIGKILL) when half of its shards are there; then the same command
is started twice at the same time. Printed: the time of each part, and whether all states are the same, bit for bit.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

IMAGES = 40


def write_vectors(folder: Path, devices: int, classes: int, features: int) -> None:
    """Write vectors around the centre of their class; a device has images of four classes, which share a direction."""
    rng = np.random.default_rng(0)
    labels = (rng.integers(0, classes, (devices, 1)) + rng.integers(0, 4, (devices, IMAGES))) % classes
    centres = rng.standard_normal((classes, features), dtype=np.float32)
    folder.mkdir()
    vectors = np.lib.format.open_memmap(folder / "features.npy", "w+", dtype=np.float32, shape=(labels.size, features))
    for first in range(0, labels.size, 1 << 16):
        some = labels.ravel()[first : first + (1 << 16)]
        vectors[first : first + len(some)] = centres[some] + 2 * rng.standard_normal((len(some), features))
    vectors.flush()
    owners = np.repeat([f"device {i:06d}" for i in range(devices)], IMAGES)
    pd.DataFrame({"label": [f"c{label:04d}" for label in labels.ravel()], "owner": owners}).to_csv(
        folder / "images.csv", index=False
    )


def start(root: Path, output: str, stage: str) -> subprocess.Popen[bytes]:
    """Start a run's command."""
    overrides = ("+experiment=features", "method=finetune", "partition=owner", "partition.split=within")
    places = (f"data_dir={root}/vectors", f"cache_dir={root}/cache", f"output_dir={root}/{output}")
    quiet = ("logger=none", "trainer=cpu", "evaluation.history_lengths=[]", "evaluation.examples=0")
    command = [sys.executable, "-m", "iciia_exp", *overrides, *places, *quiet, f"stage={stage}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "GOMP_SPINCOUNT": "1000"})


def finish(*processes: subprocess.Popen[bytes]) -> None:
    """Wait for processes; stop if one fails."""
    for process in processes:
        if process.wait():
            sys.exit(f"a command ended with exit status {process.returncode}")


def shards(root: Path, output: str) -> list[Path]:
    """Return the shards that are finished, by number."""
    return sorted((root / output).glob("*/*/states-*/*.safetensors"))


def equal(one: Path, other: Path) -> bool:
    """Return whether two shards have the same clients and states, bit for bit."""
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def main() -> None:
    """Print a line for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--features", type=int, default=128)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_vectors(root / "vectors", options.devices, options.classes, options.features)
        finish(
            start(root, "whole", "backbone"),
        )
        finish(start(root, "whole", "features"))
        begin = time.perf_counter()
        finish(start(root, "whole", "train"))
        seconds, whole = time.perf_counter() - begin, shards(root, "whole")
        size = sum(path.stat().st_size for path in whole) / 1e6
        print(
            f"{options.devices:,} devices: {seconds:.1f} s, {len(whole)} shards, {size:,.0f} MB of states", flush=True
        )
        begin, process = time.perf_counter(), start(root, "killed", "train")
        while process.poll() is None and 2 * len(shards(root, "killed")) < len(whole):
            time.sleep(0.01)
        process.kill()
        process.wait()
        left = len(whole) - len(shards(root, "killed"))
        print(f"killed after {time.perf_counter() - begin:.1f} s with {left} shards missing", flush=True)
        begin = time.perf_counter()
        finish(*(start(root, "killed", "train") for _ in range(2)))
        again = shards(root, "killed")
        same = len(again) == len(whole) and all(map(equal, whole, again))
        print(f"two processes: {time.perf_counter() - begin:.1f} s, states {'the same' if same else 'NOT the same'}")
        begin = time.perf_counter()
        finish(start(root, "whole", "evaluate"))
        print(f"evaluation of all devices: {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
