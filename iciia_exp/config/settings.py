"""Settings: the values of the groups `features`, `training` and `evaluation`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

from iciia_exp.errors import check_bool, check_choice, check_int
from iciia_exp.recipe import Recipe

__all__ = ["HISTORY_LENGTHS", "Extraction", "Protocol", "Retrieval"]


class Extraction:
    """How features are computed and stored.

    Args:
        dtype: ``float32`` or ``float16`` on disk.
        precision: of the computation, one of Lightning's (``16-mixed`` and ``bf16-mixed`` are about twice as fast on
            most GPUs); null is the trainer's.
        batch_size: images per step and device; null fits it to the size of an image.
        num_workers: processes per device that load images; null or 0 needs none on a processor, whose cores load and
            compute in turn, each its own batch. For a GPU, null chooses by the number of images.
        on_bad_image: what to do with an image that is missing or cannot be decoded: ``skip`` leaves it out of every
            client and lists it in the manifest, ``error`` stops.
        devices: processors or GPUs of this machine that share the images. The features are the same, to the last digit
            where a process has as many threads.
        num_nodes: machines that share the images; start the same command on each with torchrun or srun.
    """

    cosmetic: ClassVar[frozenset[str]] = frozenset(
        {"batch_size", "num_workers", "on_bad_image", "devices", "num_nodes"}
    )

    def __init__(
        self,
        dtype: str = "float32",
        precision: str | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        on_bad_image: str = "skip",
        devices: int = 1,
        num_nodes: int = 1,
    ) -> None:
        self.dtype = check_choice("dtype", dtype, ("float32", "float16"))
        self.precision = precision
        self.batch_size = None if batch_size is None else check_int("batch_size", batch_size, 1)
        self.num_workers = None if num_workers is None else check_int("num_workers", num_workers, 0)
        self.on_bad_image = check_choice("on_bad_image", on_bad_image, ("skip", "error"))
        self.devices, self.num_nodes = check_int("devices", devices, 1), check_int("num_nodes", num_nodes, 1)

    def workers(self, images: int, on_cpu: bool = False) -> int:
        """Return the number of loading processes: none for what is loaded before they have started."""
        if self.num_workers is not None or on_cpu:
            return self.num_workers or 0
        return 0 if images < 5000 else max(1, min(8, (os.cpu_count() or 1) // self.devices))


HISTORY_LENGTHS = (0, 1, 2, 3, 5, 10, 15, 30)


class Protocol:
    """Batch protocol: a client's images in chunks; the images of a chunk see each other.

    Args:
        recipe: optimisation; ``batch_size`` counts clients.
        images: S, images of a chunk, in evaluation and, without ``train_images``, in training.
        cost_images: length of the sequence whose cost is reported; null is ``images``.
        shuffle_images: cut every client's training images in a new order each epoch (published: false).
        train_images: images of a chunk in training; null is ``images``.
        history_lengths: images before a target for which accuracy is reported (`iciia_exp.engine.evaluation.history`), beside all
            that there are; empty reports none.
        history_orders: orders of a client's images in the ``stream`` protocol.
        history_longest: no history has more images.
        history_clients: of more test clients, so many are drawn for the histories.
        kinds_clients: clients that are drawn of each kind unlike the partition's (`iciia_exp.engine.evaluation.drawn_clients`); 0 is none.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: int = 16,
        shuffle_images: bool = True,
        cost_images: int | None = None,
        train_images: int | None = None,
        history_lengths: Sequence[int] = HISTORY_LENGTHS,
        history_orders: int = 16,
        history_longest: int = 127,
        history_clients: int = 5000,
        kinds_clients: int = 0,
    ) -> None:
        self.recipe = recipe
        self.images = check_int("images", images, 1)
        self.cost_images = self.images if cost_images is None else check_int("cost_images", cost_images, 1)
        self.shuffle_images = check_bool("shuffle_images", shuffle_images)
        self.train_images = self.images if train_images is None else check_int("train_images", train_images, 1)
        self.history_lengths = sorted({check_int("history_lengths", n, 0) for n in history_lengths})
        self.history_orders = check_int("history_orders", history_orders, 1)
        self.history_clients = check_int("history_clients", history_clients, 1)
        self.kinds_clients = check_int("kinds_clients", kinds_clients, 0)
        least = max([1, *self.history_lengths])
        self.history_longest = check_int("history_longest", history_longest, least, why="of history_lengths")


class Retrieval:
    """How many examples a run keeps.

    Args:
        examples: targets; 0 leaves ``retrieval.parquet`` out.
        neighbours: other images of each, those that count most.
        pixels: longer side of a thumbnail.
    """

    def __init__(self, examples: int = 12, neighbours: int = 5, pixels: int = 96) -> None:
        self.examples = check_int("examples", examples, 0)
        self.neighbours = check_int("neighbours", neighbours, 1)
        self.pixels = check_int("pixels", pixels, 8)
