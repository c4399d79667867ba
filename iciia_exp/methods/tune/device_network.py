"""Device networks: every device trains a small network on an array that a backbone in the cloud sends for each image.

For every image, the image goes up and the array comes down. Labels stay on the device, and the cloud learns nothing.

Legend: C clients, S images of a client, L levels, n tokens, d features of a token, K classes of the dataset, k classes
of the client with most of them.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from iciia_exp.cost import training_bytes
from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import ConfigError, check_bool, check_choice, check_float, check_int
from iciia_exp.ledger import Budget, Line, Link, Phase, Sizes, payload_bytes
from iciia_exp.methods.base import Ask, Facts, Fit, Record
from iciia_exp.methods.tune.base import Learned, Personal
from iciia_exp.models.fit_many import Fitted, fit_many
from iciia_exp.models.lae import LAE, prefix_tokens
from iciia_exp.models.payloads import PAYLOADS, pack, packed_bytes, unpack
from iciia_exp.models.stacked import Examples
from iciia_exp.recipe import Recipe
from iciia_exp.seeding import derive_seed
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["DeviceNetwork", "LevelNetwork", "images_up"]

#: Logit of a class that the client does not have; its probability is 0 in float32.
_ABSENT = -1e4
#: Least deviation of a feature, as a share of the mean over all features. With few images and a ReLU, many features are
#: 0 in all train images; divided by almost nothing, one that is not 0 in a test image would outweigh all others.
_LEAST_DEVIATION = 0.05
#: Bias of an output without a class, of a client with fewer classes than another.
_UNUSED = -1e9


class DeviceNetwork(Personal):
    """A network for every client, trained on the client's own labels.

    A client has the classes of its train images; others have the probability 0. The epoch with the best accuracy on
    the client's val images is kept, the start included; without val images, the last of all epochs.

    A subclass names the ``array`` that comes down, and builds the `network`.

    Args:
        facts: task, sizes, and the shape of the array.
        standardise: subtract and divide by mean and standard deviation of the client's train images, for each feature
            (and level), class and register tokens apart from the patches. A deviation below a twentieth of
            the features' mean counts as that twentieth.
        payload: numbers that are sent: ``float32``, ``float16``, or ``int8`` with a scale for each token.
        lr: rate of AdamW, after a warm-up of a tenth of the epochs; cosine (``OneCycleLR``, which also moves beta 1
            from 0.95 to 0.85 and back). Of several, every client takes the one with the best accuracy on its val
            images.
        weight_decay: of all parameters.
        batch_size: images of a step.
        epochs: of the network.
        linear_epochs: of the linear classifier that training starts with, if there is one.
        linear_lr: rate of that classifier; None: ``lr``.
        patience: epochs without a better accuracy on the client's val images before training stops.
        seed: of initial values and orders.
    """

    trainable = False
    site = "both"
    tasks = (SINGLE_LABEL,)
    asks: ClassVar[frozenset[Ask]] = frozenset({Ask.CLIENT_LABELS})
    #: Name of the array that comes down.
    array: ClassVar[str]
    #: Clients whose images are classified together; None: all of a batch.
    clients_at_once: ClassVar[int | None] = None

    def __init__(
        self,
        facts: Facts,
        standardise: bool = True,
        payload: str = "float16",
        lr: float | Sequence[float] = 0.001,
        weight_decay: float = 0.05,
        batch_size: int = 32,
        epochs: int = 100,
        linear_epochs: int = 50,
        patience: int = 100,
        seed: int = 0,
        linear_lr: float | None = None,
    ) -> None:
        super().__init__(facts)
        if self.array not in facts.arrays:
            raise ConfigError("", self.name, f"reads {self.array}; choose a backbone that gives them")
        shape = facts.arrays[self.array]
        #: Shape of what is sent for an image: [n, d], or with several levels [L, n, d]. Features are one token.
        self.shape = shape if len(shape) > 1 else (1, *shape)
        self.width = self.shape[-1]
        #: Number of class and register tokens, and of kinds of tokens: these and the patches.
        self.prefix = prefix_tokens(self.shape[-2])
        self.kinds = 2 if self.prefix else 1
        self.standardise = check_bool("standardise", standardise)
        self.sent = check_choice("payload", payload, PAYLOADS)
        self.patience, self.seed = check_int("patience", patience, 1), check_int("seed", seed, 0)
        decay, rates = check_float("weight_decay", weight_decay, 0.0), _rates(lr)
        check_int("linear_epochs", linear_epochs, 1)
        own = None if linear_lr is None else check_float("linear_lr", linear_lr, 0.0, open_low=True)
        #: Of the network and of the linear classifier, for each rate.
        self.recipes = [
            [_recipe(rate, decay, epochs, batch_size), _recipe(own or rate, decay, linear_epochs, batch_size)]
            for rate in rates
        ]
        self.most_classes: Tensor
        self.register_buffer("most_classes", torch.tensor(self.num_classes))

    @abstractmethod
    def network(self, classes: int) -> nn.Module:
        """Build the network of a device: ``shape`` to logits of ``classes`` classes, with a linear ``head``.

        Its initial values may be random. On the meta device it must draw none.
        """

    @abstractmethod
    def network_macs(self, classes: int) -> int:
        """Return the MACs of the network for an image."""

    def input_macs(self) -> int:
        """Return the MACs of the layers that multiply the input itself, whose gradient is not computed."""
        return 0

    def linear_input(self, x: Tensor) -> Tensor:
        """Return what the linear classifier reads that training starts with, [C, S, n, d]; by default what is sent.

        The classifier is trained first, and the network's ``norm`` and ``head`` start with its values.
        """
        return x

    def linear_input_macs(self) -> int | None:
        """Return the MACs of `linear_input` for an image; None: training has no linear start."""
        return 0

    def linear(self, classes: int) -> LAE:
        """Build the linear classifier that training starts with."""
        return LAE(self.width, classes, blocks=0, prefix=1)

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Count the classes of the client with most of them; nothing is trained."""
        self.most_classes.fill_(max(1, int((cloud.class_counts("train") > 0).sum(1).max(initial=0))))
        self.eval()
        return {}

    def _drawn(self, build: Any) -> Any:
        """Return a network with the initial values of the seed, the same for every device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.name, self.seed))
            return build(self.classes).to(self.most_classes.device)

    def empty_network(self) -> nn.Module:
        """Return a client's network without values: for its shapes, and to call it with a client's state."""
        with torch.device("meta"):  # no memory and no random numbers: an evaluation classifies in several threads
            return self.network(self.classes).eval()

    @property
    def classes(self) -> int:
        """k, outputs of a client's classifier."""
        return int(self.most_classes)

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameters of the network, numbers of the classes [k] (-1: none), mean and deviation of what is sent."""
        shapes = {name: tuple(p.shape) for name, p in self.empty_network().named_parameters()}
        shapes["classes"] = (self.classes,)
        if self.standardise:
            shapes |= dict.fromkeys(("mean", "deviation"), (*self.shape[:-2], self.kinds, self.width))
        return shapes

    def personalise(self, own: Mapping[str, ClientBatch], link: Link, cloud: CloudView | None) -> Learned:
        """Train the network of every client on its train images; its val images choose epoch and rate."""
        classes_Ck = _own_classes(own["train"], self.classes)
        states = {"classes": classes_Ck.float()}
        received = {role: self._down(own[role], link) for role in ("train", "val")}
        if self.standardise:
            states |= self._moments(received["train"], own["train"].mask_CS)
        train, val = (self._examples(own[role], received.pop(role), classes_Ck, states) for role in ("train", "val"))
        net, linear = self._drawn(self.network), self._drawn(self.linear)
        before = None if self.linear_input_macs() is None else self.linear_input(train.x)
        shuffle = derive_seed(self.name, self.seed)
        best: Fitted | None = None
        epochs_C = torch.zeros(len(classes_Ck), dtype=torch.int64)
        for recipe, linear_recipe in self.recipes:
            starts = {"head.bias": torch.where(classes_Ck < 0, _UNUSED, 0.0)}
            if before is not None:
                few = train._replace(x=before)
                starts = fit_many(linear, few, val, self.task, linear_recipe, None, starts, shuffle).states
            fitted = fit_many(net, train, val, self.task, recipe, self.patience, starts, shuffle)
            epochs_C += fitted.epochs_C
            best = fitted if best is None else best.better(fitted)
        assert best is not None
        return Learned(states | best.states, epochs_C)

    def read(self, batch: ClientBatch) -> Tensor:
        """Return what is sent of a batch, [C, S, n, d] or [C, S, L, n, d]."""
        return batch.x_CSD.unsqueeze(-2) if self.array == "features" else batch.arrays[self.array]

    def _down(self, batch: ClientBatch, link: Link) -> Tensor:
        """Send the arrays of real images to the devices, as numbers of the payload; return them as received."""
        x, mask_CS = self.read(batch), batch.mask_CS
        out = torch.zeros_like(x)
        out[mask_CS] = unpack(link.down(self._kind, pack(x[mask_CS], self.sent), what="training"))
        return out

    @property
    def _kind(self) -> str:
        return "features" if self.array == "features" else "tokens"

    def _examples(self, batch: ClientBatch, x: Tensor, classes_Ck: Tensor, states: Mapping[str, Tensor]) -> Examples:
        """Return inputs and own labels; images of classes that the client does not have are left out."""
        same_CSk = batch.y_CS[:, :, None] == classes_Ck[:, None, :]
        return Examples(self._standard(x, states), same_CSk.int().argmax(2), batch.mask_CS & same_CSk.any(2))

    def _moments(self, x: Tensor, mask_CS: Tensor) -> dict[str, Tensor]:
        """Return mean and standard deviation of every client's images, each kind of token apart, [C, kinds, d]."""
        real, axes = mask_CS.view(*mask_CS.shape, *(1,) * (x.ndim - 2)).to(x.dtype), (1, x.ndim - 2)
        images_C = mask_CS.sum(1).clamp(min=1).view(-1, *(1,) * (x.ndim - 3))
        means, deviations = [], []
        for part in x.split([*filter(None, (self.prefix, self.shape[-2] - self.prefix))], -2):
            count = images_C * part.shape[-2]
            mean = (part * real).sum(axes) / count
            square = ((part - mean.unsqueeze(1).unsqueeze(-2)).square() * real).sum(axes) / count
            means.append(mean)
            deviation = square.sqrt()
            least = (_LEAST_DEVIATION * deviation.mean(-1, keepdim=True)).clamp(min=1e-6)
            deviations.append(torch.maximum(deviation, least))
        return {"mean": torch.stack(means, -2), "deviation": torch.stack(deviations, -2)}

    def _standard(self, x: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        if not self.standardise:
            return x
        kind_n = (torch.arange(self.shape[-2], device=x.device) >= self.prefix).long() * (self.kinds - 1)
        mean, deviation = (states[name][..., kind_n, :].unsqueeze(1) for name in ("mean", "deviation"))
        return (x - mean) / deviation

    def classify(self, batch: ClientBatch, states: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of the clients' networks, [C, S, K]; -10,000 for classes that a client does not have."""
        net = self.empty_network()
        parameters = {name: states[name] for name, _ in net.named_parameters()}
        call = vmap(lambda p, x: functional_call(net, p, (x,)), chunk_size=self.clients_at_once)
        return self._in_all(call(parameters, self._input(batch, states)), states)

    def classify_one(self, net: nn.Module, batch: ClientBatch, states: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of the one client of a batch, [1, S, K], for `torch.export`; ``net``: `empty_network`."""
        parameters = {name: states[name].squeeze(0) for name, _ in net.named_parameters()}
        own_Sk = functional_call(net, parameters, (self._input(batch, states).squeeze(0),))
        return self._in_all(own_Sk.unsqueeze(0), states)

    def _input(self, batch: ClientBatch, states: Mapping[str, Tensor]) -> Tensor:
        """Return what a device's network reads, [C, S, ...]."""
        return self._standard(unpack(pack(self.read(batch), self.sent)), states)

    def _in_all(self, own_CSk: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of the clients' own classes among those of all, [C, S, K]."""
        place_Ck = states["classes"].long()
        place_Ck = torch.where(place_Ck < 0, self.num_classes, place_Ck)  # a column for outputs without a class
        logits = own_CSk.new_full((*own_CSk.shape[:2], self.num_classes + 1), _ABSENT)
        return logits.scatter_(2, place_Ck[:, None].expand_as(own_CSk), own_CSk)[:, :, :-1]

    def budget(self, sizes: Sizes) -> Budget:
        """An image up, its array down, the backbone on the cloud, the network on the device.

        Training takes `training_macs`.
        """
        macs, size = self.network_macs(self.classes), packed_bytes(self.shape, self.sent)
        lines = [Line("client_once", "device", "training", macs=self.training_macs(sizes)), *images_up(sizes)]
        for phase, what, images in _sent(sizes):
            lines += [
                Line(phase, "cloud", "backbone", macs=_times(images, sizes.backbone_macs)),
                Line(phase, "cloud", what, kind=self._kind, bytes=images * size),
            ]
        if weights := payload_bytes(self.payload()):
            lines.append(Line("client_once", "cloud", "method", kind="weights", bytes=weights))
        lines.append(Line("request", "device", "method", macs=sizes.requested * macs))
        return Budget(tuple(lines), self.state_bytes())

    def training_macs(self, sizes: Sizes) -> int:
        """Return the MACs of a client's training.

        They are three times the network's for every train image and epoch (less `input_macs`), once for the val images
        of every epoch and each start, and 3 d k for every train image and epoch of a linear start.
        """
        macs = self.network_macs(self.classes)
        training = sizes.train * (sizes.epochs * (3 * macs - self.input_macs()) + self._linear_macs())
        return training + sizes.val * (sizes.epochs + len(self.recipes)) * macs

    def training_bytes(self) -> int:
        """Return the memory of a client's network in training with Adam."""
        return training_bytes(self.empty_network(), self.shape, self.recipes[0][0].batch_size)

    def _linear_macs(self) -> int:
        """Return the MACs of the linear start for a train image."""
        if (before := self.linear_input_macs()) is None:
            return 0
        epochs = sum(linear_recipe.epochs for _, linear_recipe in self.recipes)
        with torch.device("meta"):
            return before + 3 * epochs * self.linear(self.classes).macs(1)

    def payload(self) -> dict[str, Tensor]:
        """Return nothing: a device draws the initial values itself."""
        return {}

    def num_parameters(self) -> int:
        """Those of one client's network."""
        return sum(p.numel() for p in self.empty_network().parameters())


class LevelNetwork(DeviceNetwork):
    """A device network on several token levels of the backbone.

    Args:
        facts: task, sizes, and the shape of the levels.
        blocks: m; m + 1 levels are sent, evenly spaced from the first to the last. None: all.
        training: further arguments of `DeviceNetwork`.
    """

    reads = frozenset({"features", "levels"})
    array = "levels"

    def __init__(self, facts: Facts, blocks: int | None = None, **training: Any) -> None:
        super().__init__(facts, **training)
        most = self.shape[0] - 1
        stored = f"{self.shape[0]} levels are stored"
        blocks = most if blocks is None else check_int("blocks", blocks, 1, most, stored)
        #: Numbers of the levels that are sent.
        self.used = [round(i * most / blocks) for i in range(blocks + 1)]
        self.shape = (len(self.used), *self.shape[1:])

    def read(self, batch: ClientBatch) -> Tensor:
        """Return the levels that are sent, [C, S, L, n, d]."""
        levels = batch.arrays["levels"]
        return levels if len(self.used) == levels.shape[2] else levels[:, :, self.used]


def _sent(sizes: Sizes) -> list[tuple[Phase, str, int]]:
    """Return when images are sent, what for, and how many."""
    return [("client_once", "training", sizes.train + sizes.val), ("request", "method", sizes.requested)]


def _times(number: int, each: int | None) -> int | None:
    return None if each is None else number * each


def images_up(sizes: Sizes) -> list[Line]:
    """Return the lines of a client's images that go to the cloud, in training and in a request."""
    return [
        Line(phase, "device", what, kind="images", bytes=_times(images, sizes.image_bytes))
        for phase, what, images in _sent(sizes)
    ]


def _rates(lr: float | Sequence[float]) -> list[float]:
    if isinstance(lr, str) or not isinstance(lr, Sequence):
        return [check_float("lr", lr, 0.0, open_low=True)]
    if not lr:
        raise ConfigError("lr", list(lr), "must be a number above 0, or several")
    return [check_float("lr", rate, 0.0, open_low=True) for rate in lr]


def _recipe(lr: float, weight_decay: float, epochs: int, batch_size: int) -> Recipe:
    optimizer = partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay)
    return Recipe(optimizer, partial(torch.optim.lr_scheduler.OneCycleLR, pct_start=0.1), epochs, batch_size)


def _own_classes(train: ClientBatch, most: int) -> Tensor:
    """Return the classes of every client's train images in order, int64 [C, most], -1 after the last."""
    rows = []
    for y_S, mask_S in zip(train.y_CS.cpu().numpy(), train.mask_CS.cpu().numpy(), strict=True):
        own = np.unique(y_S[mask_S])[:most]
        rows.append(np.pad(own, (0, most - len(own)), constant_values=-1))
    return torch.from_numpy(np.stack(rows)).to(train.y_CS.device)
