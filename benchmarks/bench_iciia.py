"""ICIIA's speed: training steps and inference of the encoder, streams, and one more image of a client.

    python benchmarks/bench_iciia.py encoder     # images/s by D, N and groups, against two other ways
    python benchmarks/bench_iciia.py stream      # accuracy by length of history: one pass against a loop
    python benchmarks/bench_iciia.py session     # what one more image adds behind MobileNetV3-L at batch 1
    python benchmarks/bench_iciia.py imagenet    # time to train on features of ImageNet's size (for a GPU)

`encoder` prints medians of repeats in one process, every way after the other and again. Clients have 16 images, every
way takes the batch of clients that is fastest for it among ``--clients``. Classifier and dropout are left out and
listed apart. Three ways:

- ours: `iciia_exp.models.iciia.ICIIA`, many clients a step;
- loop: one client a step, grouped projections as a broadcast product and a sum (with one group PyTorch's own layer),
  the form of the code released with the paper;
- torch: `torch.nn.TransformerEncoder`, one group, many clients a step.

The bound is the nearer one of two: the closed-form multiply-accumulates (three times for training) at the rate of the
fastest of three matrix products measured in the same process, and the least traffic (18 D numbers an image and layer,
three times for training) at the bandwidth of a copy.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `python -m iciia_exp` does

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iciia_exp.cost import attention_macs
from iciia_exp.machine import keep_freed_memory
from iciia_exp.methods.base import Facts
from iciia_exp.models.iciia import ICIIA
from iciia_exp.tasks import SINGLE_LABEL

S, K = 16, 1000


class BroadcastLinear(nn.Module):
    """The grouped projection as a product that is spread out in memory and summed."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.randn(groups, outputs // groups, inputs // groups) * 0.05)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        x_MG1i = x.reshape(*x.shape[:-1], self.groups, 1, -1)
        y_MGo = (x_MG1i * self.weight).sum(-1)
        return y_MGo.transpose(-1, -2).flatten(-2) + self.bias


class BroadcastLayer(nn.Module):
    """An encoder layer of such projections."""

    def __init__(self, dim: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = BroadcastLinear(dim, 3 * dim, groups), BroadcastLinear(dim, dim, groups)
        self.linear1, self.linear2 = BroadcastLinear(dim, dim, groups), BroadcastLinear(dim, dim, groups)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x_CSD: Tensor) -> Tensor:
        C, S, D = x_CSD.shape
        q, k, v = self.qkv(x_CSD).view(C, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / (D // self.heads) ** 0.5).softmax(-1)
        x_CSD = self.norm1(x_CSD + self.out((scores @ v).transpose(1, 2).reshape(C, S, D)))
        return self.norm2(x_CSD + self.linear2(F.relu(self.linear1(x_CSD))))


def torch_layers(dim: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(dim, 4, dim, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(step: Callable[[], Any], device: str, least: float = 0.15) -> float:
    """Return seconds of one step, from as many as take ``least`` seconds."""
    step()
    sync(device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < least or count < 2:
        step()
        sync(device)
        count += 1
    return (time.perf_counter() - start) / count


def trainer(net: nn.Module, x_CSD: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        net(x_CSD).square().mean().backward()
        optimizer.step()

    return step


def reader(net: nn.Module, x_CSD: Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.inference_mode():
            net(x_CSD)

    return step


class Encoder(nn.Module):
    """ICIIA without its classifier."""

    def __init__(self, *sizes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.model = ICIIA(sizes[0], 1, *sizes[1:], dropout=dropout)

    def forward(self, x_CSD: Tensor) -> Tensor:
        return self.model.encode(x_CSD)


def machine(device: str) -> tuple[float, float]:
    """Return multiply-accumulates a second of a matrix product, and bytes a second of a copy."""
    rate = 0.0
    for rows, dim in ((1024, 1280), (2048, 2048), (4096, 1280)):  # the fastest of some shapes
        a, b = torch.randn(rows, dim, device=device), torch.randn(dim, dim, device=device)
        rate = max(rate, *(rows * dim * dim / seconds(lambda a=a, b=b: a @ b, device) for _ in range(5)))  # type: ignore[misc]
    source = torch.randn(1 << 26, device=device)
    target = torch.empty_like(source)
    return rate, 2 * 4 * source.numel() / min(seconds(lambda: target.copy_(source), device) for _ in range(3))


def median_rates(ways: dict[str, tuple[Callable[[], None], int]], repeats: int, device: str) -> dict[str, float]:
    """Return the median images a second of every way: a step, and the images of one."""
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (step, images) in ways.items():
            seen[name].append(images / seconds(step, device))
    return {name: statistics.median(rates) for name, rates in seen.items()}


def encoder(options: argparse.Namespace) -> None:
    """Print the table of encoders."""
    device = options.device
    rate, bandwidth = machine(device)
    print(
        f"matrix product {rate / 1e9:,.0f} GMAC/s, copy {bandwidth / 1e9:,.1f} GB/s, {torch.get_num_threads()} threads"
    )
    print("images/s of the encoder, clients of 16 images; in brackets the share of the nearer bound\n")
    print(f"{'D':>5}{'N':>3}{'G':>5} {'':<10}{'ours':>16}{'loop':>9}{'torch':>9}{'of G=1':>9}{'of loop':>9}")
    for dim in options.dims:
        for layers in options.layers:
            first: dict[str, float] = {}
            for groups in options.groups:
                loop: nn.Module = nn.Sequential(*(BroadcastLayer(dim, 4, groups) for _ in range(layers)))
                if groups == 1:
                    loop = torch_layers(dim, layers)
                nets = {"ours": Encoder(dim, layers, 4, groups), "loop": loop}
                if groups == 1:
                    nets["torch"] = torch_layers(dim, layers)
                for mode in ("training", "inference"):
                    ways = {}
                    for name, net in nets.items():
                        net = net.to(device).train(mode == "training").requires_grad_(mode == "training")
                        for clients in [1] if name == "loop" else options.clients:
                            x_CSD = torch.randn(clients, S, dim, device=device)
                            step = trainer(net, x_CSD) if mode == "training" else reader(net, x_CSD)
                            ways[f"{name} {clients}"] = step, clients * S
                    every = median_rates(ways, options.repeats, device)
                    rates = {n: max(r for way, r in every.items() if way.startswith(n)) for n in nets}
                    times = 3 if mode == "training" else 1
                    macs = times * attention_macs(S, dim, groups, layers) / S
                    bound = min(rate / macs, bandwidth / (times * 18 * dim * 4 * layers))
                    first.setdefault(mode, rates["ours"])
                    cells = f"{rates['ours']:>9,.0f} ({rates['ours'] / bound:>3.0%}){rates['loop']:>9,.0f}"
                    cells += f"{rates['torch']:>9,.0f}" if "torch" in rates else f"{'':>9}"
                    cells += f"{rates['ours'] / first[mode]:>8.1f}x{rates['ours'] / rates['loop']:>8.1f}x"
                    print(f"{dim:>5}{layers:>3}{groups:>5} {mode:<10}{cells}", flush=True)
    apart(options)


def apart(options: argparse.Namespace) -> None:
    """Print what classifier and dropout add."""
    dim, layers = 1280, 2
    what = f"encoder; with dropout 0.1; with a classifier of {K} classes"
    print(f"\nD={dim} N={layers}, images/s of a training step: {what}")
    for groups in options.groups:
        ways = {}
        x_CSD = torch.randn(options.clients[0], S, dim, device=options.device)
        full = ICIIA(dim, K, layers, 4, groups, dropout=0.0)
        nets = {"plain": Encoder(dim, layers, 4, groups), "dropout": Encoder(dim, layers, 4, groups, dropout=0.1)}
        for name, net in {**nets, "classifier": full}.items():
            ways[name] = trainer(net.to(options.device).train(), x_CSD), x_CSD.shape[0] * S
        rates = median_rates(ways, options.repeats, options.device)
        print(f"{'G=' + str(groups):<6}" + "".join(f"{name:>14}{rate:>9,.0f}" for name, rate in rates.items()))


def stream(options: argparse.Namespace) -> None:
    """Compare all lengths of history in one pass with running every (target, length) alone."""
    from iciia_exp.config.settings import Evaluation
    from iciia_exp.data.batches import FeatureBatches
    from iciia_exp.data.clients import Clients, Ragged
    from iciia_exp.engine.evaluation.history import Setup, history_table
    from iciia_exp.methods.adapt.iciia import IciiaMethod

    dim, clients = 1280, 625
    rng = np.random.default_rng(0)
    features = rng.standard_normal((clients * S, dim), dtype=np.float32)
    labels = rng.integers(0, 200, clients * S)
    rows = Ragged(np.arange(clients + 1) * S, np.arange(clients * S))
    nobody = Ragged(np.zeros(clients + 1, np.int64), np.empty(0, np.int64))
    ids = np.array([str(i) for i in range(clients)], dtype=object)
    head = nn.Linear(dim, 200)
    method = IciiaMethod(Facts.of(head), 2, 4, 256, attention="causal").eval().requires_grad_(False)
    people, batches = Clients(ids, ids, nobody, nobody, rows), FeatureBatches(features, labels)
    settings = Evaluation(history_lengths=range(16), history_orders=S, history_longest=15)
    x_MD, y_M = torch.from_numpy(features), torch.from_numpy(labels)
    pairs = rng.integers(0, 16, 300)

    def ours() -> None:
        history_table(Setup(method, head, batches, people), settings, protocols=("stream",))

    def loop() -> None:
        with torch.inference_mode():
            for i, n in enumerate(pairs):
                y_1 = y_M[i + n, None]
                for logits_1K in (method.stream(x_MD[None, i : i + n + 1])[:, -1], head(x_MD[i + n, None])):
                    SINGLE_LABEL.correct(logits_1K, y_1), SINGLE_LABEL.log_loss(logits_1K, y_1)

    one, many = [], []
    for _ in range(options.repeats):
        many.append(clients * S * S / seconds(ours, "cpu"))
        one.append(len(pairs) / seconds(loop, "cpu"))
    print("D=1280 N=2 G=256, causal, 200 classes; 10,000 images, each a target after 0 to 15 images of its client")
    print(f"in 16 passes, counts and tables included: {statistics.median(many):,.0f} (target, length) pairs a second")
    print(f"each pair by itself, correct decisions and log-losses: {statistics.median(one):,.0f}; ", end="")
    print(f"{statistics.median(m / o for m, o in zip(many, one, strict=True)):.0f} times")


def session(options: argparse.Namespace) -> None:
    """Measure what `ClientSession.predict` adds to the backbone at batch 1."""
    import timm

    from iciia_exp import ClientSession, Run
    from iciia_exp.methods.adapt.iciia import IciiaMethod
    from iciia_exp.serving.run import save_method

    net = timm.create_model("mobilenetv3_large_100", pretrained=False).eval().to(memory_format=torch.channels_last)
    image = torch.randn(1, 3, 224, 224).to(memory_format=torch.channels_last)
    head = nn.Linear(1280, K)
    config = {
        "_target_": "iciia_exp.methods.adapt.iciia.IciiaMethod",
        "num_layers": 3,
        "groups": 256,
        "attention": "causal",
    }
    with tempfile.TemporaryDirectory() as name:
        method = IciiaMethod(Facts.of(head), 3, 4, 256, attention="causal")
        names = [str(k) for k in range(K)]
        facts = {"task": "single-label", "class_names": names, "images": 16, "features": "none", "backbone": None}
        save_method(Path(name), method, head, config, facts)
        run = Run.load(name)
    client = ClientSession(run, history=15, compile=options.compile)
    classify = run.head
    backbone, added, heads = [], [], []
    with torch.inference_mode():
        for i in range(options.images + 50):
            start = time.perf_counter()
            x_1D = net.forward_head(net.forward_features(image), pre_logits=True)
            middle = time.perf_counter()
            classify(x_1D).softmax(-1)  # the backbone's own classifier, which the module's takes the place of
            end = time.perf_counter()
            client.predict(x_1D[0])
            last = time.perf_counter()
            if i >= 50:
                backbone.append(1e3 * (end - start))
                heads.append(1e3 * (end - middle))
                added.append(1e3 * (last - end) - heads[-1])
    base = statistics.median(backbone)
    kept = f"15 kept images ({client.state_bytes:,} bytes), compile={options.compile}"
    print(f"MobileNetV3-L 224 px at batch 1, N=3 G=256 causal, {kept}")
    print(f"backbone: {base:.2f} ms (p99 {np.percentile(backbone, 99):.2f}), classifier {statistics.median(heads):.3f}")
    middle_, high = statistics.median(added), float(np.percentile(added, 99))
    print(f"added by the session: {middle_:.3f} ms (p99 {high:.3f}), {middle_ / base:.1%} of the backbone")


def imagenet(options: argparse.Namespace) -> None:
    """Train on synthetic features of ImageNet's size: seconds of an epoch, and of 20."""
    device, dim = options.device, 1280
    images = max(options.images, 64 * options.clients[-1] * S)
    x = torch.randn(images, dim, dtype=torch.float16 if device == "cuda" else torch.float32, device=device)
    y = torch.randint(0, K, (images,), device=device)
    for groups in (1, 256):
        model = ICIIA(dim, K, 3, 4, groups).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        clients, times = options.clients[-1], []
        for start in range(0, images - clients * S + 1, clients * S):
            rows = torch.randint(0, images, (clients, S), device=device)
            begin = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = F.cross_entropy(model(x[rows].float()).flatten(0, 1), y[rows].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sync(device)
            times.append(time.perf_counter() - begin)
            if start > 200 * clients * S:
                break
        rate = clients * S / statistics.median(times)
        print(f"G={groups}: {rate:,.0f} images/s, 20 epochs of 1.28 M images in {20 * 1.28e6 / rate / 3600:.2f} hours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("encoder", "stream", "session", "imagenet"))
    parser.add_argument("--dims", type=int, nargs="*", default=[1024, 1280, 2048])
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--groups", type=int, nargs="*", default=[1, 16, 256])
    parser.add_argument("--clients", type=int, nargs="*", default=[8, 64], help="clients of a step to try")
    parser.add_argument("--images", type=int, default=1000, help="of session and imagenet")
    parser.add_argument("--compile", help="session: backend of torch.compile, inductor say")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    {"encoder": encoder, "stream": stream, "session": session, "imagenet": imagenet}[options.which](options)


if __name__ == "__main__":
    main()
