"""Confidence routing of images between two networks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from iciia_exp.cost import count_macs
from iciia_exp.data.batches import ClientIndex, FeatureBatches
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.data.views import CloudView
from iciia_exp.errors import ConfigError
from iciia_exp.ledger import Sizes
from iciia_exp.methods.base import Facts
from iciia_exp.methods.route.route_confidence import RouteConfidence
from iciia_exp.models.linear_probe import fit_linear_head

N, D, SMALL, K = 400, 6, 4, 3


@pytest.fixture(scope="module")
def data():
    """Return clients and features; those of the small network are noisier, and its classes overlap."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, K, N)
    large = 3 * np.eye(K, D)[y] + 0.5 * rng.standard_normal((N, D))
    small = 2 * np.eye(K, SMALL)[y] + 0.9 * rng.standard_normal((N, SMALL))
    arrays = {"second": small.astype(np.float32)}
    batches = FeatureBatches(large.astype(np.float32), y, arrays=arrays)
    ids = np.array(["a", "b"], dtype=object)
    parts = [np.array_split(part, 2) for part in np.split(np.arange(N), [150, 250])]
    return Clients(ids, ids, *(Ragged.from_rows(part) for part in parts)), batches


def make(data, **options):
    clients, batches = data
    head = nn.Linear(D, K)
    with torch.no_grad():
        head.weight.copy_(torch.eye(K, D))
        head.bias.zero_()
    method = RouteConfidence(Facts.of(head, arrays={"second": (SMALL,)}), **options)
    method.learn(CloudView(clients, batches, K, 16), None)
    test = batches[ClientIndex(clients.test.padded(np.arange(2), 75), np.arange(2))]
    return method, test


def accuracy(method, batch):
    return float((method.logits(batch).argmax(-1) == batch.y_CS)[batch.mask_CS].float().mean())


@pytest.mark.parametrize("score", ["confidence", "margin"])
def test_images_of_which_the_small_network_is_unsure_go_to_the_large_one(data, score):
    found = {share: accuracy(*make(data, score=score, share=share)) for share in (0.0, 0.3, 1.0)}
    random = accuracy(*make(data, score="random", share=0.3))
    assert found[0.0] < random < found[0.3] < found[1.0] + 0.02
    method, test = make(data, score=score, share=0.3)
    cloud = method.to_cloud(test)
    small, large = method.both(test)
    assert method.score(test)[cloud].max() < method.score(test)[~cloud & test.mask_CS].min()
    assert torch.equal(method.logits(test)[cloud], large[cloud])
    assert torch.equal(method.logits(test)[~cloud], small[~cloud])
    interval = method.interval(requests=150)
    assert interval.low <= cloud.float().sum() / 150 <= interval.high
    assert interval.expected <= 0.3


def test_an_image_has_the_same_score_in_every_batch(data):
    for score in ("confidence", "random"):
        method, test = make(data, score=score)
        one = test.take(slice(0, 1)).cut()
        torch.testing.assert_close(method.score(one), method.score(test)[:1, : one.mask_CS.shape[1]])


def test_an_image_that_is_dealt_several_times_counts_once(data, monkeypatch):
    """Else the share has too narrow an interval, and held-out images are among the fitted ones."""
    clients, batches = data
    fitted = []

    def fit(x, *rest):
        fitted.append(np.sort(x[:, 0]))
        return fit_linear_head(x, *rest)

    monkeypatch.setattr("iciia_exp.methods.route.route_confidence.fit_linear_head", fit)
    twice = {role: np.concatenate([clients[role].values] * 2) for role in ("train", "val")}
    dealt = {role: Ragged.from_rows([rows, rows]) for role, rows in twice.items()}
    once, _ = make(data, score="random")
    again, _ = make((replace(clients, **dealt), batches), score="random")
    assert torch.equal(again.reference_n, once.reference_n)
    assert np.array_equal(*fitted)


def test_random_scores_are_even_and_those_of_the_seed(data):
    found = {}
    for seed in (0, 1):
        method, test = make(data, score="random", seed=seed)
        found[seed] = method.score(test)[test.mask_CS]
        assert abs(found[seed].mean() - 0.5) < 4 / (12 * len(found[seed])) ** 0.5
    assert abs(torch.corrcoef(torch.stack([*found.values()]))[0, 1]) < 0.3
    zeros = torch.zeros(1, 1, SMALL)
    assert method.score(test._replace(arrays={"second": zeros}, mask_CS=torch.ones(1, 1))) == 0


def test_a_request_costs_what_the_budget_states(data):
    method, _ = make(data, share=0.25)
    budget = method.budget(Sizes(1, backbone_macs=4000, image_bytes=400, second_macs=100))
    small = 100 + count_macs(method.small, torch.zeros(1, SMALL))
    assert budget.macs("request", "device") == small
    assert budget.macs("request", "cloud") == 1000
    assert budget.bytes("request", "device") == 100
    assert budget.bytes("request", "cloud") == 4 * K // 4
    assert budget.leaves_device() == ("images",)
    assert method.budget(Sizes(1, backbone_macs=4000, image_bytes=400)).macs("request", "device") is None


def test_it_needs_a_second_network():
    with pytest.raises(ConfigError, match="use backbone=paired"):
        RouteConfidence(Facts.of(nn.Linear(D, K)))
