"""Extraction on a processor: images per second of the project's own way, decoding included, against the bare network.

Three things, in one process, one after the other and again, medians of paired runs:

- eager: the network as timm builds it, in evaluation mode without gradients, batches of 256 normalised NCHW images that
  lie in memory;
- bare: the same network after `ImageBackbone.faster` (batch norm folded, channels last), on normalised channels-last
  batches in memory, of the batch size that the project chooses (``--sizes`` tries others);
- project: `extract` (`iciia_exp.engine.training`) from JPEG files through Lightning into a store in a temporary folder,
  by threads that load and compute (the default on a processor) and with a loading process beside a network on
  all cores. The threads' rate is from the start to the last batch's end, that with a process from the first batch's
  end, when it has started.

Targets: project at least twice eager, and at least 90 % of bare. Decoding takes its own share of the same two cores:
the line "decoding" is the rate of one core that does nothing else, and "bound" what two cores can reach that decode and
compute with nothing lost, 1 / (1 / bare + 1 / (2 decoding)), as a share of bare.

Measured on Tiny-ImageNet (64 px) with --images 1536, on two cores and nothing else running:

    decoding and resizing on one core: 1,537 images/s; the project's batch size: 16
                                images/s  of eager   of bare
    eager, batches of 256             88     1.00x       18%
    bare, batches of 16              515     5.51x      100%
    bare, batches of 21              502     5.59x       98%
    bare, batches of 32              441     4.99x       88%
    project, threads                 478     5.40x       96%
    project, 1 processes             340     3.72x       69%
    bound                            441                 86%

Threads come out above the bound because two of them, each on its own core with its own batch, also compute faster than
one network on both cores (up to 1.1 times without decoding). Decoding threads beside a network on all cores gained
nothing over loading everything in turn (80 to 84 % of bare).

    python benchmarks/bench_extraction.py --data /data/tiny_imagenet
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `python -m iciia_exp` does

import argparse
import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from iciia_exp.config.settings import Extraction
from iciia_exp.data.datasets.imagenet import ImageNet
from iciia_exp.engine.training import extract as features
from iciia_exp.engine.training import image_loading as loading
from iciia_exp.engine.training.extract import extract
from iciia_exp.machine import keep_freed_memory
from iciia_exp.models.backbones.timm_backbone import TimmBackbone

TRAINER = {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu"}


def write_images(root: Path, images: int, pixels: int) -> None:
    """Write JPEG files in ImageNet's layout: smooth colours with some noise."""
    rng = np.random.default_rng(0)
    wnids = ["n01440764", "n02119789"]
    for i in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((pixels, pixels))
        noisy = np.asarray(coarse, dtype=np.int16) + rng.integers(-12, 13, (pixels, pixels, 3))
        folder = root / ("val" if i < 2 else "train") / wnids[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{wnids[i % 2]}_{i}.JPEG", quality=90)


class Some(ImageNet):
    """The first images of a folder."""

    def __init__(self, root: Path, images: int) -> None:
        super().__init__(root)
        self._number = images

    def load_table(self) -> Any:
        table = super().load_table()
        return table.iloc[np.linspace(0, len(table) - 1, min(self._number, len(table))).astype(int)]


def rate(step: Callable[[torch.Tensor], Any], batches: list[torch.Tensor]) -> float:
    """Return images per second of ``step`` over all batches."""
    with torch.inference_mode():
        step(batches[0])
        start = time.perf_counter()
        for batch in batches:
            step(batch)
    return sum(map(len, batches)) / (time.perf_counter() - start)


class _Timed(features.WriteFeatures):
    """The project's callback, which also remembers when batches ended."""

    ended: list[tuple[float, int]] = []

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_predict_start(trainer, pl_module)
        if not getattr(trainer.predict_dataloaders, "num_workers", 0):
            self.ended.append((time.perf_counter(), 0))

    def write_on_batch_end(self, *args: Any, **kwargs: Any) -> None:
        super().write_on_batch_end(*args, **kwargs)
        self.ended.append((time.perf_counter(), self.done))


def project_rate(dataset: ImageNet, model: TimmBackbone, workers: int, batch_size: int | None) -> float:
    """Return images per second of an extraction into a temporary store."""
    _Timed.ended.clear()
    with tempfile.TemporaryDirectory() as folder:
        extraction = Extraction("float16", num_workers=workers, batch_size=batch_size)
        extract(dataset, dataset.table, copy.deepcopy(model), extraction, Path(folder), TRAINER, {})
    (first, seen), (last, all_) = _Timed.ended[0], _Timed.ended[-1]
    return (all_ - seen) / (last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder in ImageNet's layout; without it, images are made")
    parser.add_argument("--images", type=int, default=2048, help="read per measurement")
    parser.add_argument("--pixels", type=int, default=64, help="of the images that are made")
    parser.add_argument("--model", default="mobilenetv2_100")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--sizes", type=int, nargs="*", default=[21, 32], help="more batch sizes of the bare network")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    keep_freed_memory()
    logging.getLogger("iciia_exp").setLevel(logging.WARNING)
    features.WriteFeatures = _Timed  # type: ignore[misc]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        root = args.data or Path(name)
        if args.data is None:
            write_images(root, args.images, args.pixels)
        dataset = Some(root, args.images)
        model: Any = TimmBackbone(len(dataset.class_names), args.model, args.image_size).eval().requires_grad_(False)
        start = time.process_time()
        raw = torch.stack([model.transform(dataset[i]) for i in range(min(512, len(dataset)))])
        decoding = len(raw) / (time.process_time() - start)
        eager, bare = model.net, copy.deepcopy(model)
        done = bare.faster(raw[0])
        chosen = loading.images_per_step(raw[0].numel(), "cpu")
        plain, last = model.normalise(raw).contiguous(), bare.normalise(raw)
        sizes = list(dict.fromkeys([chosen, *args.sizes]))
        print(f"{args.model}, {args.image_size} px, {len(dataset):,} images, {os.cpu_count()} cores; {', '.join(done)}")
        print(f"decoding and resizing on one core: {decoding:,.0f} images/s; the project's batch size: {chosen}")

        ways: dict[str, Callable[[], float]] = {"eager, batches of 256": lambda: rate(eager, list(plain.split(256)))}
        ways |= {f"bare, batches of {s}": lambda s=s: rate(bare.net, list(last.split(s))) for s in sizes}  # type: ignore[misc]
        ways |= {
            f"project, {f'{w} processes' if w else 'threads'}": lambda w=w: project_rate(dataset, model, w, None)
            for w in args.workers
        }  # type: ignore[misc]
        seen: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way, measure in ways.items():
                seen[way].append(measure())
        print(f"{'':<26}{'images/s':>10}{'of eager':>10}{'of bare':>10}")
        fastest = max([way for way in ways if way.startswith("bare")], key=lambda way: statistics.median(seen[way]))
        for way, rates in seen.items():
            cells = ""
            for base in (next(iter(ways)), fastest):
                ratio = statistics.median(r / b for r, b in zip(rates, seen[base], strict=True))
                cells += f"{ratio:>9.2f}x" if base.startswith("eager") else f"{ratio:>10.0%}"
            print(f"{way:<26}{statistics.median(rates):>10,.0f}{cells}")
        speed = statistics.median(seen[fastest])
        bound = 1 / (1 / speed + 1 / (os.cpu_count() or 1) / decoding)
        print(f"{'bound':<26}{bound:>10,.0f}{'':>10}{bound / speed:>10.0%}")


if __name__ == "__main__":
    main()
