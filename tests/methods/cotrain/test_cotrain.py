"""Methods whose network is trained in rounds: the average, the link, the ledger, the jobs."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from iciia_exp.engine.rounds import make_round
from iciia_exp.errors import UserError
from iciia_exp.ledger import Link, Sizes, payload_bytes
from iciia_exp.methods.base import Facts
from iciia_exp.methods.cotrain.dc_ccl import ARMS, DCCCL, RETUNE, Distilled
from iciia_exp.methods.cotrain.fedavg import FedAvg
from iciia_exp.methods.cotrain.sites import CLOUD, Job, Samples, Site, Update, weights_of
from iciia_exp.methods.cotrain.steps import batches_of, logits_of
from iciia_exp.models.backbones.feature_perceptron import FeaturePerceptron
from iciia_exp.models.backbones.small_cnn import SmallCNN

D, K, SIDE = 6, 4, 8
NETWORK = partial(SmallCNN, size=SIDE, width=2, dim=5, dropout=0.1)
PERCEPTRON = partial(FeaturePerceptron, inputs=D, width=5)
FACTS = Facts.of(nn.Linear(D, K), arrays={"images": (1, SIDE, SIDE)})


def site(number, images=20, classes=(0, 1, 2, 3), large=True):
    """Return a site with images of some classes."""
    random = torch.Generator().manual_seed(number + 1)
    y = torch.tensor(classes)[torch.randint(len(classes), (images,), generator=random)]
    x = torch.randn(images, 1, SIDE, SIDE, generator=random) + y.view(-1, 1, 1, 1)
    logits = torch.randn(images, K, generator=random) if large else None
    return Site(number, Samples(x, y, logits))


def dc_ccl(**settings):
    return DCCCL(FACTS, **{"network": NETWORK, "rounds": 2, "cloud_batch_size": 8, "batch_size": 8, **settings})


def exchange(method, sites, link):
    """Return a function that sends jobs to all sites, as the engine does in one process."""

    def send(job, weights):
        answers = {}
        for number, device in sites.items():
            received = method.send(weights, link)
            answers[number] = method.answer(method.train_on(device, received, job), received, link)
        return answers

    return send


def played(method, devices=1, images=20, held=40):
    """Let devices join and play one round; return the link, the sizes, the sites, the network, and the facts."""
    cloud = site(CLOUD, held, (0, 1))
    sizes = Sizes(train=images, received=method.received(images, held), cloud=held, sample_bytes=4 * SIDE**2)
    link = Link(method.name, method.budget(sizes))
    sites = {n: site(n, images, (2, 3), method.large_on_devices) for n in range(devices)}
    for device in sites.values():
        method.join(device, cloud, link)
    start = {name: t.clone() for name, t in weights_of(method.small).items()}
    weights, facts = make_round(method, start, 0, cloud, exchange(method, sites, link))
    return link, sizes, (cloud, sites), weights, facts


@pytest.mark.parametrize("payload", ["float32", "float16", "int8"])
@pytest.mark.parametrize("retune", RETUNE)
@pytest.mark.parametrize("arm", ARMS)
def test_payloads_are_those_of_the_budget(arm, retune, payload):
    link, sizes, *_ = played(dc_ccl(arm=arm, retune=retune, payload=payload, retune_images=8))
    stated = {}
    for line in dc_ccl(arm=arm, retune=retune, payload=payload, retune_images=8).budget(sizes).lines:
        if line.kind and line.phase != "request" and line.what != "backbone" and line.bytes:
            stated[line.key] = stated.get(line.key, 0) + line.bytes
    assert link.counted == stated


@pytest.mark.parametrize("payload", ["float32", "float16", "int8"])
def test_the_network_that_is_sent_once_is_that_of_the_budget(payload):
    for method in (dc_ccl(payload=payload), FedAvg(FACTS, network=NETWORK, payload=payload)):
        line = next(li for li in method.budget(Sizes()).lines if li.phase == "client_once" and li.kind == "weights")
        assert payload_bytes(method.payload()) == line.bytes == method.weight_bytes()
    assert dc_ccl(arm="no_control").payload() == {}


@pytest.mark.parametrize("payload", ["float32", "float16", "int8"])
def test_a_device_answers_with_what_it_has_received(payload):
    method = FedAvg(FACTS, network=NETWORK, payload=payload)
    weights = {name: t + 0.01 for name, t in weights_of(method.small).items()}
    received = method.send(weights, Link(method.name, method.budget(Sizes())))
    method.load(weights)
    assert all(torch.equal(t, received[name]) for name, t in weights_of(method.small).items())
    assert all(torch.equal(t, received[name]) for name, t in weights.items()) == (payload == "float32")


def test_the_premise_holds_at_the_link():
    up = {key[3] for key in played(dc_ccl())[0].counted if key[1] == "device"}
    assert up == {"weights"}
    link = played(dc_ccl())[0]
    for kind in ("images", "labels", "logits", "features"):
        with pytest.raises(PermissionError, match=f"may not send {kind} of the training from the device"):
            link.up(kind, torch.zeros(3), what="training")
    assert {key[3] for key in played(dc_ccl(retune="mixed"))[0].counted if key[1] == "device"} == {
        *("weights", "images", "labels")
    }


@pytest.mark.parametrize("retune", RETUNE)
def test_a_device_computes_what_the_budget_states(retune):
    method = dc_ccl(retune=retune, share_down=0.2, retune_images=8)
    cloud, device = site(CLOUD, 40, (0, 1)), site(0, 20, (2, 3), large=False)
    sizes = Sizes(train=20, received=5, cloud=40, sample_bytes=4)
    link = Link(method.name, method.budget(sizes))
    method.join(device, cloud, link)
    with FlopCounterMode(display=False) as counter:
        for job in method.jobs(0):
            if job.devices:
                method.train_on(device, weights_of(method.small), job)
    lines = method.budget(sizes).lines
    once = sum(li.macs for li in lines if (li.phase, li.site, li.kind) == ("client_once", "device", None))
    own = sum(li.macs for li in lines if (li.phase, li.site, li.kind) == ("round", "device", None))
    assert counter.get_total_flops() // 2 == once + own


@pytest.mark.parametrize("retune", ["federated", "none"])
def test_the_cloud_computes_what_the_budget_states(retune):
    method = dc_ccl(retune=retune, retune_images=8)
    _, sizes, (cloud, _), weights, _ = played(method)
    with FlopCounterMode(display=False) as counter:
        for job in method.jobs(0):
            method.train_on(cloud, weights, job, 3 if job.equal_steps else None)
    sizes = replace(sizes, backbone_macs=1000)  # f_L passes over the images once
    own, once = (
        sum(li.macs for li in method.budget(sizes).lines if (li.phase, li.site, li.kind) == (phase, "cloud", None))
        for phase in ("round", "cloud_once")
    )
    assert counter.get_total_flops() // 2 == own
    fresh = Site(CLOUD, cloud.samples)
    images, control = torch.utils.data.TensorDataset(torch.zeros(40, D), cloud.samples.x), method.control
    with FlopCounterMode(display=False) as counter:
        for job in method.jobs(0):
            if job.cloud:
                method.partner(fresh, job, method.samples_of(fresh, job))
        for _ in range(method.control_recipe.epochs):
            for x_BD, pictures in torch.utils.data.DataLoader(images, 8):
                Distilled(control.train(), method.large_logits, "images", "mse").loss(
                    x_BD, None, images=pictures
                ).backward()
    assert counter.get_total_flops() // 2 == once - 40 * 1000


def test_what_the_cloud_passes_of_all_devices_is_not_stated():
    (line,) = (li for li in dc_ccl(retune="mixed").budget(Sizes(cloud=40, train=20)).lines if li.phase == "cloud_once")
    assert line.macs is None


FEATURES = {"network": PERCEPTRON, "array": "features"}
SECOND = Facts.of(nn.Linear(D, K), arrays={"second": (D,)})


def stated(method, phase, site, what=None, kind=None, **sizes):
    lines = method.budget(Sizes(train=20, cloud=40, backbone_macs=1000, backbone_bytes=4000, **sizes)).lines
    of_key = [line for line in lines if (line.phase, line.site, line.kind) == (phase, site, kind)]
    return [line.bytes if kind else line.macs for line in of_key if what in (None, line.what)]


def test_a_device_makes_the_input_of_its_network():
    """From an image, with a network that it has, or with the backbone, which is sent."""
    method = FedAvg(SECOND, network=PERCEPTRON, array="second", share_down=0.0)
    macs = method.network_macs()
    assert stated(method, "request", "device", input_macs=700) == [700 + macs]
    assert stated(method, "client_once", "device", "training", input_macs=700) == [20 * 700]
    assert not stated(method, "client_once", "cloud", "backbone", "weights", input_macs=700)
    assert stated(method, "request", "device", input_macs=None) == [None]
    method, trunk = FedAvg(FACTS, **FEATURES), {"input_macs": 900, "input_on_backbone": True}
    assert stated(method, "request", "device", "method", **trunk) == [macs]
    assert stated(method, "request", "device", "backbone", **trunk) == [900]
    assert stated(method, "client_once", "device", "training", **trunk) == [20 * 900]
    assert stated(method, "client_once", "cloud", "backbone", "weights", **trunk) == [4000]


def test_the_backbone_makes_the_input_of_a_co_submodel():
    method, trunk = DCCCL(FACTS, **FEATURES), {"input_macs": 900, "input_on_backbone": True}
    assert method.against_premise is None, "nothing more is sent, and Flower may run it"
    assert stated(method, "client_once", "cloud", "backbone", "weights", **trunk) == [4000]
    assert stated(method, "request", "cloud", "method", **trunk) == [method.network_macs()]
    method = DCCCL(SECOND, network=PERCEPTRON, array="second")
    assert method.against_premise is None
    assert stated(method, "request", "cloud", "method", input_macs=700) == [700 + method.network_macs()]


def test_the_large_model_on_a_device_computes_there():
    method = dc_ccl(arm="large_on_device", retune="none")
    assert stated(method, "client_once", "device", "training", received=6) == [26 * 1000]


def test_the_average():
    method = dc_ccl(cloud_weight=0.5)
    start = {"a": torch.zeros(2), "b": torch.ones(1)}
    updates = {n: Update({"a": torch.full((2,), value)}, images, 1, 0.0) for n, value, images in
               ((CLOUD, 8.0, 999), (0, 1.0, 10), (1, 4.0, 30))}  # fmt: skip
    got = method.aggregate(Job(0), start, updates)
    assert got["a"].tolist() == [0.5 * 8 + 0.5 * (0.25 * 1 + 0.75 * 4)] * 2
    assert got["b"].tolist() == [1.0]  # what was not trained stays
    del updates[1]  # an absent device gives up its share
    assert method.aggregate(Job(0), start, updates)["a"].tolist() == [4.5, 4.5]
    del updates[0]
    assert method.aggregate(Job(0), start, updates)["a"].tolist() == [8.0, 8.0]
    assert method.aggregate(Job(0), start, {})["a"].tolist() == [0.0, 0.0]


def test_running_statistics_travel_and_counters_do_not():
    names = set(weights_of(dc_ccl().small))
    assert {name for name in names if "running" in name}
    assert not {name for name in names if "num_batches" in name}
    before = {name: t.clone() for name, t in weights_of(dc_ccl().small).items()}
    after = played(dc_ccl(retune="none"))[3]
    assert all((before[name] != after[name]).any() for name in names if "running" in name)


def test_retuning_trains_the_last_layer_alone():
    method = dc_ccl(retune="federated")
    device, start = site(0), {name: t.clone() for name, t in weights_of(method.small).items()}
    update = method.train_on(device, start, method.jobs(0)[1])
    assert set(update.weights) == {"head.weight", "head.bias"}
    now = weights_of(method.small)
    assert [name for name in start if (now[name] != start[name]).any()] == ["head.weight", "head.bias"]


def test_a_job_depends_on_seed_round_and_site_alone():
    method, device = dc_ccl(), site(0)
    start = {name: t.clone() for name, t in weights_of(method.small).items()}
    job = method.jobs(0)[0]
    torch.manual_seed(5)
    first = method.train_on(device, start, job)
    torch.manual_seed(6)
    method.train_on(site(1), start, job)
    again = method.train_on(device, start, job)
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in start)
    assert first.loss != method.train_on(device, start, job._replace(round=1)).loss


def test_a_device_with_one_image_trains_without_its_statistics():
    method = FedAvg(FACTS, network=PERCEPTRON, array="features", share_down=0.0)
    own = Site(0, Samples(torch.randn(1, D), torch.tensor([2])))
    update = method.train_on(own, weights_of(method.small), method.jobs(0)[0])
    assert update.finite
    assert torch.equal(update.weights["trunk.0.running_mean"], torch.zeros(D))


def test_batches_of_one_image_are_trained_on_without_their_statistics():
    method = FedAvg(FACTS, network=PERCEPTRON, array="features", share_down=0.0, batch_size=2)
    own = Site(0, Samples(torch.randn(5, D), torch.tensor([0, 1, 2, 3, 0])))
    assert [len(rows) for rows in batches_of(5, 2, 1, 0, None)] == [2, 2, 1]
    update = method.train_on(own, weights_of(method.small), method.jobs(0)[0])
    assert update.finite
    assert update.steps == 3
    module = Distilled(PERCEPTRON(num_classes=K), nn.Linear(D, K), "features", "mse").train()
    before = module.student.trunk[0].running_mean.clone()
    module.loss(torch.randn(1, D), torch.tensor([0])).backward()
    assert torch.equal(module.student.trunk[0].running_mean, before)
    module.loss(torch.randn(2, D), torch.tensor([0, 1])).backward()
    assert not torch.equal(module.student.trunk[0].running_mean, before)


def test_no_usual_batch_has_a_single_image():
    assert [len(rows) for rows in batches_of(17, 16, 1, 0, None)] == [9, 8]
    assert [len(rows) for rows in batches_of(10, 4, 1, 0, 5)] == [4] * 5
    assert sorted(np.concatenate(list(batches_of(12, 4, 1, 0, 3)))) == list(range(12))


def test_a_device_that_answers_with_nan_is_left_out(caplog):
    method = dc_ccl(retune="none")
    good, start = site(0), {name: t.clone() for name, t in weights_of(method.small).items()}
    cloud, job = site(CLOUD), method.jobs(0)[0]
    fine = method.train_on(good, start, job)
    broken = fine._replace(weights={name: t * torch.nan for name, t in fine.weights.items()})
    alone, facts = make_round(method, start, 0, cloud, lambda job, weights: {0: fine})
    both, more = make_round(method, start, 0, cloud, lambda job, weights: {0: fine, 3: broken})
    assert all(torch.equal(alone[name], both[name]) for name in alone)
    assert [facts["jobs"][0]["excluded"], more["jobs"][0]["excluded"]] == [[], [3]]
    assert "device 3 answers with numbers that are not finite; it is left out" in caplog.text
    other = fine._replace(weights={name: t for name, t in fine.weights.items() if name != "head.bias"})
    few, more = make_round(
        method, start, 0, cloud, lambda job, weights: {0: fine, 3: other, 4: fine._replace(samples=0)}
    )
    assert all(torch.equal(alone[name], few[name]) for name in alone)
    assert more["jobs"][0]["excluded"] == [3, 4]
    assert "device 3 answers with weights of another network" in caplog.text


@pytest.mark.parametrize("retune", RETUNE)
def test_a_round_without_an_answer_changes_nothing_but_what_the_cloud_does_alone(retune):
    method, cloud = dc_ccl(retune=retune), site(CLOUD, 200, (0, 1))
    if retune == "mixed":
        sizes = Sizes(train=20, received=2, cloud=200, sample_bytes=1)
        method.join(site(0), cloud, Link(method.name, method.budget(sizes)))
    start = {name: t.clone() for name, t in weights_of(method.small).items()}
    weights, facts = make_round(method, start, 0, cloud, lambda job, weights: {})
    changed = [name for name in start if not torch.equal(weights[name], start[name])]
    assert changed == (["head.weight", "head.bias"] if retune == "mixed" else [])
    assert [list(job["losses"]) for job in facts["jobs"]][:1] == [[]]


@pytest.mark.parametrize("payload", ["float16", "int8"])
def test_fewer_bytes_change_little(payload):
    exact, few = (played(dc_ccl(payload=form, lr=0.01)) for form in ("float32", payload))
    size = sum(few[0].counted.values()) / sum(exact[0].counted.values())
    assert size < {"float16": 0.55, "int8": 0.6}[payload]
    for name, t in exact[3].items():
        assert (few[3][name] - t).abs().max() < 0.05 * (1 + t.abs().max())


def test_the_draw_of_devices():
    method = dc_ccl(participation=0.3, unavailable=0.5)
    drawn = [method.draw(number, 10) for number in range(200)]
    assert all(len(set(devices)) == 3 for devices, _ in drawn)
    assert len({tuple(devices) for devices, _ in drawn}) > 20
    assert 0.4 < np.mean([there.mean() for _, there in drawn]) < 0.6
    again = method.draw(3, 10)
    assert again[0].tolist() == drawn[3][0].tolist()
    assert len(dc_ccl(participation=0.01).draw(0, 10)[0]) == 1


def test_wrong_control_has_the_logits_of_other_images():
    right, wrong = dc_ccl(arm="dc_ccl"), dc_ccl(arm="wrong_control")
    device, job = site(0), Job(0)
    logits = logits_of(right.control, device.own.x)
    assert torch.equal(right.partner(device, job, device.own), logits)
    other = site(0)
    shuffled = wrong.partner(other, job, other.own)
    assert not torch.equal(shuffled, logits)
    assert torch.equal(shuffled.sort(0).values, logits.sort(0).values)
    assert dc_ccl(arm="no_control").partner(device, job, device.own) is None


def test_fedprox_holds_devices_alone():
    near = {number: distances(site(number)) for number in (0, CLOUD)}
    assert near[0][5.0] < 0.5 * near[0][0.0]
    assert near[CLOUD][5.0] == near[CLOUD][0.0]


def distances(where):
    """Return the squared distance that the network of a site has moved, without and with a proximal term."""
    near = {}
    for mu in (0.0, 5.0):
        method = FedAvg(FACTS, proximal=mu, network=partial(NETWORK, dropout=0.0), lr=0.1)
        start = {name: t.clone() for name, t in weights_of(method.small).items()}
        update = method.train_on(where, start, Job(0, lr=0.1, epochs=5))
        near[mu] = sum(
            float((update.weights[name] - t).square().sum()) for name, t in start.items() if "run" not in name
        )
    return near


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"rounds": 0}, "rounds=0: must be"),
        ({"devices": 0}, "devices=0"),
        ({"share_down": 1.0}, "share_down=1.0"),
        ({"participation": 0.0}, "participation=0.0"),
        ({"payload": "int4"}, "payload=int4: must be one of float32, float16, int8"),
        ({"arm": "fedavg"}, "arm=fedavg: must be one of"),
        ({"retune": "cloud"}, "retune=cloud: must be one of federated, device, mixed, none"),
        ({"network": partial(SmallCNN, size=12)}, r"network=SmallCNN: does not take images \[1, 8, 8\]"),
        ({"network": lambda num_classes: NETWORK(num_classes=7)}, "gives .7. numbers for an image, and there are 4"),
        ({"network": "small_cnn"}, "network=small_cnn: must be a node"),
        ({"array": "tokens"}, "reads tokens, of which nothing is known"),
    ],
)
def test_wrong_settings(settings, problem):
    with pytest.raises(UserError, match=problem):
        dc_ccl(**settings)


def test_wrong_weights_are_refused():
    method = dc_ccl()
    weights = dict(weights_of(method.small))
    with pytest.raises(UserError, match="head.bias is missing not .4."):
        method.load({name: t for name, t in weights.items() if name != "head.bias"})
    with pytest.raises(UserError, match="head.bias is .5. not .4."):
        method.load({**weights, "head.bias": torch.zeros(K + 1)})


def test_logits_of_classes_without_images():
    """They are the mean of the others, and all are divided by the temperature."""
    plain, mean = dc_ccl(temperature=2.0), dc_ccl(temperature=2.0, unseen_logits="mean")
    x = torch.randn(3, D)
    torch.testing.assert_close(plain.large_logits(x), plain.large(x) / 2)
    mean.large.load_state_dict(plain.large.state_dict())
    mean.known_K[2:] = False
    got, want = mean.large_logits(x), plain.large_logits(x)
    torch.testing.assert_close(got[:, :2], want[:, :2])
    torch.testing.assert_close(got[:, 2:], want[:, :2].mean(1, keepdim=True).expand(-1, 2))


@pytest.mark.parametrize("form", ["mse", "kl"])
def test_distillation_brings_logits_nearer(form):
    torch.manual_seed(0)
    x, features = torch.randn(64, 1, SIDE, SIDE), torch.randn(64, D)
    method = dc_ccl(distillation=form, network=partial(NETWORK, dropout=0.0))
    with torch.no_grad():
        method.large.weight.normal_(), method.large.bias.zero_()
    with torch.no_grad():
        y = method.large_logits(features).argmax(-1)
    module = Distilled(method.control.train(), method.large_logits, "images", form)
    optimizer = torch.optim.Adam(method.control.parameters(), 0.01)
    losses = []
    for _ in range(60):
        loss = module.loss(features, y, images=x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in method.large.parameters())
