"""MIET: what a device learns on tokens, alone and among others, and what is sent."""

import numpy as np
import pytest
import torch
from torch import nn

from iciia_exp.errors import ConfigError
from iciia_exp.ledger import Link, Sizes
from iciia_exp.methods.base import Facts
from iciia_exp.methods.tune.miet import Miet
from iciia_exp.models.payloads import pack, packed_bytes, unpack
from tests.making.cloud import TOKENS, accuracy, small_cloud, taught

K, D = 6, 12


def facts(arrays=None):
    return Facts.of(nn.Linear(D, K), arrays={"tokens": TOKENS} if arrays is None else arrays)


def learned(cloud, **settings):
    settings = {"epochs": 20, "linear_epochs": 20, "batch_size": 8, "rank": 4, "lr": 0.01} | settings
    return taught(Miet(facts(), **settings), cloud)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"blocks": 0},
        {"pool": "mean"},
        {"pool": "both"},
        {"subtract": True},
        {"payload": "int8"},
        {"standardise": False, "heads": 2},
    ],
)
def test_devices_learn_their_own_classes(settings):
    cloud = small_cloud(D, K, noise=0.3)
    method, _, _ = learned(cloud, **settings)
    assert method.classes == 2
    assert accuracy(method, cloud) > 0.9
    (batch,) = cloud.chunks("test")
    logits = method.logits(batch)
    for c, client in enumerate(batch.client_C.tolist()):
        own = set(cloud.batches.labels[cloud.clients.train[client]])
        probable = logits[c][batch.mask_CS[c]].softmax(-1).sum(0) > 0
        assert set(probable.nonzero()[:, 0].tolist()) <= own


def test_a_device_alone_learns_what_it_learns_among_others():
    cloud = small_cloud(D, K, images=11)
    method, _, _ = learned(cloud, epochs=5, linear_epochs=5)
    link = Link(method.name, method.budget(Sizes()))
    for client in (0, 7):
        alone = method.personalise(cloud.devices.own(np.array([client])), link, cloud.view)
        for name, state in alone.states.items():
            torch.testing.assert_close(state[0], method.states.states[name][client], atol=1e-4, rtol=1e-4)


def test_clients_with_fewer_classes_than_others():
    cloud = small_cloud(D, K, owned=3)
    labels = cloud.batches.labels
    one = cloud.clients.train[0]
    labels[one] = labels[one][0]  # a task with one class
    method, _, _ = learned(cloud, epochs=3, linear_epochs=3)
    assert method.classes == 3
    classes = method.states.states["classes"]
    assert classes[0].tolist() == [float(labels[one][0]), -1, -1]
    (batch,) = cloud.chunks("test")
    logits = method.logits(batch)
    assert logits.isfinite().all()
    assert (logits[batch.client_C == 0].argmax(-1) == labels[one][0]).all()


def test_val_decides_and_the_linear_start_is_kept():
    cloud = small_cloud(D, K)
    linear, _, _ = learned(cloud, blocks=0, epochs=20, patience=20)
    # a rate at which nothing is learned: the start is the best epoch
    method, _, epochs = learned(cloud, epochs=1, patience=1, linear_epochs=20)
    assert epochs.tolist() == [1] * 12
    assert abs(accuracy(method, cloud) - accuracy(linear, cloud)) < 0.15


def test_only_tokens_come_down_and_no_label_goes_up():
    cloud = small_cloud(D, K)
    method, link, _ = learned(cloud, payload="int8", epochs=1, linear_epochs=1)
    images = 12 * (8 + 8)
    assert link.counted == {("client_once", "cloud", "training", "tokens"): images * packed_bytes(TOKENS, "int8")}
    budget = method.budget(Sizes(train=8, val=8, image_bytes=100, backbone_macs=7))
    assert budget.leaves_device() == ("images",)
    assert budget.bytes("request", "device") == 100
    assert budget.bytes("request", "cloud") == packed_bytes(TOKENS, "int8")
    assert budget.macs("request", "cloud") == 7
    with pytest.raises(PermissionError, match="labels"):
        link.up("labels", torch.zeros(1))


def test_int8_is_the_vectors(reference):
    from safetensors import safe_open

    with safe_open(reference / "miet_route_formula_vectors.safetensors", "pt") as file:
        for case in ("miet0", "miet1"):
            tokens = file.get_tensor(f"{case}/gathered")
            values, scale = pack(tokens, "int8")
            assert torch.equal(values, file.get_tensor(f"{case}/int8_values"))
            torch.testing.assert_close(scale, file.get_tensor(f"{case}/int8_scale"))
            assert (unpack((values, scale)) - tokens).abs().max() <= scale.max() / 2 + 1e-6
    assert unpack(pack(torch.zeros(1, 2, 3), "int8")).tolist() == [[[0.0] * 3] * 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"payload": "int4"}, "payload=int4: must be one of float32, float16, int8"),
        ({"heads": 3}, "heads=3: must divide the rank 16"),
        ({"lr": 0}, "lr=0: must be a number above 0"),
        ({"epochs": 0}, "epochs=0: must be a whole number"),
        ({"blocks": 0, "pool": "max"}, "pool=max: must be one of"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Miet(facts(), **settings)


def test_it_needs_tokens():
    with pytest.raises(ConfigError, match="reads tokens; choose a backbone that gives them"):
        Miet(facts({}))
    with pytest.raises(ConfigError, match="pool=class: the backbone has no class token; use mean"):
        Miet(facts({"tokens": (4, 8)}))
    assert Miet(facts({"tokens": (4, 8)}), pool="mean").prefix == 0


def test_another_seed_is_another_network():
    methods = [Miet(facts(), seed=seed) for seed in (0, 1)]
    (a, b), x = (method._drawn(method.network).blocks[0] for method in methods), torch.randn(1, *TOKENS)
    assert not torch.equal(a.query, b.query)
    assert torch.equal(a(x), x)


def test_a_linear_classifier_of_the_class_token_is_sent_it_alone():
    cloud = small_cloud(D, K)
    method, link, _ = learned(cloud, blocks=0)
    images = 12 * (8 + 8)
    assert link.counted == {("client_once", "cloud", "training", "tokens"): images * packed_bytes((1, 8), "float16")}
    assert method.state_shapes["mean"] == (1, 8)
    assert Miet(facts(), blocks=0, pool="mean").shape == TOKENS
