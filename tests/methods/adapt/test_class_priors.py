"""Calibrators and inferred class priors against plain loops of their equations, SciPy, or a case known by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F

from iciia_exp.data.batches import FeatureBatches
from iciia_exp.errors import ConfigError
from iciia_exp.methods.adapt.calibration import fit_calibrator
from iciia_exp.methods.adapt.class_prior import cluster_histograms
from iciia_exp.methods.adapt.client_prior import ClientPrior, ClientPriorMethod
from iciia_exp.methods.adapt.client_types import ClientTypes, ClientTypesMethod
from iciia_exp.methods.adapt.prior_em import PriorEM, PriorMAP
from iciia_exp.methods.adapt.smoothed_prior import SmoothedPrior
from iciia_exp.methods.base import Facts
from iciia_exp.tasks import MULTI_LABEL, SINGLE_LABEL
from tests.making.cloud import K, S, SmallCloud, no_fit, small_cloud, studied


def posteriors(method, x):
    """Return calibrated posteriors and the source prior as lists of floats."""
    calibrator = (method.prior if hasattr(method, "prior") else method).calibrator
    logits = (x @ method.head.weight.T + method.head.bias) / calibrator.log_temperature.exp() + calibrator.bias
    return logits.softmax(-1).double().numpy(), calibrator.log_source.exp().double().numpy()


# ---- calibration


@pytest.mark.parametrize("calibrator", ["temperature", "bcts"])
def test_calibrators_against_scipy(calibrator):
    rng = np.random.default_rng(0)
    b, y = 3 * rng.standard_normal((200, K)), rng.integers(0, K, 200)

    def loss(free):
        logits = b / math.exp(free[0]) + np.append(free[1:], np.zeros(K - len(free) + 1))
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -log_p[np.arange(200), y].mean() + (free[1:] ** 2).sum() / 400

    want = minimize(loss, np.zeros(1 if calibrator == "temperature" else 1 + K))
    log_t, bias = fit_calibrator(SINGLE_LABEL, torch.from_numpy(b), torch.from_numpy(y), calibrator)
    got = np.append(log_t.numpy(), bias.numpy() if calibrator == "bcts" else [])
    assert loss(got) == pytest.approx(want.fun, abs=1e-5)
    assert (bias == 0).all() == (calibrator == "temperature")


def test_classes_that_the_cloud_has_no_images_of_are_calibrated_as_the_others():
    """They have no val images because their clients are new, not because they are rare."""
    torch.manual_seed(0)
    whole = small_cloud(8, 6, clients=12, noise=3.0)
    labels = whole.batches.labels.copy()
    labels[labels > 3] -= 3
    batches = FeatureBatches(whole.batches.features, labels)
    cloud = SmallCloud(whole.clients, batches, 6, whole.images).view
    assert cloud.known_classes().tolist() == [True] * 4 + [False] * 2
    head = nn.Linear(8, 6)
    few = nn.Linear(8, 4)
    few.load_state_dict({name: t[:4] for name, t in head.state_dict().items()})
    found, want = (PriorMAP(Facts.of(linear), calibrator="bcts") for linear in (head, few))
    found.learn(cloud, no_fit)
    want.learn(SmallCloud(whole.clients, batches, 4, whole.images).view, no_fit)
    torch.testing.assert_close(found.calibrator.log_temperature, want.calibrator.log_temperature)
    torch.testing.assert_close(found.calibrator.bias[:4], want.calibrator.bias)
    assert found.calibrator.bias[4:].tolist() == [0, 0]
    source_K = found.calibrator.log_source.exp()
    torch.testing.assert_close(source_K[:4], want.calibrator.log_source.exp() * 4 / 6)
    torch.testing.assert_close(source_K[4:], torch.full((2,), 1 / 6))


# ---- class priors


def em(p, s, strength, iterations=50):
    prior = s.copy()
    for _ in range(iterations):
        r = prior * p / s
        r /= r.sum(1, keepdims=True)
        prior = (r.sum(0) + strength * s) / (len(p) + strength)
    return prior


@pytest.mark.parametrize(("client_type", "settings"), [(PriorEM, {}), (PriorMAP, {"strength": 2.5}), (PriorMAP, {})])
def test_em_against_a_loop(head, x, client_type, settings):
    method, _ = studied(client_type(Facts.of(head), **settings))
    p, s = posteriors(method, x)
    want = p / s * em(p, s, float(method.strength)).clip(1e-8)
    got = method(x[None])[0].softmax(-1)
    np.testing.assert_allclose(got, want / want.sum(1, keepdims=True), atol=1e-5)


def test_em_recovers_the_prior_of_separable_classes():
    head = nn.Linear(K, K)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    method = PriorEM(Facts.of(head), "none", iterations=200)
    true = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0, 0.0])
    labels = torch.arange(K).repeat_interleave((true * 100).long())
    x = 3 * F.one_hot(labels, K).float() + 0.3 * torch.randn(100, K, generator=torch.Generator().manual_seed(0))
    logits = method(x[None])[0]
    prior = (logits - method.head(x).log_softmax(-1) + method.calibrator.log_source).softmax(-1)[0]
    torch.testing.assert_close(prior, true, atol=0.05, rtol=0)


def test_em_of_attributes_is_em_of_two_classes(head, x):
    method, _ = studied(PriorEM(Facts.of(head, MULTI_LABEL)))
    calibrator = method.calibrator
    b = (x @ head.weight.T + head.bias) / calibrator.log_temperature.exp() + calibrator.bias
    s = calibrator.log_source.exp().double().numpy()
    got = method(x[None])[0].sigmoid()
    for k in range(K):
        p = b[:, k].sigmoid().double().detach().numpy()
        p, two = np.stack([1 - p, p], 1), np.array([1 - s[k], s[k]])
        want = p / two * em(p, two, 0.0).clip(1e-8)
        np.testing.assert_allclose(got[:, k].detach(), want[:, 1] / want.sum(1), atol=1e-4)


def test_smoothed_prior_by_its_equation(head, x):
    method = SmoothedPrior(Facts.of(head))
    p, _ = posteriors(method, x)
    q = p.mean(0)
    gamma = max(1 / S, 1 / K) / q.max()
    want = p * (q + gamma) / (1 + gamma * K)
    np.testing.assert_allclose(method(x[None])[0].exp().detach(), want, atol=1e-6)


def test_client_types_by_bayes_rule(head, x):
    method, cloud = studied(ClientTypesMethod(Facts.of(head), partial(ClientTypes, smoothing=0.2)))
    p, s = posteriors(method, x)
    counts = cloud.view.class_counts("train")
    types = counts / counts.sum(1, keepdims=True)
    types = 0.8 * types + 0.2 * types.mean(0)

    def answer(target, past):
        weight = np.array([np.prod([(h * p[i] / s).sum() for i in past]) for h in types])
        return p[target] / s * (weight / weight.sum() @ types)

    stream, batch = method.stream(x[None])[0].exp(), method(x[None])[0].exp()
    for i in range(S):
        np.testing.assert_allclose(stream[i], answer(i, range(i)), rtol=1e-3)
        np.testing.assert_allclose(batch[i], answer(i, [j for j in range(S) if j != i]), rtol=1e-3)


def test_types_are_clustered_where_there_are_many():
    rng = np.random.default_rng(0)
    near = rng.dirichlet(np.ones(K), 3)[rng.integers(0, 3, 500)]
    histograms = near + 1e-4 * rng.random((500, K))
    types, shares = cluster_histograms(histograms / histograms.sum(1, keepdims=True), 3)
    assert types.shape == (3, K)
    np.testing.assert_allclose(types.sum(1), 1)
    np.testing.assert_allclose(sorted(shares), sorted(np.unique(near, axis=0, return_counts=True)[1] / 500), atol=1e-6)
    same, alone = cluster_histograms(np.tile(near[:1], (9, 1)), 3)
    assert same.shape == (1, K)
    assert alone.tolist() == [1.0]


@pytest.mark.parametrize(("change", "iid_bonus"), [(0.0, 0.0), (0.2, 0.0), (0.0, 1.5), (0.2, 1.5)])
def test_client_prior_against_a_loop(head, x, change, iid_bonus):
    """With changes, the forward algorithm of a hidden Markov chain over the hypotheses."""
    strengths, new = [1.0, 4.0], 0.4
    settings = {"smoothing": 0.1, "new": new, "all_classes": 0.5, "strengths": strengths, "change": change}
    settings["iid_bonus"] = iid_bonus
    method, cloud = studied(ClientPriorMethod(Facts.of(head), partial(ClientPrior, **settings)))
    p, s = posteriors(method, x)
    likelihood = p / s
    histograms = cloud.view.class_counts("train")
    types = histograms / histograms.sum(1, keepdims=True)
    types = 0.9 * types + 0.1 * types.mean(0)
    strengths.append(1e9)
    start = np.array([(1 - new) / len(types)] * len(types) + [0.1, 0.1, 0.2])
    weight, counts = start.copy(), [np.zeros(K) for _ in strengths]
    got = method.stream(x[None])[0].softmax(-1)
    for i in range(S):
        says = [*types, *((c + a * s) / (c.sum() + a) for a, c in zip(strengths, counts, strict=True))]
        trusted = weight * np.append(np.ones(len(weight) - 1), math.exp(iid_bonus))  # the past is at most 6 images
        want = likelihood[i] * (trusted @ np.stack(says)) / trusted.sum()
        np.testing.assert_allclose(got[i], want / want.sum(), atol=1e-4)
        evidence = np.array([q @ likelihood[i] for q in says])
        weight = weight * evidence / (weight @ evidence)
        stayed = (1 - change) * weight
        weight = stayed + change * start
        for j, old in enumerate(counts):
            h = len(types) + j
            counts[j] = (old + says[h] * likelihood[i] / evidence[h]) * stayed[h] / weight[h]
    if not change:
        torch.testing.assert_close(method(x[None])[0, -1], method.stream(x[None])[0, -1], atol=1e-4, rtol=1e-4)


def test_a_client_that_changes_is_followed():
    """Twenty images of one type, then those of another: with changes, one image is enough to leave the first."""
    head = nn.Linear(K, K)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    images = 6 * F.one_hot(torch.tensor([0, 1] * 10 + [2, 3, 2, 3]), K).float()[None]
    right = {}
    for change in (0.0, 0.01):
        settings = {"calibrator": "none", "smoothing": 0.01, "iid_bonus": 0.0, "change": change}
        method = ClientPriorMethod(Facts.of(head), partial(ClientPrior, **settings))
        method.prior.types = torch.tensor([[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 0, 0]])
        method.prior.log_weight = torch.full((2,), 0.5).log()
        posterior = method.stream(images)[0].softmax(-1)
        right[change] = posterior[torch.arange(24), images[0].argmax(-1)]
    assert right[0.01][19] > 0.99
    assert right[0.01][21:].min() > 0.95
    assert right[0.01][20] > right[0.0][20]
    assert right[0.01][21] > right[0.0][21]


def test_client_prior_learns_a_client_with_classes_that_no_training_client_has_together():
    head = nn.Linear(K, K)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    settings = {"calibrator": "none", "smoothing": 0.01}
    method = ClientPriorMethod(Facts.of(head), partial(ClientPrior, iid_bonus=0.0, **settings))
    method.prior.types = torch.tensor([[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 0.5, 0.5]])
    method.prior.log_weight = torch.full((3,), 1 / 3).log()
    images = 6 * F.one_hot(torch.tensor([0, 2] * 6), K).float()
    doubtful = 1.2 * F.one_hot(torch.tensor([2]), K).float() + 1.3 * F.one_hot(torch.tensor([3]), K).float()
    past = torch.cat([images, doubtful])[None]
    assert method.stream(past)[0, -1].argmax() == 2
    assert head(doubtful)[0].argmax() == 3
    believer = ClientTypesMethod(Facts.of(head), partial(ClientTypes, **settings))
    believer.prior.types, believer.prior.log_weight = method.prior.types, method.prior.log_weight
    assert method.stream(past)[0, -1].softmax(-1)[2] > believer.stream(past)[0, -1].softmax(-1)[2]


def test_settings_that_are_other_methods(head):
    with pytest.raises(ConfigError, match="client_types"):
        ClientPrior(Facts.of(head), new=0.0, iid_bonus=0.0)
