"""Client batches in a Trainer of the user's own, and from worker processes."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import iciia_exp
from iciia_exp.data.client_mix import unseen
from iciia_exp.engine.execute import execute
from iciia_exp.engine.training.data_module import ClientDataModule
from iciia_exp.errors import UserError
from tests.making.cloud import small_cloud

ALONE = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}


class MeanFeature(pl.LightningModule):
    """What a user writes in a notebook: a linear classifier of an image and the mean of its client's images."""

    def __init__(self, dim, classes):
        super().__init__()
        self.linear, self.seen = nn.Linear(2 * dim, classes), []

    def _logits(self, batch):
        mean_C1D = batch.x_CSD.sum(1, keepdim=True) / batch.mask_CS.sum(1)[:, None, None]
        return self.linear(torch.cat([batch.x_CSD, mean_C1D.expand_as(batch.x_CSD)], 2))

    def training_step(self, batch, batch_idx):
        self.seen += batch.client_C.tolist()
        return nn.functional.cross_entropy(self._logits(batch)[batch.mask_CS], batch.y_CS[batch.mask_CS])

    def validation_step(self, batch, batch_idx):
        right = (self._logits(batch).argmax(-1) == batch.y_CS)[batch.mask_CS]
        self.log("val/accuracy", right.float().mean(), batch_size=len(right))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many", "ignore:.*smaller than the logging", "ignore:.*LeafSpec")
def test_a_user_s_module_trains_on_the_batches_of_an_experiment(small):
    data = iciia_exp.client_data(*small)
    module = MeanFeature(32, 10)
    trainer = pl.Trainer(max_epochs=3, **ALONE)
    trainer.fit(module, data)
    (result,) = trainer.test(module, data, verbose=False)
    assert 0 <= result["val/accuracy"] <= 1
    clients = data.clients.train.lengths.nonzero()[0]  # of 16 images, one chunk each
    assert sorted(module.seen) == sorted([*clients] * 3)


def test_unseen_types_are_not_among_the_val_clients(small):
    data = iciia_exp.client_data("+experiment=digits_parents", *small, "client_mix.unseen_types=0.34")
    (left_out,) = unseen(data.clients.types, 0.34)
    types = {data.clients.types[client] for batch in data.val_dataloader() for client in batch.client_C}
    assert types == set(data.clients.types) - {left_out}
    assert left_out in {data.clients.types[client] for batch in data.test_dataloader() for client in batch.client_C}


def batches_of(**loading):
    cloud = small_cloud(8, 4, clients=12, images=10)
    data = ClientDataModule(cloud.clients, cloud.batches, images=4, batch_size=5, seed=2, loading=loading)
    return [batch for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader]


def test_workers_give_the_same_batches():
    for one, other in zip(batches_of(), batches_of(num_workers=2, prefetch_factor=3), strict=True):
        for name in ("x_CSD", "y_CS", "mask_CS", "client_C", "image_CS"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_workers_give_the_same_numbers(stages, undrawn):
    plain = execute(stages())
    made = stages(
        "training.num_workers=1", "training.prefetch_factor=1", "training.pin_memory=false", "output_dir=other"
    )
    assert made.run.digest == stages().run.digest
    row = execute(made)
    for key in ("accuracy", "log_loss", "val_accuracy"):
        assert row[key] == plain[key]


def test_lightning_s_own_sampler_is_refused():
    cloud = small_cloud(8, 4)
    data = ClientDataModule(cloud.clients, cloud.batches)
    data.trainer = pl.Trainer(devices=2, **ALONE)
    with pytest.raises(UserError, match="use_distributed_sampler=False"):
        data.train_dataloader()
    data.trainer = pl.Trainer(devices=2, use_distributed_sampler=False, **ALONE)
    assert data.train_dataloader().sampler.world_size == 2
