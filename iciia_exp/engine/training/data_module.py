"""Data module: client batches of stored features for a Lightning Trainer.

    data = iciia_exp.client_data("partition=dirichlet")
    lightning.Trainer(max_epochs=3).fit(MyModule(), data)

Every batch is a `ClientBatch`: chunks of up to S images, each of one client.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader

from iciia_exp.data.batches import ClientBatch, ClientBatchSampler, ClientIndex, FeatureBatches
from iciia_exp.data.clients import Clients
from iciia_exp.errors import UserError

__all__ = ["ClientDataModule"]


class ClientDataModule(pl.LightningDataModule):
    """Batches of the train, val and test images of every client.

    Several processes (``Trainer(devices=2, use_distributed_sampler=False)``) share every batch between them.

    Args:
        clients: the partition.
        batches: features and labels of all images.
        images: S, images of a chunk on val and test clients.
        train_images: images of a chunk in training; None: ``images``.
        batch_size: chunks of a train batch, over all processes.
        eval_batch_size: chunks of a val or test batch, over all processes.
        shuffle_images: cut each client's train images in a new order every epoch.
        seed: of the orders.
        draw: draws the train chunks of an epoch in place of the clients' own (`ClientBatchSampler`).
        train_batches: other features for train batches (with out-of-fold logits); None: ``batches``.
        loading: arguments of the data loaders: ``num_workers``, ``prefetch_factor``, ``pin_memory``. Workers give the
            same batches as none.
    """

    def __init__(
        self,
        clients: Clients,
        batches: FeatureBatches,
        images: int = 16,
        train_images: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 64,
        shuffle_images: bool = True,
        seed: int = 0,
        draw: tuple[Callable[[np.random.Generator], ClientIndex], int] | None = None,
        train_batches: FeatureBatches | None = None,
        loading: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.clients, self.batches, self.train_batches = clients, batches, train_batches or batches
        self.images, self.train_images = images, train_images or images
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.order: dict[str, Any] = {"shuffle": True, "shuffle_images": shuffle_images, "seed": seed, "draw": draw}
        self.loading = loading or {}

    def train_dataloader(self) -> DataLoader[ClientBatch]:
        """Return batches of train images, in an order that depends on seed and epoch."""
        return self._loader(self.train_batches, "train", self.train_images, self.batch_size, **self.order)

    def val_dataloader(self) -> DataLoader[ClientBatch]:
        """Return batches of the images of val clients."""
        return self._loader(self.batches, "val", self.images, self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[ClientBatch]:
        """Return batches of the images of test clients."""
        return self._loader(self.batches, "test", self.images, self.eval_batch_size)

    def _loader(
        self, batches: FeatureBatches, role: str, images: int, batch_size: int, **order: Any
    ) -> DataLoader[ClientBatch]:
        if (trainer := self.trainer) is not None and trainer.world_size > 1:
            if trainer._accelerator_connector.use_distributed_sampler:
                raise UserError("Trainer(use_distributed_sampler=False): the data module shares the clients out itself")
            order |= {"rank": trainer.global_rank, "world_size": trainer.world_size}
        sampler = ClientBatchSampler(self.clients[role], images, batch_size, **order)
        return DataLoader(batches, batch_size=None, sampler=sampler, **self.loading)
