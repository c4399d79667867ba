"""DC-CCL against vectors of the released code (shared/reference/dc_ccl_vectors.safetensors)."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from iciia_exp.data.batches import ClientBatch
from iciia_exp.methods.base import Facts
from iciia_exp.methods.cotrain import base
from iciia_exp.methods.cotrain.dc_ccl import DCCCL, Distilled
from iciia_exp.methods.cotrain.sites import CLOUD, Samples, Site, weights_of
from iciia_exp.methods.cotrain.steps import train_steps
from iciia_exp.models.backbones.base import Backbone

CASES = ("case0", "case1")
NAMES = {"features.0": "trunk.0", "features.1": "trunk.1", "classifier.0": "trunk.5", "classifier.3": "head"}


class Released(Backbone):
    """The network of the vectors: a convolution, batch norm, a mean, two linear layers."""

    transform_settings = ()

    def __init__(self, num_classes, width, hidden):
        super().__init__()
        conv = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.trunk = nn.Sequential(
            conv, nn.BatchNorm2d(width), nn.ReLU(), *pool, nn.Linear(width, hidden), nn.Hardswish()
        )
        self.dim, self.head = hidden, nn.Linear(hidden, num_classes)

    def features(self, images):
        return self.trunk(images)

    def transform(self, image):
        return image


@pytest.fixture(scope="module", params=CASES)
def case(request, reference):
    """Return the sizes of a case, and its tensors by name."""
    with safe_open(reference / "dc_ccl_vectors.safetensors", "pt") as file:
        sizes = json.loads(file.metadata()[request.param])
        tensors = {k.removeprefix(f"{request.param}/"): file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    return sizes, tensors


def weights(tensors, prefix):
    """Return the weights of a network under a prefix, with the names here."""
    found = {}
    for key, value in tensors.items():
        if key.startswith(f"{prefix}/"):
            layer, _, name = key.removeprefix(f"{prefix}/").rpartition(".")
            found[f"{NAMES[layer]}.{name}"] = value
    return found


def close(got, expected):
    """Assert that all weights agree to 1e-5."""
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture
def method(case, monkeypatch):
    """Return the method of a case; batches are in the order of the vectors."""
    sizes, tensors = case

    def in_order(images, size, epochs, seed, steps):
        return iter(np.split(np.arange(images), range(size, images, size)))

    monkeypatch.setattr(base, "batches_of", in_order)
    identity = nn.Linear(sizes["classes"], sizes["classes"])  # the features are f_L's logits
    nn.init.eye_(identity.weight), nn.init.zeros_(identity.bias)
    facts = Facts.of(identity, arrays={"images": (3, sizes["image"], sizes["image"])})
    method = DCCCL(
        facts,
        network=partial(Released, width=sizes["co_width"], hidden=sizes["hidden"]),
        retune="mixed",
        temperature=1.0,
        retune_batch_size=sizes["batch"],
        batch_size=sizes["batch"],
        cloud_batch_size=sizes["batch"],
        lr=sizes["lr"],
        momentum=sizes["momentum"],
        weight_decay=0.0005,
    )
    method.load(weights(tensors, "initial/co_submodel"))
    return method


def samples(tensors, who, batches):
    """Return the images of a site, batches one after the other."""
    x, y = (torch.cat([tensors[f"{who}_{name}_{j}"] for j in range(batches)]) for name in "xy")
    return Samples(x, y.long())


def large_model(sizes, tensors):
    """Return f_L after its training on the cloud."""
    network = Released(sizes["classes"], sizes["cloud_width"], sizes["hidden"])
    network.load_state_dict(weights(tensors, "initial/cloud_submodel"), strict=False)
    optimizer = torch.optim.SGD(network.parameters(), sizes["lr"], sizes["momentum"], weight_decay=0.0005)
    cloud = samples(tensors, "cloud", sizes["batches"])
    rows = np.split(np.arange(len(cloud.y)), sizes["batches"])
    train_steps(network.train(), optimizer, cloud, None, rows * sizes["cloud_epochs"])
    return network.eval()


def distil(method, sizes, tensors, large):
    """Train f_C as released, and return its first loss."""
    method.control.load_state_dict(weights(tensors, "initial/control_model"), strict=False)
    module = Distilled(method.control.train(), method.large_logits, "images", "mse")
    optimizer = torch.optim.Adam(method.control.parameters(), sizes["kd_lr"])
    losses = []
    for _ in range(sizes["kd_epochs"]):
        for j in range(sizes["batches"]):
            with torch.no_grad():
                teacher = large(tensors[f"cloud_x_{j}"])
            loss = module.loss(teacher, tensors[f"cloud_y_{j}"], images=tensors[f"cloud_x_{j}"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    method.control.eval()
    return losses[0]


def test_the_released_procedure(case, method):
    """f_L, f_C, two rounds with their averages and retunings, and what is served agree to 1e-5."""
    sizes, tensors = case
    large = large_model(sizes, tensors)
    close(weights_of(large), weights(tensors, "step1/cloud_submodel"))
    first = distil(method, sizes, tensors, large)
    assert first == pytest.approx(float(tensors["step2/first_loss"]), rel=1e-5)
    close(weights_of(method.control), weights(tensors, "step2/control_model"))

    sites = {CLOUD: Site(CLOUD, samples(tensors, "cloud", sizes["batches"]))}
    sites[0] = Site(0, samples(tensors, "device", sizes["batches"]))
    sites[CLOUD].kept["retune"] = samples(tensors, "tune", sizes["batches"])
    current = weights_of(method.small)
    current = {name: t.clone() for name, t in current.items()}
    for number in range(sizes["rounds"]):
        train, retune = (job._replace(lr=sizes["lr"]) for job in method.jobs(number))
        updates = {n: method.train_on(site, current, train) for n, site in sites.items()}
        close(updates[CLOUD].weights, weights(tensors, f"round{number}/cloud_local"))
        close(updates[0].weights, weights(tensors, f"round{number}/device_local"))
        averaged = method.aggregate(train, current, updates)
        close(averaged, weights(tensors, f"round{number}/averaged"))
        tuned = {CLOUD: method.train_on(sites[CLOUD], averaged, retune)}
        current = method.aggregate(retune, averaged, tuned)
        close(current, weights(tensors, f"round{number}/retuned"))
        method.load(current)
        with torch.no_grad():
            logits = large(tensors["test_x"])
        real = torch.ones(1, len(logits), dtype=torch.bool)
        y = tensors["test_y"][None].long()
        batch = ClientBatch(logits[None], y, real, torch.zeros(1), arrays={"images": tensors["test_x"][None]})
        served = method.logits(batch)[0].detach()
        torch.testing.assert_close(served, tensors[f"round{number}/serving_logits"], rtol=1e-5, atol=1e-5)
        loss, accuracy = tensors[f"round{number}/test_loss_accuracy"].tolist()
        assert float(nn.functional.cross_entropy(served, y[0])) == pytest.approx(loss, rel=1e-5)
        assert 100 * float((served.argmax(-1) == y[0]).float().mean()) == pytest.approx(accuracy, abs=1e-3)


def test_the_first_step_of_a_device(case, method):
    """Loss and weights at a device's first step agree to 1e-5."""
    sizes, tensors = case
    distil(method, sizes, tensors, large_model(sizes, tensors))
    start = {name: t.clone() for name, t in weights_of(method.small).items()}
    site = Site(0, samples(tensors, "device", 1))
    update = method.train_on(site, start, method.jobs(0)[0]._replace(lr=sizes["lr"]))
    assert update.loss == pytest.approx(float(tensors["round0/device_first_loss"]), rel=1e-5)
    close(update.weights, weights(tensors, "round0/device_one_step"))
