"""Settings: values of the groups `features`, `training` and `evaluation`."""

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from iciia_exp.errors import ConfigError, check_bool, check_choice, check_int
from iciia_exp.ledger import SITES, Site
from iciia_exp.recipe import Recipe

__all__ = ["HISTORY_LENGTHS", "PRECISIONS", "Evaluation", "Extraction", "Training"]

HISTORY_LENGTHS = (0, 1, 2, 3, 5, 10, 15, 30)

#: Lightning's precisions for weights of float32.
PRECISIONS = ("32-true", "32", "16-mixed", "16", "bf16-mixed", "bf16")

_MOST_IMAGES = 100_000  # of a chunk or a history, which see each other


class Extraction:
    """Settings of feature extraction.

    Args:
        dtype: ``float32`` or ``float16`` on disk.
        precision: precision of the computation, one of Lightning's (``16-mixed`` and ``bf16-mixed`` are about twice as
            fast on most GPUs); null is the trainer's.
        batch_size: images per step and device; null fits it to the size of an image.
        num_workers: processes per device that load images. On a CPU, null or 0 loads and computes in the same threads.
            On a GPU, null chooses by the number of images.
        on_bad_image: for images that are missing or cannot be decoded: ``skip`` leaves them out of every client and
            lists them in the manifest, ``error`` stops.
        devices: number of CPUs or GPUs of this machine that share the images. The features are the same, to the last
            digit with the same number of threads a process.
        num_nodes: number of machines that share the images; start the same command on each with torchrun or srun.
        jpeg: quality, 1 to 95, of the JPEG as which the network's input is sent to the cloud; null: uncompressed. The
            features are those of the decoded JPEG, and its size counts as the size of an image.
    """

    cosmetic: ClassVar[frozenset[str]] = frozenset(
        {"batch_size", "num_workers", "on_bad_image", "devices", "num_nodes"}
    )

    def __init__(
        self,
        dtype: str = "float32",
        precision: str | int | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        on_bad_image: str = "skip",
        devices: int = 1,
        num_nodes: int = 1,
        jpeg: int | None = None,
    ) -> None:
        self.jpeg = None if jpeg is None else check_int("jpeg", jpeg, 1, 95)
        self.dtype = check_choice("dtype", dtype, ("float32", "float16"))
        if precision is not None:
            check_choice("precision", str(precision), PRECISIONS)
        self.precision = precision
        self.batch_size = None if batch_size is None else check_int("batch_size", batch_size, 1)
        self.num_workers = None if num_workers is None else check_int("num_workers", num_workers, 0, 256)
        self.on_bad_image = check_choice("on_bad_image", on_bad_image, ("skip", "error"))
        self.devices, self.num_nodes = check_int("devices", devices, 1), check_int("num_nodes", num_nodes, 1)

    def workers(self, images: int, on_cpu: bool = False) -> int:
        """Return the number of loading processes; 0 for few images, whose loading is faster than starting processes."""
        if self.num_workers is not None or on_cpu:
            return self.num_workers or 0
        return 0 if images < 5000 else max(1, min(8, (os.cpu_count() or 1) // self.devices))


class Training:
    """Settings of a method's training, on chunks of a client's images that see each other.

    Args:
        recipe: optimiser, scheduler and number of epochs; ``batch_size`` counts clients.
        images: S, images of a chunk on val clients, and by default in training and evaluation.
        train_images: images of a chunk in training; null is ``images``.
        shuffle_images: cut each client's train images in a new order every epoch (published: false).
        patience: epochs without a better val accuracy before training stops; the value of
            ``callbacks.early_stopping.patience``.
        num_workers: processes that gather batches of stored features; 0 gathers them in the main process.
        prefetch_factor: batches that each of them gathers ahead; null is PyTorch's default.
        pin_memory: whether batches are gathered in page-locked memory; null: if they go to a GPU.
    """

    cosmetic: ClassVar[frozenset[str]] = frozenset({"num_workers", "prefetch_factor", "pin_memory", "patience"})

    def __init__(
        self,
        recipe: Recipe,
        images: int = 16,
        train_images: int | None = None,
        shuffle_images: bool = True,
        patience: int = 10,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        if not isinstance(recipe, Recipe):
            raise ConfigError("recipe", recipe, "must be a node with a _target_, as in conf/training/default.yaml")
        self.recipe = recipe
        self.images = check_int("images", images, 1, _MOST_IMAGES)
        self.train_images = (
            self.images if train_images is None else check_int("train_images", train_images, 1, _MOST_IMAGES)
        )
        self.shuffle_images = check_bool("shuffle_images", shuffle_images)
        self.patience = check_int("patience", patience, 0)
        self.num_workers = check_int("num_workers", num_workers, 0, 256)
        self.prefetch_factor = None if prefetch_factor is None else check_int("prefetch_factor", prefetch_factor, 1)
        if prefetch_factor is not None and not num_workers:
            raise ConfigError("prefetch_factor", prefetch_factor, "needs processes that gather: num_workers above 0")
        self.pin_memory = None if pin_memory is None else check_bool("pin_memory", pin_memory)

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of a ``DataLoader`` of client batches."""
        return {
            "num_workers": self.num_workers,
            "prefetch_factor": self.prefetch_factor,
            "pin_memory": torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            "persistent_workers": self.num_workers > 0,
        }


class Evaluation:
    """Settings of the evaluation of a trained method; changing them trains nothing again.

    Args:
        images: images of a chunk; null is the value of `Training`.
        cost_images: length of the sequence whose cost is reported; null is ``images``.
        site: where requests are served, for the reported cost: ``device``, to which the weights are sent once, or
            ``cloud``, to which every image is sent.
        history_lengths: numbers of images before a target for which accuracy is reported, in addition to all; empty
            reports none.
        history_orders: orders of a client's images in the ``stream`` protocol.
        history_longest: longest history.
        history_clients: largest number of test clients in the histories; of more, so many are drawn.
        drawn_clients: number of drawn clients of each type that the partition does not have.
        examples: targets in ``attribution.parquet``, or prompts in ``route_examples.parquet``; 0 leaves it out.
        neighbours: number of most influential other images of each example.
        pixels: longer side of an example's thumbnail.
    """

    def __init__(
        self,
        images: int | None = None,
        cost_images: int | None = None,
        site: Site = "device",
        history_lengths: Sequence[int] = HISTORY_LENGTHS,
        history_orders: int = 16,
        history_longest: int = 127,
        history_clients: int = 5000,
        drawn_clients: int = 0,
        examples: int = 12,
        neighbours: int = 5,
        pixels: int = 96,
    ) -> None:
        self.images = None if images is None else check_int("images", images, 1, _MOST_IMAGES)
        self.cost_images = None if cost_images is None else check_int("cost_images", cost_images, 1, _MOST_IMAGES)
        self.site: Site = check_choice("site", site, SITES)
        self.history_lengths = sorted({check_int("history_lengths", n, 0, _MOST_IMAGES) for n in history_lengths})
        self.history_orders = check_int("history_orders", history_orders, 1, 1000)
        self.history_clients = check_int("history_clients", history_clients, 1)
        self.drawn_clients = check_int("drawn_clients", drawn_clients, 0, 100_000)
        least = max([1, *self.history_lengths])
        self.history_longest = check_int("history_longest", history_longest, least, _MOST_IMAGES, "of history_lengths")
        self.examples = check_int("examples", examples, 0, 10_000)
        self.neighbours = check_int("neighbours", neighbours, 1, 100)
        self.pixels = check_int("pixels", pixels, 8, 1024)
