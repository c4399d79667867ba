"""MIET: a device trains a small network on its own labels; its input are tokens that a cloud backbone sends.

Source: "Minimal Interaction Separated Tuning" (CVPR 2025, arXiv 2406.17559): the backbone on the cloud is frozen, one
sum of its token levels comes down for every image (`iciia_exp.models.gather`), and the device trains low-rank attention
and a classifier on it (`iciia_exp.models.lae`). Number of blocks, rank, pooling, standardisation, the start at a linear
classifier and the recipe are ours: the paper's are not public.

For every image, the image goes up and its tokens come down. Labels stay on the device.

Legend: C clients, S images of a client, n tokens, d features of a token, K classes of the dataset, k classes of the
client with most of them.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, vmap

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import ConfigError, check_bool, check_choice, check_float, check_int
from iciia_exp.ledger import Budget, Line, Link, Phase, Sizes
from iciia_exp.methods.base import Ask, Facts, Fit, Record
from iciia_exp.methods.tune.base import Learned, Personal
from iciia_exp.models.fit_many import Examples, fit_many
from iciia_exp.models.lae import LAE, prefix_tokens
from iciia_exp.models.payloads import PAYLOADS, pack_tokens, token_bytes, unpack_tokens
from iciia_exp.recipe import Recipe
from iciia_exp.seeding import derive_seed
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["Miet"]

#: Logit of a class that the client does not have; its probability is 0 in float32.
_ABSENT = -1e4
#: Bias of an output without a class, of a client with fewer classes than another.
_UNUSED = -1e9


class Miet(Personal):
    """Low-rank attention and a classifier for every client, on the tokens of a backbone.

    A client has the classes of its train images; others have the probability 0. Training starts as a linear classifier
    on the pooled token, which is trained first, and the epoch with the best accuracy on the client's val images is
    kept.

    Args:
        facts: task, sizes, and the shape of the tokens.
        blocks: m; 0 is a linear classifier.
        rank: r.
        heads: H.
        pool: ``class``: the class token is classified; ``mean``: the mean over the patches.
        subtract: classify what the blocks added (LAST).
        standardise: subtract and divide by mean and standard deviation of the client's train images, for each channel,
            class and register tokens apart from the patches.
        payload: numbers that are sent: ``float32``, ``float16``, or ``int8`` with a scale for each token.
        lr: rate of AdamW, after a warm-up of a tenth of the epochs; cosine.
        weight_decay: of all parameters.
        batch_size: images of a step.
        epochs: of the network.
        linear_epochs: of the linear classifier at its start; unused without blocks.
        patience: epochs without a better accuracy on the client's val images before training stops.
        seed: of initial values and orders.
    """

    name = "miet"
    trainable = False
    tasks = (SINGLE_LABEL,)
    reads: ClassVar[frozenset[str]] = frozenset({"features", "tokens"})
    asks: ClassVar[frozenset[Ask]] = frozenset({Ask.CLIENT_LABELS})

    def __init__(
        self,
        facts: Facts,
        blocks: int = 2,
        rank: int = 16,
        heads: int = 1,
        pool: str = "class",
        subtract: bool = False,
        standardise: bool = True,
        payload: str = "float16",
        lr: float = 0.001,
        weight_decay: float = 0.05,
        batch_size: int = 32,
        epochs: int = 100,
        linear_epochs: int = 50,
        patience: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(facts)
        if "tokens" not in facts.arrays:
            raise ConfigError("", self.name, "reads tokens; choose a backbone that gives them")
        self.tokens, self.width = facts.arrays["tokens"]
        self.prefix = prefix_tokens(self.tokens)
        self.standardise = check_bool("standardise", standardise)
        self.sent = check_choice("payload", payload, PAYLOADS)
        self.patience, self.seed = check_int("patience", patience, 1), check_int("seed", seed, 0)
        self._settings: dict[str, Any] = {
            "blocks": blocks,
            "rank": rank,
            "heads": heads,
            "pool": pool,
            "subtract": subtract,
        }
        optimizer = partial(
            torch.optim.AdamW,
            lr=check_float("lr", lr, 0.0, open_low=True),
            weight_decay=check_float("weight_decay", weight_decay, 0.0),
        )
        scheduler = partial(torch.optim.lr_scheduler.OneCycleLR, pct_start=0.1)
        self.recipe = Recipe(optimizer, scheduler, epochs, batch_size)
        self.linear_recipe = Recipe(optimizer, scheduler, check_int("linear_epochs", linear_epochs, 1), batch_size)
        self.most_classes: Tensor
        self.register_buffer("most_classes", torch.tensor(self.num_classes))
        self._form()  # errors of its settings

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Count the classes of the client with most of them; the backbone is frozen and nothing is trained."""
        self.most_classes.fill_(max(1, int((cloud.class_counts("train") > 0).sum(1).max(initial=0))))
        self.eval()
        return {}

    def _lae(self, classes: int, linear: bool = False) -> LAE:
        settings = {**self._settings, "blocks": 0, "subtract": False} if linear else self._settings
        return LAE(self.width, classes, **settings, prefix=self.prefix)

    def _network(self, classes: int, linear: bool = False) -> LAE:
        """Return the network that every device starts with, or the linear classifier that is trained first."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("miet", self.seed))
            return self._lae(classes, linear).to(self.most_classes.device)

    def _form(self) -> LAE:
        """Return a client's network without values: for its shapes and costs, and to call it with a client's state."""
        with torch.device("meta"):  # no memory and no random numbers: an evaluation classifies in several threads
            return self._lae(self.classes)

    @property
    def classes(self) -> int:
        """k, outputs of a client's classifier."""
        return int(self.most_classes)

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameters of the network, numbers of the classes [k] (-1: none), mean and deviation of the tokens [2, d]."""
        shapes = {name: tuple(p.shape) for name, p in self._form().named_parameters()}
        shapes["classes"] = (self.classes,)
        if self.standardise:
            shapes |= {"mean": (2, self.width), "deviation": (2, self.width)}
        return shapes

    def personalise(self, own: Mapping[str, ClientBatch], link: Link) -> Learned:
        """Train the network of every client on its train images; its val images choose the epoch."""
        states: dict[str, Tensor] = {}
        classes_Ck = _own_classes(own["train"], self.classes)
        states["classes"] = classes_Ck.float()
        tokens = {role: self._down(own[role].arrays["tokens"], own[role].mask_CS, link) for role in ("train", "val")}
        if self.standardise:
            states |= _moments(tokens["train"], own["train"].mask_CS, self.prefix)
        train, val = (self._examples(own[role], tokens.pop(role), classes_Ck, states) for role in ("train", "val"))
        net, linear = self._network(self.classes), self._network(self.classes, linear=True)
        starts, shuffle = {"head.bias": torch.where(classes_Ck < 0, _UNUSED, 0.0)}, derive_seed("miet", self.seed)
        if not net.blocks:
            train, val = self._read_by(linear, train), self._read_by(linear, val)
        else:
            few = self._read_by(linear, train), self._read_by(linear, val)
            starts = fit_many(linear, *few, self.task, self.linear_recipe, None, starts, shuffle).states
        parameters, epochs_C = fit_many(net, train, val, self.task, self.recipe, self.patience, starts, shuffle)
        return Learned(states | parameters, epochs_C)

    @staticmethod
    def _read_by(net: LAE, images: Examples) -> Examples:
        """Return images with the tokens that a network without blocks reads."""
        return images._replace(x=images.x[:, :, :1]) if net.pool == "class" else images

    def _down(self, tokens_CSnd: Tensor, mask_CS: Tensor, link: Link) -> Tensor:
        """Send the tokens of real images to the devices, as numbers of the payload; return them as received."""
        received = link.down("tokens", pack_tokens(tokens_CSnd[mask_CS], self.sent), what="training")
        out = torch.zeros_like(tokens_CSnd)
        out[mask_CS] = unpack_tokens(received)
        return out

    def _examples(
        self, batch: ClientBatch, tokens_CSnd: Tensor, classes_Ck: Tensor, states: Mapping[str, Tensor]
    ) -> Examples:
        """Return tokens and own labels; images of classes that the client does not have are left out."""
        same_CSk = batch.y_CS[:, :, None] == classes_Ck[:, None, :]
        return Examples(self._standard(tokens_CSnd, states), same_CSk.int().argmax(2), batch.mask_CS & same_CSk.any(2))

    def _standard(self, tokens_CSnd: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        if not self.standardise:
            return tokens_CSnd
        kind_n = (torch.arange(self.tokens, device=tokens_CSnd.device) >= self.prefix).long()
        mean_C1nd, deviation_C1nd = (states[name][:, kind_n][:, None] for name in ("mean", "deviation"))
        return (tokens_CSnd - mean_C1nd) / deviation_C1nd

    def classify(self, batch: ClientBatch, states: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of the clients' networks, [C, S, K]; -10,000 for classes that a client does not have."""
        tokens_CSnd = unpack_tokens(pack_tokens(batch.arrays["tokens"], self.sent))
        net = self._form()
        parameters = {name: states[name] for name, _ in net.named_parameters()}
        own_CSk = vmap(lambda p, x: functional_call(net, p, (x,)))(parameters, self._standard(tokens_CSnd, states))
        place_Ck = states["classes"].long()
        place_Ck = torch.where(place_Ck < 0, self.num_classes, place_Ck)  # a column for outputs without a class
        logits = own_CSk.new_full((*own_CSk.shape[:2], self.num_classes + 1), _ABSENT)
        return logits.scatter_(2, place_Ck[:, None].expand_as(own_CSk), own_CSk)[:, :, :-1]

    def budget(self, sizes: Sizes) -> Budget:
        """An image up, its tokens down, the backbone on the cloud; on the device m (4 n d r + 2 n^2 r) + d k MACs.

        Training takes three times that for every train image and epoch, once for the val images of every epoch and the
        start, and 3 d k for every train image and epoch of the linear start.
        """
        net = self._form()
        macs, once = net.macs(self.tokens), sizes.train + sizes.val
        size = token_bytes(self.tokens, self.width, self.sent)

        def times(number: int, each: int | None) -> int | None:
            return None if each is None else number * each

        training = (3 * sizes.epochs * sizes.train + (sizes.epochs + 1) * sizes.val) * macs
        if net.blocks:
            training += 3 * self.linear_recipe.epochs * sizes.train * self.width * self.classes
        lines = [Line("client_once", "device", "training", macs=training)]
        sent: list[tuple[Phase, str, int]] = [("client_once", "training", once), ("request", "method", sizes.requested)]
        for phase, what, images in sent:
            lines += [
                Line(phase, "device", what, kind="images", bytes=times(images, sizes.image_bytes)),
                Line(phase, "cloud", "backbone", macs=times(images, sizes.backbone_macs)),
                Line(phase, "cloud", what, kind="tokens", bytes=images * size),
            ]
        lines.append(Line("request", "device", "method", macs=sizes.requested * macs))
        return Budget(tuple(lines), self.state_bytes())

    def payload(self) -> dict[str, Tensor]:
        """Return nothing: a device draws the initial values itself."""
        return {}

    def num_parameters(self) -> int:
        """Those of one client's network."""
        return sum(p.numel() for p in self._form().parameters())


def _own_classes(train: ClientBatch, most: int) -> Tensor:
    """Return the classes of every client's train images in order, int64 [C, most], -1 after the last."""
    rows = []
    for y_S, mask_S in zip(train.y_CS.cpu().numpy(), train.mask_CS.cpu().numpy(), strict=True):
        own = np.unique(y_S[mask_S])[:most]
        rows.append(np.pad(own, (0, most - len(own)), constant_values=-1))
    return torch.from_numpy(np.stack(rows)).to(train.y_CS.device)


def _moments(tokens_CSnd: Tensor, mask_CS: Tensor, prefix: int) -> dict[str, Tensor]:
    """Return mean and standard deviation of every client's tokens, [C, 2, d] each: before the patches, and patches."""
    real_CS11 = mask_CS[:, :, None, None].to(tokens_CSnd.dtype)
    images_C1 = mask_CS.sum(1, keepdim=True).clamp(min=1)
    means, deviations = [], []
    for part_CSpd in (tokens_CSnd[:, :, :prefix], tokens_CSnd[:, :, prefix:]):
        count_C1 = images_C1 * max(1, part_CSpd.shape[2])
        mean_Cd = (part_CSpd * real_CS11).sum((1, 2)) / count_C1
        square_Cd = ((part_CSpd - mean_Cd[:, None, None]).square() * real_CS11).sum((1, 2)) / count_C1
        means.append(mean_Cd)
        deviations.append(square_Cd.sqrt().clamp(min=1e-6))
    return {"mean": torch.stack(means, 1), "deviation": torch.stack(deviations, 1)}
