"""Personal classifiers: a linear classifier for every client, in the place of the backbone's, or a whole network.

Legend: C clients, S images of a client, D features, K classes.
"""

import copy
from collections.abc import Mapping
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from iciia_exp.cost import count_macs, count_step_macs, training_bytes
from iciia_exp.data.batches import ClientBatch
from iciia_exp.errors import check_float, check_int
from iciia_exp.ledger import Budget, Line, Sizes, serve
from iciia_exp.methods.base import Facts, copy_of
from iciia_exp.methods.tune.base import Personal
from iciia_exp.models.on_catalog import OnCatalog
from iciia_exp.models.stacked import Examples
from iciia_exp.models.stacked_linear import linear_logits
from iciia_exp.models.stacked_tables import table_logits
from iciia_exp.recipe import Recipe

__all__ = ["PersonalClassifier", "sgd_recipe"]


def sgd_recipe(lr: float, epochs: int, batch_size: int, clip_norm: float) -> Recipe:
    """Return the recipe of plain SGD at a constant rate."""
    sgd = partial(torch.optim.SGD, lr=check_float("lr", lr, 0.0, open_low=True))
    return Recipe(sgd, None, epochs, batch_size, check_float("clip_norm", clip_norm, 0.0, open_low=True))


class PersonalClassifier(Personal):
    """A linear classifier for every client, trained by plain SGD from the backbone's.

    Args:
        facts: task, sizes, and the backbone's classifier.
        recipe: of a device's training.
        patience: epochs on the own images without a better accuracy on the client's val images before training stops;
            the best is kept. None, or no val images: all of them, and the last is kept.
    """

    def __init__(self, facts: Facts, recipe: Recipe, patience: int | None) -> None:
        super().__init__(facts)
        self.recipe = recipe
        self.patience = None if patience is None else check_int("patience", patience, 1)
        self.head = copy_of(facts.head, trained=False)
        #: Array that a client's network reads, and its shape for one image.
        self.array = "features"
        self.shape: tuple[int, ...] = (facts.dim,)

    @property
    def net(self) -> nn.Module:
        """The network that every client has its own of: a linear classifier on features."""
        return self.head

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of the network; of a classifier weight [K, D] and bias [K]."""
        return {name: tuple(p.shape) for name, p in self.starting().items()}

    def starting(self) -> dict[str, Tensor]:
        """Return the cloud's values of what devices train, by name."""
        return {name: p.detach() for name, p in self.net.named_parameters()}

    def read(self, batch: ClientBatch) -> Tensor:
        """Return what the network reads of a batch, [C, S, ...]."""
        return batch.x_CSD if self.array == "features" else batch.arrays[self.array]

    def examples(self, batch: ClientBatch) -> Examples:
        """Return labelled images of a batch for `fit_many`."""
        return Examples(self.read(batch), batch.y_CS, batch.mask_CS)

    def classify(self, batch: ClientBatch, states: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of the clients' networks, [C, S, K]."""
        x = self.read(batch)
        if self.net is self.head:
            return linear_logits(states, x)
        assert isinstance(self.net, OnCatalog)
        return table_logits(self.net, states, x, batch.mask_CS)

    @cached_property
    def forward_macs(self) -> int:
        """MACs of the network for one image."""
        return self.head.weight.numel() if self.net is self.head else count_macs(self.net, self._example())

    @cached_property
    def step_macs(self) -> int:
        """MACs of one image in a step of training: logits and gradient."""
        if self.net is self.head:
            return 2 * self.head.weight.numel()
        return count_step_macs(self.net, self._example())

    def _example(self) -> Tensor:
        return torch.zeros(1, *self.shape, device=self.head.weight.device)

    def device_budget(self, sizes: Sizes, macs: int = 0, *, judged: bool = False, sent: bool = False) -> Budget:
        """Return the budget of a network that replaces the backbone's classifier, or the backbone.

        Training takes `step_macs` for a train image and epoch, of a classifier 2 D K, the same for a sample of others
        and pass, and with ``patience`` `forward_macs` for the val images of every epoch and the start. A classifier
        reads the backbone's features of the train images, and of the val images if they decide something.

        Args:
            sizes: of client and request.
            macs: of the device's training beside these.
            judged: whether val images decide without ``patience``, too.
            sent: whether the train images' features are sent, which a network that replaces the backbone needs for
                nothing else.
        """
        served = serve(sizes, self.num_classes, macs=0, weights=0, state_bytes=self.state_bytes())
        macs += (sizes.passed + sizes.epochs * sizes.train) * self.step_macs
        if self.patience is not None:
            macs += (sizes.epochs + 1) * sizes.val * self.forward_macs
        images = sizes.train if sent else 0
        if self.net is self.head:
            images = sizes.train + (sizes.val if judged or self.patience is not None else 0)
        own = None if sizes.backbone_macs is None else images * sizes.backbone_macs
        learned = (
            Line("client_once", "device", "backbone", macs=own),
            Line("client_once", "device", "training", macs=macs),
        )
        return Budget(served.lines + learned, served.state_bytes)

    def training_bytes(self) -> int:
        """Return the memory of a client's network in training with plain SGD."""
        network = copy.deepcopy(self.net).to("meta").requires_grad_(True)
        return training_bytes(network, self.shape, self.recipe.batch_size, moments=0)

    def num_parameters(self) -> int:
        """Those of one client's network."""
        return sum(p.numel() for p in self.starting().values())
