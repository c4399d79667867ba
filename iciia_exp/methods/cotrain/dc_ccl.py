"""DC-CCL: the cloud's large model and a small co-submodel learn together; no raw image goes up, no large model down.

Source: "DC-CCL: Device-Cloud Collaborative Controlled Learning for Large Vision Models" (arXiv 2303.10361). The large
submodel f_L is the backbone, trained on the cloud's images and then frozen. The control model f_C is distilled from it
on these images. The co-submodel f_S travels: cloud and devices train it beside f_C, since the devices do not have f_L,
and the cloud answers with the sum of f_L's and f_S's logits. The released sample is of one setting; number of devices,
shares and the federated retuning are ours.

Legend: n images of a site, B images of a batch, K classes.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import check_choice, check_float, check_int
from iciia_exp.ledger import Budget, Line, Link, Sizes, total
from iciia_exp.methods.base import Facts, Fit, Record, copy_of
from iciia_exp.methods.cotrain.base import CoTrained, images_of, times
from iciia_exp.methods.cotrain.sites import Job, Samples, Site, Weights, weights_of
from iciia_exp.methods.cotrain.steps import logits_of, set_mode
from iciia_exp.models.payloads import pack_weights, unpack_weights
from iciia_exp.recipe import Recipe
from iciia_exp.seeding import generator

__all__ = ["ARMS", "DCCCL", "RETUNE"]

#: The method, and what it is compared with. ``large_on_device`` and ``centralised`` break its premise: bounds.
ARMS = ("dc_ccl", "no_control", "wrong_control", "large_on_device", "centralised")
RETUNE = ("federated", "device", "mixed", "none")

_HEAD = "head."  # the last layer of a backbone
_T, _SOFT = 0.5, 0.05  # temperature and weight of the soft labels


class DCCCL(CoTrained):
    """A co-submodel that is added to the backbone's classifier.

    Args:
        facts: task, sizes, the backbone's classifier (f_L), and the shape of the array.
        arm: ``dc_ccl``; ``no_control``: f_S is trained without f_C; ``wrong_control``: f_C's logits are those of
            other images; ``large_on_device``: f_L takes f_C's place everywhere, a bound; ``centralised``: the same,
            and all images are in the cloud, a bound.
        retune: who trains the last layer of the averaged f_S: ``federated``: cloud and devices, each on some of its
            images, averaged again; ``device``: devices, on some of their images and of the cloud's, which come down
            once; ``mixed``: the cloud, on some of its and of the devices' images, which go up: as released, and
            against the premise; ``none``.
        retune_images: of a site that are used to retune, at most.
        retune_batch_size: images of a step of the retuning, which takes one epoch.
        temperature: f_L's logits are divided by it, in all of this. A large model is surer than f_C of images that
            neither has learned from, and f_S, which has learned to overrule f_C, does not overrule it; 1 as published.
        unseen_logits: f_L's logits of classes that the cloud has no image of: ``trained``, as they are, or ``mean``,
            that of the other classes, where they say nothing: a fitted classifier (backbone.train=head) gives -30.
        distillation: loss of f_C: ``mse`` of logits, or ``kl``: cross-entropy of the labels, and of f_L's probabilities
            at a temperature of 0.5.
        control_epochs, control_lr, control_batch_size: of f_C's training with Adam, cosine.
        arguments: those of `CoTrained`; ``network`` builds f_S, and f_C with its own weights.
    """

    name = "dc_ccl"
    site = "cloud"

    def __init__(
        self,
        facts: Facts,
        arm: str = "dc_ccl",
        retune: str = "federated",
        retune_images: int = 1000,
        retune_batch_size: int = 128,
        temperature: float = 2.0,
        unseen_logits: str = "trained",
        distillation: str = "mse",
        control_epochs: int = 8,
        control_lr: float = 0.003,
        control_batch_size: int = 64,
        **arguments: Any,
    ) -> None:
        super().__init__(facts, **arguments)
        self.arm, self.retune = check_choice("arm", arm, ARMS), check_choice("retune", retune, RETUNE)
        self.retune_images = check_int("retune_images", retune_images, 1)
        self.retune_batch_size = check_int("retune_batch_size", retune_batch_size, 1)
        self.temperature = check_float("temperature", temperature, 0.0, open_low=True)
        self.unseen_logits = check_choice("unseen_logits", unseen_logits, ("trained", "mean"))
        self.distillation = check_choice("distillation", distillation, ("mse", "kl"))
        adam = partial(torch.optim.Adam, lr=check_float("control_lr", control_lr, 0.0, open_low=True))
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR
        size = check_int("control_batch_size", control_batch_size, 1)
        self.control_recipe = Recipe(adam, cosine, check_int("control_epochs", control_epochs, 1), size)
        self.large = copy_of(facts.head, trained=False)
        self.known_K: Tensor  # classes that the cloud has images of
        self.register_buffer("known_K", torch.ones(facts.num_classes, dtype=torch.bool))
        #: f_C; None where f_S is trained without it.
        self.control = self.fresh("control") if arm in ("dc_ccl", "wrong_control") else None
        self.alone, self.large_on_devices = arm == "centralised", arm in ("large_on_device", "centralised")
        broken = {f"arm={arm}": self.large_on_devices, "retune=mixed": retune == "mixed"}
        self.against_premise = next((setting for setting, broke in broken.items() if broke), None)

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Distil f_C on the cloud's images."""
        record: Record = {}
        self.known_K.copy_(torch.from_numpy(cloud.class_counts("train").any(0)))
        self.start(self.small)
        if self.control is not None:
            self.start(self.control)
            module = Distilled(self.control, self.large_logits, self.array, self.distillation)
            record = fit(module, cloud.clients.train.values, self.control_recipe)
            self.control.load_state_dict(self.as_received(weights_of(self.control)), strict=False)
        self.eval()
        return record

    def large_logits(self, x: Tensor) -> Tensor:
        """Return f_L's logits [..., K] from the backbone's features [..., D]."""
        weight, bias, known_K = (t.to(x.device) for t in (self.large.weight, self.large.bias, self.known_K))
        logits = F.linear(x, weight, bias) / self.temperature  # f_C may be distilled on another device than f_L's
        if self.unseen_logits == "mean":
            mean = (logits * known_K).sum(-1, keepdim=True) / known_K.sum()
            logits = torch.where(known_K, logits, mean)
        return logits

    # ---- rounds

    def join(self, site: Site, cloud: Site, link: Link) -> None:
        """Send a device what it needs and, where an arm breaks the premise, its images up."""
        super().join(site, cloud, link)
        if self.alone:
            cloud.samples = cloud.samples.join(self._up(site.own, link))
        elif self.retune == "mixed":
            images = self._up(self._some(site.own, site), link)
            cloud.kept["retune"] = self._to_retune(cloud).join(images)

    def sent(self, number: int, images: int, cloud: Site, link: Link) -> Weights:
        """Return f_C, and images of the cloud to train on and to retune with."""
        sent = super().sent(number, images, cloud, link)
        if self.control is not None:
            packed = link.down("weights", pack_weights(weights_of(self.control), self.form))
            sent |= {f"control.{name}": t for name, t in unpack_weights(packed).items()}
        if self.retune == "device" and not self.alone:
            sent |= self.down(cloud, min(self.retune_images, len(cloud.own.y)), "retune", number, link)
        return sent

    def accept(self, site: Site, sent: Mapping[str, Tensor]) -> None:
        """Keep f_C and the images."""
        super().accept(site, sent)
        if self.control is not None:
            weights = {k.removeprefix("control."): t for k, t in sent.items() if k.startswith("control.")}
            self.control.load_state_dict(weights, strict=False)
            self.control.eval()
        if "retune.x" in sent:
            site.kept["retune"] = self._to_retune(site).join(images_of(sent, "retune"))

    def _up(self, images: Samples, link: Link) -> Samples:
        """Send images of a device up, which breaks the premise; return them as received."""
        x = link.up(self.kind, images.x, what="training")
        return Samples(x, link.up("labels", images.y.int(), what="training").long(), images.large)

    def _to_retune(self, site: Site) -> Samples:
        """Return the images with which a site retunes: some of all that it has, unless it has been sent others."""
        if "retune" not in site.kept:
            site.kept["retune"] = self._some(site.samples, site)
        return site.kept["retune"]

    def _some(self, samples: Samples, site: Site) -> Samples:
        """Return some images of a site, to retune."""
        order = generator("cotrain", "retune", self.seed, site.number + 1).permutation(len(samples.y))
        return samples.take(torch.from_numpy(order[: self.retune_images]))

    def received(self, own: int, held: int) -> int:
        """Return none where all images are in the cloud."""
        return 0 if self.alone else super().received(own, held)

    def jobs(self, number: int) -> tuple[Job, ...]:
        """Return the training, and the retuning of the last layer."""
        rate, alone = self.rate(number), self.alone
        train = Job(number, "train", "", rate, self.local_epochs, alone or self.cloud_weight > 0, devices=not alone)
        if self.retune == "none" or alone:
            return (train,)
        cloud = {"federated": train.cloud, "device": False, "mixed": True}[self.retune]
        devices = self.retune != "mixed"
        return train, Job(number, "retune", _HEAD, rate, cloud=cloud, devices=devices, equal_steps=False)

    def samples_of(self, site: Site, job: Job) -> Samples:
        """Return all images of a site, or those to retune."""
        return self._to_retune(site) if job.name == "retune" else super().samples_of(site, job)

    def batch_of(self, site: Site, job: Job) -> int:
        """Return the images of a step."""
        return self.retune_batch_size if job.name == "retune" else super().batch_of(site, job)

    def partner(self, site: Site, job: Job, samples: Samples) -> Tensor | None:
        """Return the logits of f_C, or of f_L where that is the arm; they are computed once."""
        if self.arm == "no_control":
            return None
        if self.control is None:
            assert samples.large is not None
            return samples.large
        if (logits := site.kept.get(f"control, {job.name}")) is None:
            logits = logits_of(self.control, samples.x)
            if self.arm == "wrong_control":
                order = generator("cotrain", "wrong", self.seed, site.number + 1).permutation(len(logits))
                logits = logits[torch.from_numpy(order)]
            site.kept[f"control, {job.name}"] = logits
        return logits

    # ---- answers and costs

    def beside(self, batch: ClientBatch) -> dict[str, Tensor | None]:
        """Return the logits of f_L and, where there is one, of f_C."""
        beside: dict[str, Tensor | None] = {"large + small": self.large_logits(batch.x_CSD[batch.mask_CS])}
        if self.control is not None:
            beside["control + small"] = self.control(self.read(batch))
        return beside

    def payload(self) -> dict[str, Tensor]:
        """Return f_C as a device is sent it, once."""
        return {} if self.control is None else self.packed_once(self.control)

    def budget(self, sizes: Sizes) -> Budget:
        """f_C and images once, f_S in every round, images up and logits down in a request."""
        images = sizes.train + sizes.received
        lines = self.image_lines("cloud", sizes.received, sizes) + self.input_lines(sizes)
        backbone = sizes.backbone_macs
        if self.control is not None:
            jobs = self.jobs(0)
            passed = sum(self.job_samples(job, images, sizes.cloud) for job in jobs if job.devices)
            distilled = self.control_recipe.epochs * sizes.cloud * (self.step_macs() + self.dim * self.num_classes)
            held = sum(self.job_samples(job, sizes.cloud) for job in jobs if job.cloud) * self.network_macs()
            once = (
                distilled,
                None if self.retune == "mixed" else held,  # the cloud passes images of all devices through f_C
                times(sizes.cloud, backbone),
                0 if sizes.input_on_backbone else times(sizes.cloud, sizes.input_macs),
            )
            lines += [
                Line("cloud_once", "cloud", "training", macs=total(once)),
                Line("client_once", "cloud", "method", kind="weights", bytes=self.weight_bytes()),
                Line("client_once", "device", "training", macs=passed * self.network_macs()),
            ]
        if self.arm == "large_on_device" and not sizes.input_on_backbone:
            lines += [
                Line("client_once", "cloud", "backbone", kind="weights", bytes=sizes.backbone_bytes),
                Line("client_once", "device", "training", macs=times(images, backbone)),
            ]
        lines += self._premise_lines(sizes)
        up = None if sizes.image_bytes is None else sizes.requested * sizes.image_bytes
        lines += [
            *self.round_lines(sizes),
            Line("request", "cloud", "backbone", macs=times(sizes.requested, backbone)),
            Line("request", "cloud", "method", macs=times(sizes.requested, self.served_macs(sizes))),
            Line("request", "device", "backbone", kind="images", bytes=up),
            Line("request", "cloud", "method", kind="logits", bytes=4 * sizes.requested * self.num_classes),
        ]
        return Budget(tuple(lines), 0)

    def job_samples(self, job: Job, images: int, held: int = 0) -> int:
        """Return how many images a job takes at a site; with ``retune=device`` some of the cloud's have come down."""
        if job.name != "retune":
            return images
        return min(images, self.retune_images) + (min(self.retune_images, held) if self.retune == "device" else 0)

    def cloud_images(self, job: Job, images: int, held: int) -> int | None:
        """Return how many images the cloud's steps take; None where images of devices are among them."""
        if self.alone or (self.retune == "mixed" and job.name == "retune"):
            return None
        return super().cloud_images(job, images, held)

    def _premise_lines(self, sizes: Sizes) -> list[Line]:
        """Return the lines of further images that go down or up once."""
        some = min(sizes.train, self.retune_images)
        down = min(self.retune_images, sizes.cloud) if self.retune == "device" and not self.alone else 0
        up = sizes.train if self.alone else some if self.retune == "mixed" else 0
        return self.image_lines("cloud", down, sizes) + self.image_lines("device", up, sizes)


class Distilled(nn.Module):
    """Trains f_C to give f_L's logits.

    Args:
        student: f_C.
        teacher: f_L's logits from the features.
        array: that the student reads.
        form: ``mse`` or ``kl``, see `DCCCL`.
    """

    def __init__(self, student: nn.Module, teacher: Callable[[Tensor], Tensor], array: str, form: str) -> None:
        super().__init__()
        self.student, self.teacher, self.form = student, teacher, form
        self.reads = (array,)

    def loss(self, x_BD: Tensor, y: Tensor, **arrays: Tensor) -> Tensor:
        """Return the mean squared error over images and classes, or the weighted sum of both losses."""
        with torch.no_grad():
            teacher_BK = self.teacher(x_BD)
        set_mode(self.student, self.training, len(x_BD))
        logits_BK = self.student(arrays.get(self.reads[0], x_BD))
        if self.form == "mse":
            return F.mse_loss(logits_BK, teacher_BK)
        soft = F.kl_div((logits_BK / _T).log_softmax(-1), (teacher_BK / _T).softmax(-1), reduction="batchmean")
        return (1 - _SOFT) * F.cross_entropy(logits_BK, y) + _SOFT * _T**2 * soft
