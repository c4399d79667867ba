"""Co-trained methods: the cloud and the devices train a small network together, in rounds.

In a round, the network goes down to some devices, each trains its copy on its own labelled images, the copies go up,
and their average is the network of the next round. The cloud may train a copy on its own images as well. Methods speak
of jobs as Flower's strategies do: configure, train, aggregate. The same code runs in one process
(`iciia_exp.engine.rounds`) and behind Flower (`iciia_exp.engine.flower`).

Legend: n images of a site, B images of a batch, K classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from iciia_exp.cost import count_macs, count_step_macs
from iciia_exp.data.batches import ClientBatch
from iciia_exp.errors import ConfigError, NotApplicable, UserError, check_bool, check_choice, check_float, check_int
from iciia_exp.ledger import KINDS, Budget, Line, Link, Sizes, total
from iciia_exp.ledger import Site as Place
from iciia_exp.methods.base import Facts, Method
from iciia_exp.methods.cotrain.sites import (
    CLOUD,
    Job,
    Packed,
    Samples,
    Site,
    Update,
    Weights,
    average,
    weights_of,
)
from iciia_exp.methods.cotrain.steps import batches_of, freeze_all_but, train_steps
from iciia_exp.models.backbones.base import Backbone, BackboneSpec
from iciia_exp.models.payloads import PAYLOADS, pack_weights, packed_weights_bytes, unpack_weights
from iciia_exp.seeding import derive_seed, generator
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["CoTrained", "images_of"]


class CoTrained(Method):
    """A method whose network is trained in rounds, by devices on their own images and by the cloud on its.

    Devices are the partition's clients with train images. The cloud has the backbone's images, and never those of the
    devices.

    Args:
        facts: task, sizes, and the shape of the array.
        network: builds the network from ``num_classes``: a backbone class with its settings. Its input is ``array``.
        pretrained: it starts from the library's weights, with a fresh last layer; else from fresh weights.
        array: the stored array that the network reads: ``images``, as the backbone's transform makes them, or another
            that the backbone gives, such as ``features``.
        rounds: R.
        local_epochs: passes of a device over its images in a round.
        lr: rate of SGD in the first round; it falls to 0 over the rounds by a cosine. Every round starts with a fresh
            optimiser.
        momentum, weight_decay: of SGD.
        batch_size: images of a step on a device.
        cloud_batch_size: the same in the cloud, which takes as many steps in a round as the devices do on average.
        cloud_weight: of the cloud's copy in the average; the devices' copies share the rest by their numbers of
            images. With 0 the cloud does not train.
        devices: the clients are joined to so many devices; null: each is one.
        share_down: share of what a device trains on that are images of the cloud, sent down once with their labels.
        participation: share of the devices in a round, drawn anew in each; at least one.
        unavailable: probability that such a device does not answer. The others share its weight.
        payload: numbers of the networks that are sent: ``float32``, ``float16``, or ``int8`` with a scale for each
            row of a matrix or filter. Devices then send the difference to what they have received.
        seed: of initial weights, orders, dropout, and the draw of devices.
    """

    tasks = (SINGLE_LABEL,)
    trained_with: ClassVar[frozenset[str]] = frozenset()  # what is trained before the rounds has a recipe of its own
    causal = True
    parts: ClassVar[dict[str, type]] = {"network": Backbone}
    #: Whether devices have the logits of the backbone's classifier, which breaks the premise: a bound.
    large_on_devices: bool = False
    #: The setting, if any, with which images go up, or logits of the large model down: against the premise.
    against_premise: str | None = None
    #: Weight of the squared distance to the network that was sent, in the loss of a device.
    proximal: float = 0.0

    def __init__(
        self,
        facts: Facts,
        network: Callable[..., Backbone],
        array: str = "images",
        pretrained: bool = False,
        rounds: int = 10,
        local_epochs: int = 1,
        lr: float = 0.02,
        momentum: float = 0.9,
        weight_decay: float = 0.0005,
        batch_size: int = 16,
        cloud_batch_size: int = 64,
        cloud_weight: float = 0.5,
        devices: int | None = None,
        share_down: float = 0.1,
        participation: float = 1.0,
        unavailable: float = 0.0,
        payload: str = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__(facts)
        self.array, self.shape = array, _shape(facts, array, self.name)
        #: kind of the array as a payload
        self.kind = array if array in KINDS else "features"
        self.reads = self.reads_with({"array": array})
        self.rounds = check_int("rounds", rounds, 1)
        self.local_epochs = check_int("local_epochs", local_epochs, 1)
        self.lr = check_float("lr", lr, 0.0, open_low=True)
        self.momentum = check_float("momentum", momentum, 0.0, 1.0)
        self.weight_decay = check_float("weight_decay", weight_decay, 0.0)
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.cloud_batch_size = check_int("cloud_batch_size", cloud_batch_size, 1)
        self.cloud_weight = check_float("cloud_weight", cloud_weight, 0.0, 1.0)
        self.devices = None if devices is None else check_int("devices", devices, 1)
        self.share_down = check_float("share_down", share_down, 0.0, 0.9)
        self.participation = check_float("participation", participation, 0.0, 1.0, open_low=True)
        self.unavailable = check_float("unavailable", unavailable, 0.0, 1.0)
        self.form = check_choice("payload", payload, PAYLOADS)
        self.seed = check_int("seed", seed, 0)
        self._network, self.pretrained = network, check_bool("pretrained", pretrained)
        #: f_S, the network that travels, with the weights of the last round.
        self.small = self.fresh("small")

    @classmethod
    def reads_with(cls, config: Mapping[str, Any]) -> frozenset[str]:
        """Return the features and the array that the network reads."""
        return frozenset({"features", str(config.get("array", "images"))})

    # ---- networks

    def fresh(self, role: str) -> Backbone:
        """Build the network with fresh weights; ``role`` decides them, with the seed."""
        if not callable(self._network):
            raise ConfigError("network", self._network, "must be a node with a _target_ and _partial_: true")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("cotrain", role, self.seed))
            try:
                network = self._network(num_classes=self.num_classes)
            except TypeError as error:
                raise ConfigError("network", self._network, f"cannot be built ({error})") from error
            try:
                with torch.no_grad():
                    got = tuple(network.eval()(torch.zeros(2, *self.shape)).shape)
            except (RuntimeError, ValueError, IndexError) as error:
                text = str(error).splitlines()[0]
                problem = f"does not take {self.array} {list(self.shape)} ({text})"
                raise ConfigError("network", type(network).__name__, problem) from error
        if got != (2, self.num_classes):
            problem = f"gives {list(got[1:])} numbers for an image, and there are {self.num_classes} classes"
            raise ConfigError("network", type(network).__name__, problem)
        return network.train().requires_grad_(True)

    def start(self, network: Backbone) -> None:
        """Give a network its first weights: those of the library, where they are asked for, with a fresh last layer."""
        if self.pretrained:
            names = [str(number) for number in range(self.num_classes)]
            head = copy.deepcopy(network.head)
            network.load_state_dict(BackboneSpec("network", self._network, "head", True).initial(names).state_dict())
            network.head.load_state_dict(head.state_dict())

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a round; raises a `UserError` for those of another network."""
        self._take(weights)
        self.small.eval().requires_grad_(False)

    def _take(self, weights: Mapping[str, Tensor]) -> None:
        own = {name: t.shape for name, t in weights_of(self.small).items()}
        got = {name: t.shape for name, t in weights.items()}
        if own != got:
            first = next(name for name in (*own, *got) if own.get(name) != got.get(name))
            sizes = " not ".join(
                "missing" if part is None else str(list(part)) for part in (got.get(first), own.get(first))
            )
            raise UserError(f"{self.name}: weights of another network ({first} is {sizes})")
        self.small.load_state_dict(dict(weights), strict=False)  # without the counters of batch norms

    def read(self, batch: ClientBatch) -> Tensor:
        """Return the network's inputs of the real images of a batch, [N, ...]."""
        array = batch.x_CSD if self.array == "features" else batch.arrays[self.array]
        return array[batch.mask_CS]

    # ---- what methods differ in

    def partner(self, site: Site, job: Job, samples: Samples) -> Tensor | None:
        """Return the logits [n, K] that are added to the network's in training; None: nothing is added.

        The images of a site for jobs of a name are the same in every round.
        """
        return None

    def beside(self, batch: ClientBatch) -> dict[str, Tensor | None]:
        """Return what is added to the network's logits in each way to answer, by name; the first way is served.

        These are logits [N, K] of the real images of a batch, the same in every round; None: nothing is added.
        """
        return {"small": None}

    def join(self, site: Site, cloud: Site, link: Link) -> None:
        """Send a device, once, what it needs (`sent`), which it accepts."""
        self.accept(site, self.sent(site.number, len(site.own.y), cloud, link))

    def sent(self, number: int, images: int, cloud: Site, link: Link) -> Weights:
        """Return what the cloud sends a device once, by name: some of its images, with their labels.

        Args:
            number: of the device.
            images: that it has.
            cloud: the cloud.
            link: counts what is sent.
        """
        count = self.received(images, len(cloud.own.y))
        return self.down(cloud, count, "train", number, link) if count else {}

    def accept(self, site: Site, sent: Mapping[str, Tensor]) -> None:
        """Keep on a device what the cloud has sent."""
        if "train.x" in sent:
            site.samples = site.own.join(images_of(sent, "train"))

    def received(self, own: int, held: int) -> int:
        """Return how many of the cloud's ``held`` images come down to a device with ``own`` ones."""
        return min(held, round(self.share_down * own / (1 - self.share_down)))

    def down(self, cloud: Site, count: int, name: str, number: int, link: Link) -> Weights:
        """Send random images of the cloud down to a device, as ``<name>.x`` and ``<name>.y``.

        The logits of the backbone's classifier, ``<name>.large``, come with them only where an arm breaks the premise.
        """
        rows = generator("cotrain", name, self.seed, number).permutation(len(cloud.own.y))[:count]
        chosen = cloud.own.take(torch.from_numpy(rows))
        x = link.down(self.kind, chosen.x, what="training")
        sent = {f"{name}.x": x, f"{name}.y": link.down("labels", chosen.y.int(), what="training")}
        if self.large_on_devices and chosen.large is not None:
            sent[f"{name}.large"] = chosen.large
        return sent

    def jobs(self, number: int) -> tuple[Job, ...]:
        """Return the jobs of a round, 0 to R - 1."""
        return (Job(number, lr=self.rate(number), epochs=self.local_epochs, cloud=self.cloud_weight > 0),)

    def large_logits(self, x: Tensor) -> Tensor | None:
        """Return the logits of the backbone that are added to the network's, from features [..., D]; None: none are."""
        return None

    # ---- a round

    def rate(self, number: int) -> float:
        """Return the rate of a round."""
        return self.lr * (1 + math.cos(math.pi * number / self.rounds)) / 2

    def draw(self, number: int, devices: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the devices of a round, and which of them answer, bool."""
        rng = generator("cotrain", "devices", self.seed, number)
        count = max(1, round(self.participation * devices))
        drawn = np.sort(rng.permutation(devices)[:count])
        return drawn, rng.random(devices)[drawn] >= self.unavailable

    def train_on(self, site: Site, weights: Mapping[str, Tensor], job: Job, steps: int | None = None) -> Update:
        """Do a job at a site, on a copy of the network.

        Args:
            site: with its images.
            weights: of the network as the site has received it.
            job: what to do.
            steps: in the cloud; None: one pass over the images for every epoch.
        """
        samples = self.samples_of(site, job)
        self._take(weights)
        network = self.small
        trained = freeze_all_but(network, job.part)
        partner = self.partner(site, job, samples)
        seed = derive_seed("cotrain", job.name, self.seed, job.round, site.number + 1)
        size = self.batch_of(site, job)
        batches = list(batches_of(len(samples.y), size, job.epochs, seed, steps))
        optimizer = torch.optim.SGD(trained, job.lr, self.momentum, weight_decay=self.weight_decay)
        device, proximal = next(network.parameters()).device, 0.0 if site.number == CLOUD else self.proximal
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed % 2**63)
            network.train(not job.part and len(samples.y) > 1)  # batch norm needs two images
            loss = train_steps(network, optimizer, samples, partner, batches, proximal)
        network.eval()
        sent = {name: t.clone() for name, t in weights_of(network).items() if name.startswith(job.part)}
        return Update(sent, len(samples.y), len(batches), loss)

    def samples_of(self, site: Site, job: Job) -> Samples:
        """Return the images of a job."""
        return site.samples

    def batch_of(self, site: Site, job: Job) -> int:
        """Return the images of a step."""
        return self.cloud_batch_size if site.number == CLOUD else self.batch_size

    def aggregate(self, job: Job, weights: Mapping[str, Tensor], updates: Mapping[int, Update]) -> Weights:
        """Return the network after a job: the weighted average of the copies, running statistics included.

        Args:
            job: that was done.
            weights: of the network before.
            updates: by number of the site; none of them: the network stays as it is.
        """
        if not updates:
            return dict(weights)
        devices = {number: update for number, update in updates.items() if number != CLOUD}
        images = sum(update.samples for update in devices.values())
        cloud = self.cloud_weight if CLOUD in updates else 0.0
        shares = {number: (1 - cloud) * update.samples / images for number, update in devices.items()}
        if CLOUD in updates:
            shares[CLOUD] = cloud if devices else 1.0
        return {**weights, **average({number: updates[number].weights for number in shares}, shares)}

    # ---- the link

    def send(self, weights: Mapping[str, Tensor], link: Link) -> Weights:
        """Send the network down to a device; return it as received."""
        return unpack_weights(link.down("weights", pack_weights(weights, self.form), "round", "training"))

    def answer(self, update: Update, received: Mapping[str, Tensor], link: Link) -> Update:
        """Send a device's copy up; return it as the cloud gets it."""
        packed = link.up("weights", self.packed(update, received), "round", "training")
        return update._replace(weights=self.unpacked(packed, received))

    def packed(self, update: Update, received: Mapping[str, Tensor]) -> Packed:
        """Return a device's copy as it is sent: what it has changed, unless numbers are sent exactly."""
        if self.form == "float32":
            return pack_weights(update.weights, self.form)
        return pack_weights({name: t - received[name] for name, t in update.weights.items()}, self.form)

    def unpacked(self, packed: Packed, received: Mapping[str, Tensor]) -> Weights:
        """Return a device's copy from what it has sent, and from the network as it was sent to the device."""
        got = unpack_weights(packed)
        # what does not fit stays as it is, and is left out of the round (`iciia_exp.engine.rounds`)
        fits = all(name in received and received[name].shape == t.shape for name, t in got.items())
        if self.form == "float32" or not fits:
            return got
        return {name: received[name] + t for name, t in got.items()}

    # ---- answers and costs

    def logits(self, batch: ClientBatch, causal: bool = False) -> Tensor:
        """Return the logits of the way that is served, [C, S, K]; 0 where padded."""
        logits_NK, added = self.small(self.read(batch)), next(iter(self.beside(batch).values()))
        logits_NK = logits_NK if added is None else added + logits_NK
        logits_CSK = logits_NK.new_zeros(*batch.mask_CS.shape, self.num_classes)
        logits_CSK[batch.mask_CS] = logits_NK
        return logits_CSK

    def network_macs(self) -> int:
        """Return the MACs of an image."""
        return count_macs(self.small, self.example())

    def served_macs(self, sizes: Sizes) -> int | None:
        """Return the MACs of an image in a request, those of its input included unless the backbone makes it."""
        if sizes.input_on_backbone:
            return self.network_macs()
        return None if sizes.input_macs is None else sizes.input_macs + self.network_macs()

    def step_macs(self, part: str = "") -> int:
        """Return the MACs of an image in training of a part of the network."""
        trained = {name for name, p in self.small.named_parameters() if name.startswith(part)}
        return count_step_macs(self.small, self.example(), trained)

    def example(self) -> Tensor:
        """Return an input, zeros [1, ...]."""
        return torch.zeros(1, *self.shape, device=next(self.small.parameters()).device)

    def weight_bytes(self, part: str = "") -> int:
        """Return the bytes of the network, or a part of it, as it is sent."""
        weights = {name: t for name, t in weights_of(self.small).items() if name.startswith(part)}
        return packed_weights_bytes(weights, self.form)

    def payload(self) -> dict[str, Tensor]:
        """Return the network as it is sent to a device that answers with it, without the counters of batch norms."""
        return self.packed_once(self.small)

    def packed_once(self, network: Backbone) -> dict[str, Tensor]:
        """Return a network as it is sent once: values by name and, with ``int8``, scales as ``<name>.scale``."""
        packed = pack_weights(weights_of(network), self.form)
        return {
            f"{name}{end}": t for name, parts in packed.items() for end, t in zip(("", ".scale"), parts, strict=False)
        }

    def as_received(self, weights: Mapping[str, Tensor]) -> Weights:
        """Return a network as a device that is sent it once has it, without the counters of batch norms."""
        return unpack_weights(pack_weights(weights, self.form))

    def image_lines(self, sender: Place, count: int, sizes: Sizes) -> list[Line]:
        """Return the lines of images with their labels that a site sends once; none of no images."""
        if not count:
            return []
        size = None if sizes.sample_bytes is None else count * sizes.sample_bytes
        return [
            Line("client_once", sender, "training", kind=self.kind, bytes=size),
            Line("client_once", sender, "training", kind="labels", bytes=4 * count),
        ]

    def input_lines(self, sizes: Sizes) -> list[Line]:
        """Return the lines of what a device computes and is sent, once, for the network's inputs of its own images."""
        lines = []
        if self.array != "images":
            lines.append(Line("client_once", "device", "training", macs=times(sizes.train, sizes.input_macs)))
        if sizes.input_on_backbone:
            lines.append(Line("client_once", "cloud", "backbone", kind="weights", bytes=sizes.backbone_bytes))
        return lines

    def round_lines(self, sizes: Sizes) -> list[Line]:
        """Return the lines of a round: those of a device that takes part, and those of the cloud."""
        jobs = self.jobs(0)
        down = sum(self.weight_bytes() for job in jobs if job.devices)
        up = sum(self.weight_bytes(job.part) for job in jobs if job.devices)
        images = sizes.train + sizes.received
        own = [(job, job.epochs * self.job_samples(job, images, sizes.cloud)) for job in jobs if job.devices]
        cloud = [(job, self.cloud_images(job, images, sizes.cloud)) for job in jobs if job.cloud]
        macs = total(None if count is None else count * self.step_macs(job.part) for job, count in cloud)
        return [
            Line("round", "cloud", "training", kind="weights", bytes=down),
            Line("round", "device", "training", kind="weights", bytes=up),
            Line("round", "device", "training", macs=sum(count * self.step_macs(job.part) for job, count in own)),
            Line("round", "cloud", "training", macs=macs),
        ]

    def job_samples(self, job: Job, images: int, held: int = 0) -> int:
        """Return how many images a job takes at a site with ``images``.

        ``held`` are the cloud's, where the site is a device: for some jobs it has been sent some of them.
        """
        return images

    def cloud_images(self, job: Job, images: int, held: int) -> int | None:
        """Return how many of its ``held`` images the cloud's steps take, beside a device with ``images``.

        None where it trains on images of the devices as well, whose number depends on all clients.
        """
        if not job.equal_steps or not job.devices:
            return job.epochs * self.job_samples(job, held)
        steps = job.epochs * -(-self.job_samples(job, images, held) // self.batch_size)
        return steps * min(self.cloud_batch_size, held)

    def budget(self, sizes: Sizes) -> Budget:
        """Rounds of training, and requests that the network answers on the device."""
        lines = (
            *self.image_lines("cloud", sizes.received, sizes),
            *self.input_lines(sizes),
            *self.round_lines(sizes),
            Line("client_once", "cloud", "method", kind="weights", bytes=self.weight_bytes()),
            Line("request", "device", "method", macs=times(sizes.requested, self.served_macs(sizes))),
        )
        if sizes.input_on_backbone:
            lines += (Line("request", "device", "backbone", macs=times(sizes.requested, sizes.input_macs)),)
        return Budget(lines, 0)


def times(count: int, macs: int | None) -> int | None:
    """Return the MACs of a number of images; None if those of one are unknown."""
    return 0 if not count else None if macs is None else count * macs


def images_of(sent: Mapping[str, Tensor], name: str) -> Samples:
    """Return the images that `CoTrained.down` sent under a name."""
    return Samples(sent[f"{name}.x"], sent[f"{name}.y"].long(), sent.get(f"{name}.large"))


def _shape(facts: Facts, array: str, method: str) -> tuple[int, ...]:
    if array not in facts.arrays:
        raise NotApplicable("method", method, f"reads {array}, of which nothing is known here")
    return tuple(facts.arrays[array])
