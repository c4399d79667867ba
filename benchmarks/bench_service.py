"""Load of the service: requests/s and their times, with the state of every client in SQLite or Redis.

    python benchmarks/bench_service.py [--redis redis://127.0.0.1:6379] [--clients 100000]

ICIIA-T on random features (D = 1280, K = 1000, N = 3, G = 256, 15 past images). The client runs on the same cores, with
32 connections that each wait for their answer. ``full`` attention computes the past again with every image, ``causal``
keeps keys and values of it. Bodies are float32, answers the 5 most probable classes in JSON.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from torch import nn

from iciia_exp.methods.base import Facts
from iciia_exp.serving.run import save_method

D, K = 1280, 1000
ICIIA = {"_target_": "iciia_exp.methods.adapt.iciia.IciiaMethod", "num_layers": 3, "heads": 4, "groups": 256}


def make_run(folder, attention):
    torch.manual_seed(0)
    head, config = nn.Linear(D, K), {**ICIIA, "attention": attention}
    method = instantiate(config, facts=Facts.of(head))
    names = [f"class {k}" for k in range(K)]
    facts = {"task": "single-label", "class_names": names, "images": 16, "features": "none", "backbone": None}
    save_method(folder, method, head, config, facts)


async def connection(port, bodies, clients, until, times, rng):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < until:
        body = bodies[rng.integers(len(bodies))]
        start = time.perf_counter()
        writer.write(
            b"POST /clients/%d/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n"
            b"Content-Length: %d\r\n\r\n" % (rng.integers(clients), len(body))
        )
        writer.write(body)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        times.append(time.perf_counter() - start)
    writer.close()


async def load(port, vectors, clients, seconds, connections):
    rng = np.random.default_rng(0)
    bodies = [rng.standard_normal((vectors, D)).astype("<f4").tobytes() for _ in range(64)]
    times, start = [], time.perf_counter()
    rngs = [np.random.default_rng(number) for number in range(connections)]
    await asyncio.gather(*(connection(port, bodies, clients, start + seconds, times, r) for r in rngs))
    seconds = time.perf_counter() - start
    middle, high = np.percentile(1000 * np.array(times), [50, 99])
    return {"requests_s": len(times) / seconds, "vectors_s": vectors * len(times) / seconds, "p50": middle, "p99": high}


def memory(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def served(run, states, port, work):
    command = [sys.executable, "-m", "iciia_exp.serving.service", str(run), "--states", states, "--port", str(port)]
    env = {**os.environ, "GOMP_SPINCOUNT": "1000"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            process.stdout.readline()
            while True:
                try:
                    asyncio.run(load(port, 1, 1, 0.01, 1))
                    break
                except OSError:
                    time.sleep(0.1)
            return work() | {"memory_MiB": memory(process.pid)}
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--redis", help="URL of a server to use beside SQLite")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--vectors", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--attention", nargs="*", default=["full", "causal"])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--port", type=int, default=8765)
    options = parser.parse_args()
    for attention in options.attention:
        for kind in ("sqlite", *(["redis"] if options.redis else [])):
            for vectors in options.vectors:
                with tempfile.TemporaryDirectory() as folder:
                    run = Path(folder) / f"iciia-{attention}"
                    run.mkdir()
                    make_run(run, attention)
                    states = options.redis if kind == "redis" else f"{folder}/states.sqlite"

                    def work(vectors=vectors):
                        asyncio.run(load(options.port, vectors, options.clients, 3, options.connections))  # warm
                        given = options.port, vectors, options.clients, options.seconds, options.connections
                        return asyncio.run(load(*given))

                    found = served(run, states, options.port, work)
                    facts = {"attention": attention, "states": kind, "vectors": vectors, "clients": options.clients}
                    print(json.dumps({**facts, **{name: round(value, 1) for name, value in found.items()}}), flush=True)


if __name__ == "__main__":
    main()
