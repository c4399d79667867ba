"""Load of LitServe with the same forward pass as bench_service.py, but without states: what a request costs there.

    pip install litserve; python benchmarks/bench_litserve.py

Bodies are JSON with the vector in base64 (LitServe reads JSON), batches of up to 32, one worker. Every request computes
one image with 15 past images of noise.
"""

import argparse
import asyncio
import base64
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
from bench_service import D, load, make_run

from iciia_exp.serving.run import Run

try:
    import litserve
except ImportError:  # not of the package's extras
    litserve = None


class Api(litserve.LitAPI if litserve else object):
    def __init__(self, folder):
        super().__init__(max_batch_size=32, batch_timeout=0.002, api_path="/clients/0/predict")
        self.folder = folder

    def setup(self, device):
        torch.set_num_threads(1)
        self.method = Run.load(self.folder).method
        self.past = torch.randn(32, 15, self.method.state_width)

    def decode_request(self, request):
        return np.frombuffer(base64.b64decode(request["features"]), "<f4")

    def batch(self, inputs):
        return torch.from_numpy(np.stack(inputs))

    def predict(self, x):
        with torch.inference_mode():
            return self.method.step(x, self.past[: len(x)])[0].softmax(-1)

    def unbatch(self, output):
        return [output[i].topk(5) for i in range(len(output))]

    def encode_response(self, output):
        return {"classes": output.indices.tolist(), "probabilities": output.values.tolist()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--attention", nargs="*", default=["full", "causal"])
    parser.add_argument("--port", type=int, default=8766)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        server = litserve.LitServer(Api(options.serve), accelerator="cpu", workers_per_device=1)
        server.run(port=options.port, log_level="error", num_api_servers=1)
        return
    vector = np.random.default_rng(0).standard_normal(D).astype("<f4").tobytes()
    body = json.dumps({"features": base64.b64encode(vector).decode()}).encode()
    for attention in options.attention:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / f"iciia-{attention}"
            run.mkdir()
            make_run(run, attention)
            command = [sys.executable, __file__, "--serve", str(run), "--port", str(options.port)]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder, start_new_session=True) as process:
                while process.poll() is None:
                    try:
                        asyncio.run(load(options.port, b"application/json", [body], 1, 3, 32))  # warm
                        break
                    except (OSError, AssertionError, asyncio.IncompleteReadError):
                        time.sleep(0.5)
                found = asyncio.run(load(options.port, b"application/json", [body], 1, 10, 32))
                print(json.dumps({"attention": attention, **{name: round(value, 1) for name, value in found.items()}}))
                os.killpg(process.pid, signal.SIGKILL)  # and its workers


if __name__ == "__main__":
    main()
