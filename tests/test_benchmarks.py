"""The benchmarks run, on small sizes: what they measure is not checked here, but that they still fit the package."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

#: command: a word of what it prints last
COMMANDS = {
    "bench_clients.py --clients 50 100 --repeats 1": "all",
    "bench_cloud_samples.py methods --clients 20 --looped 1": "coda, D =",
    "bench_cloud_samples.py clicks --clients 3 --looped 1 --models wide_deep": "wide_deep, mpda",
    "bench_cloud_samples.py search --samples 3000": "3,000 samples",
    "bench_devices.py --devices 2 --looped 1": "Tiny-ImageNet, 100 images",
    "bench_extraction.py --images 32 --repeats 1 --sizes --workers 0": "bound",
    "bench_iciia.py encoder --dims 64 --layers 1 --groups 16 --clients 1 --repeats 1": "classifier",
    "bench_iciia.py stream --repeats 1": "times",
    "bench_iciia.py session --images 5": "of the backbone",
    "bench_iciia.py imagenet --clients 1": "hours",
    "bench_imagenet.py --images 60000 --dim 16 --groups 4 --share 0.1": "accuracy",
    "bench_rivals.py prior_map t3a --clients 64": "t3a",
    "bench_rounds.py --devices 2 --rounds 1": "times",
    "bench_service.py --clients 2 --vectors 1 --attention causal --seconds 0.1 --connections 1": "sqlite",
    "bench_store.py --train-images 90000 --test-images 20000 --dim 256 --steps 2 --files 9 --repeats 1": "dropped",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_runs_on_small_sizes(command):
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments], capture_output=True, text=True, timeout=600
    )
    assert not done.returncode, done.stderr[-2000:]
    assert COMMANDS[command] in done.stdout.splitlines()[-1]
