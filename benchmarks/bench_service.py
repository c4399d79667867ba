"""Load of the service: requests/s and their times, with the state of every client in SQLite or Redis.

    python benchmarks/bench_service.py [--redis redis://127.0.0.1:6379] [--clients 100000 --known 15]
    python benchmarks/bench_service.py --images        # JPEG files through MobileNetV2, beside the network's own rate

ICIIA-T on random features (D = 1280, K = 1000, N = 3, G = 256, 15 past images). The client runs on the same cores, with
32 connections that each wait for their answer. ``full`` attention computes the past again with every image, ``causal``
keeps keys and values of it. Bodies are float32, answers the 5 most probable classes in JSON.
"""

import argparse
import asyncio
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from PIL import Image
from torch import nn

from iciia_exp.artifacts import save_tensors
from iciia_exp.methods.base import Facts
from iciia_exp.models.backbones.torchvision_backbone import TorchvisionBackbone
from iciia_exp.serving import hub
from iciia_exp.serving.app import _decoded
from iciia_exp.serving.run import Run, save_method
from iciia_exp.serving.service import open_store
from iciia_exp.serving.states import Change

D, K = 1280, 1000
COLUMNS = {
    "requests_s": "requests/s",
    "p50": "p50, ms",
    "p99": "p99, ms",
    "vectors_s": "vectors/s",
    "memory_MiB": "MiB",
}
ICIIA = {"_target_": "iciia_exp.methods.adapt.iciia.IciiaMethod", "num_layers": 3, "heads": 4, "groups": 256}
MODEL = {"name": "TorchvisionBackbone", "arguments": {"model": "mobilenet_v2"}}
BACKBONE = {
    **{"name": "mobilenet_v2", "train": "none", "model": MODEL, "pretrained": False},
    **{"classes": None, "folder": None, "weights": None},
}


def make_run(folder, attention):
    torch.manual_seed(0)
    head, config = nn.Linear(D, K), {**ICIIA, "attention": attention}
    method = instantiate(config, facts=Facts.of(head))
    names = [f"class {k}" for k in range(K)]
    facts = {"task": "single-label", "class_names": names, "images": 16, "features": "none", "backbone": BACKBONE}
    save_method(folder, method, head, config, facts)
    save_tensors(folder / hub.BACKBONE, TorchvisionBackbone(K, "mobilenet_v2").state_dict())


async def connection(port, kind, bodies, clients, until, times, rng):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < until:
        body = bodies[rng.integers(len(bodies))]
        start = time.perf_counter()
        writer.write(
            b"POST /clients/%d/predict HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\n"
            b"Content-Length: %d\r\n\r\n" % (rng.integers(clients), kind, len(body))
        )
        writer.write(body)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        times.append(time.perf_counter() - start)
    writer.close()


def jpeg_files(size=(256, 256)):
    """Return photographs of blurred noise, which compress as real ones do."""
    rng, files = np.random.default_rng(0), []
    for _ in range(64):
        small = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
        small.resize(size).save(file := io.BytesIO(), "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def bodies_of(vectors):
    """Return the content type and 64 bodies of so many vectors, or of a JPEG file."""
    if not vectors:
        return b"image/jpeg", jpeg_files()
    rng = np.random.default_rng(0)
    return b"application/octet-stream", [rng.standard_normal((vectors, D)).astype("<f4").tobytes() for _ in range(64)]


async def load(port, kind, bodies, clients, seconds, connections):
    """Return requests/s and the milliseconds of the middle one and of the slowest in a hundred."""
    times, start = [], time.perf_counter()
    rngs = [np.random.default_rng(number) for number in range(connections)]
    await asyncio.gather(*(connection(port, kind, bodies, clients, start + seconds, times, r) for r in rngs))
    seconds = time.perf_counter() - start
    middle, high = np.percentile(1000 * np.array(times), [50, 99])
    return {"requests_s": len(times) / seconds, "p50": middle, "p99": high}


def bare_rates(seconds=5):
    """Return images/s of the network alone, in batches of 16, and with decoding in threads as well."""
    layout = torch.channels_last
    backbone = TorchvisionBackbone(K, "mobilenet_v2").eval().requires_grad_(False).to(memory_format=layout)
    files, rates = jpeg_files()[:16], {}
    with ThreadPoolExecutor(os.cpu_count()) as pool, torch.inference_mode():
        images = torch.stack(list(pool.map(partial(_decoded, backbone), files)))
        for name in ("network alone", "decoding and network"):
            start, done = time.perf_counter(), 0
            coming = pool.map(partial(_decoded, backbone), files)
            while time.perf_counter() < start + seconds:
                if name != "network alone":  # the next batch is decoded beside this one
                    images, coming = torch.stack(list(coming)), pool.map(partial(_decoded, backbone), files)
                backbone.features(images.contiguous(memory_format=layout))
                done += len(images)
            rates[name] = done / (time.perf_counter() - start)
    return rates


def memory(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def fill(folder, states, clients, images):
    """Write the states of clients that have sent some images."""
    run = Run.load(folder)
    store, rng = open_store(states, run, None, "recent"), np.random.default_rng(0)
    row = rng.standard_normal(run.method.state_width, dtype=np.float32).tobytes()
    rows = {place: (place + 1).to_bytes(8, "little") + row for place in range(images)}
    for start in range(0, clients if images else 0, 100):
        store.write([Change(str(client), 0, images, "", rows) for client in range(start, start + 100)])
    store.close()


def served(run, states, port, more, work):
    command = [sys.executable, "-m", "iciia_exp.serving.service", str(run), "--states", states, "--port", str(port)]
    command += more
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            process.stdout.readline()
            while True:
                try:
                    asyncio.run(load(port, *bodies_of(1), 1, 0.01, 1))
                    break
                except OSError:
                    if process.poll() is not None:
                        sys.exit("the service has ended")
                    time.sleep(0.1)
            return work() | {"memory_MiB": memory(process.pid)}
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--redis", help="URL of a server to use beside SQLite")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--known", type=int, default=0, help="images that every client has sent before")
    parser.add_argument("--vectors", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--attention", nargs="*", default=["full", "causal"])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--images", action="store_true", help="send JPEG files, and not vectors")
    options = parser.parse_args()
    more = ["--with-backbone"] if options.images else []
    if options.images:
        options.vectors = [0]
        for name, value in bare_rates().items():
            print(f"{name}: {value:.1f} images/s")
    print(f"{options.clients:,} clients that have sent {options.known} images, {options.connections} connections")
    print(f"{'attention':<11}{'states':<8}{'vectors':>8}" + "".join(f"{title:>12}" for title in COLUMNS.values()))
    for attention in options.attention:
        for kind in ("sqlite", *(["redis"] if options.redis else [])):
            for vectors in options.vectors:
                with tempfile.TemporaryDirectory() as folder:
                    run = Path(folder) / f"iciia-{attention}"
                    run.mkdir()
                    make_run(run, attention)
                    states = options.redis if kind == "redis" else f"{folder}/states.sqlite"
                    fill(run, states, options.clients, options.known)

                    def work(vectors=vectors):
                        given = options.port, *bodies_of(vectors), options.clients
                        asyncio.run(load(*given, 3, options.connections))  # warm
                        found = asyncio.run(load(*given, options.seconds, options.connections))
                        return found | {"vectors_s": max(1, vectors) * found["requests_s"]}

                    found = served(run, states, options.port, more, work)
                    cells = "".join(f"{found[name]:>12,.0f}" for name in COLUMNS)
                    print(f"{attention:<11}{kind:<8}{vectors:>8}{cells}", flush=True)


if __name__ == "__main__":
    main()
