"""A small cloud: classes that are apart, clients with two of them each."""

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import nn

from iciia_exp.data.batches import ClientIndex, FeatureBatches, cut_chunks
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.data.views import CloudView, Devices
from iciia_exp.ledger import Link, Sizes
from iciia_exp.methods.tune.base import Personal
from iciia_exp.tasks import SINGLE_LABEL

#: Sizes of the classifier and the client that `tests/methods/conftest.py` makes.
D, K, S = 12, 6, 7
#: Shape of an image's tokens.
TOKENS = (5, 8)
#: Shapes of the arrays that a method can read beside the features.
ARRAYS = {"tokens": TOKENS, "levels": (4, *TOKENS), "block_input": TOKENS, "images": (1, 3, 4)}
#: Methods that read other arrays than the features.
ON_TOKENS = ("full_finetune", "last", "last_block", "miet", "side_network")


class Network(nn.Module):
    """A backbone of such images, and a block that takes such tokens."""

    def __init__(self, dim=D):
        super().__init__()
        self.net = nn.Module()
        self.net.blocks = nn.ModuleList([Block(TOKENS[1], 2, qkv_bias=True, init_values=0.5)])
        convolution = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU()
        self.trunk = nn.Sequential(*convolution, nn.Dropout(), nn.Flatten(), nn.Linear(8 * 12, dim))
        self.head = nn.Linear(dim, K)

    def forward(self, images):
        return self.head(self.trunk(images))


@dataclass
class SmallCloud:
    """All clients and images, and what the cloud may read of them."""

    clients: Clients
    batches: FeatureBatches
    num_classes: int
    images: int

    @cached_property
    def view(self):
        backbone = partial(Network, self.batches.features.shape[1])
        return CloudView(self.clients, self.batches, self.num_classes, self.images, backbone=backbone)

    @property
    def devices(self):
        return Devices(self.clients, self.batches, test_labels=True)

    def chunks(self, role):
        """Yield every chunk of a role in one batch; of the test images too, which the view does not show."""
        yield self.batches[cut_chunks(self.clients[role], self.images)]


def no_fit(module, rows=None, recipe=None, arrays=None):
    """Train nothing: what else a method learns is looked at alone."""
    return {}


def plain_fit(view):
    """Return a loop in the place of Lightning that trains networks on single images; methods it leaves alone."""

    def fit(module, rows=None, recipe=None, arrays=None):
        if rows is not None:
            own = view.beside(rows, arrays) if arrays else view
            batch = own[ClientIndex(rows[:, None], np.zeros(len(rows), dtype=np.int64))]
            read = {name: batch.arrays[name][:, 0] for name in getattr(module, "reads", ())}
            optimizer = recipe.make_optimizer(module.train().parameters())
            for _ in range(recipe.epochs):
                optimizer.zero_grad()
                module.loss(batch.x_CSD[:, 0], batch.y_CS[:, 0], **read).backward()
                optimizer.step()
            module.eval().requires_grad_(False)
        return {}

    return fit


def small_cloud(dim, classes, clients=12, images=8, task=SINGLE_LABEL, seed=0, noise=1.0, owned=2):
    """Return train, val and test images of every client, ``images`` each."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, dim)) * 2
    own = np.stack([rng.permutation(classes)[:owned] for _ in range(clients)])
    client = np.repeat(np.arange(clients), 3 * images)
    labels = own[client, rng.integers(0, owned, len(client))]
    features = (centres[labels] + noise * rng.standard_normal((len(client), dim))).astype(np.float32)
    role = np.tile(np.repeat(np.arange(3), images), clients)
    names = np.array([f"client {i}" for i in range(clients)], dtype=object)
    rows = [Ragged.from_pairs(client[role == r], np.flatnonzero(role == r), clients) for r in range(3)]
    if task != SINGLE_LABEL:
        labels = np.eye(classes, dtype=np.uint8)[labels] | np.eye(classes, dtype=np.uint8)[(labels + 1) % classes]
    tokens = np.stack([features[:, : TOKENS[1]] * scale for scale in range(1, TOKENS[0] + 1)], 1)
    levels = np.stack([tokens, tokens + 1, 2 * tokens, tokens - 1], 1)
    pictures = np.tile(features, 12)[:, :12].reshape(-1, *ARRAYS["images"])
    arrays = {"tokens": tokens, "levels": levels, "block_input": tokens, "images": pictures}
    batches = FeatureBatches(features, labels, arrays=arrays)
    return SmallCloud(Clients(names, names, *rows), batches, classes, images)


class States:
    """States of all clients in memory."""

    def __init__(self, states):
        self.states = states
        self.shapes = {name: tuple(state.shape[1:]) for name, state in states.items()}

    def of(self, client_C):
        return {name: state[client_C] for name, state in self.states.items()}


def personalised(method, cloud):
    """Let all devices learn; return the link that counted their payloads, and the epochs of each."""
    link = Link(method.name, method.budget(Sizes()))
    with torch.no_grad():
        learned = method.personalise(cloud.devices.own(cloud.devices.tested), link, cloud.view)
    method.states = States(learned.states)
    return link, learned.epochs_C


def taught(method, cloud):
    """Let a method learn, then all devices; return it with the link and the epochs of `personalised`."""
    method.eval()
    method.learn(cloud.view, no_fit)
    return method, *personalised(method, cloud)


def accuracy(method, cloud):
    """Return the accuracy on all test images of a cloud."""
    (batch,) = cloud.chunks("test")
    right = method.logits(batch).argmax(-1) == batch.y_CS
    return float(right[batch.mask_CS].float().mean())


def studied(method, **cloud):
    """Return a method that has learned from a small cloud of its sizes, and the cloud."""
    cloud = small_cloud(method.dim, method.num_classes, task=method.task, **cloud)
    method.eval()
    method.learn(cloud.view, no_fit)
    if isinstance(method, Personal):
        personalised(method, cloud)
    return method, cloud
