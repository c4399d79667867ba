"""The classifier of single images: its equations, its training, and what it counts beside the backbone's."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from iciia_exp.models.perceptron import Perceptron, ensemble_weights, normalised
from iciia_exp.tasks import SINGLE_LABEL

D, K, W = 12, 4, 16


def make():
    torch.manual_seed(0)
    net = Perceptron(D, K, W)
    nn.init.normal_(net.norm.weight)
    nn.init.normal_(net.norm.bias)
    return net.eval()


def test_the_equations():
    net, x_D = make(), torch.randn(D)
    roots = torch.tensor([abs(v) ** 0.5 * (1 if v > 0 else -1) for v in x_D.tolist()])
    roots = (roots - roots.mean()) / (roots.var(unbiased=False) + 1e-5).sqrt()
    hidden = net.hidden.weight @ roots + net.hidden.bias
    hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + 1e-5).sqrt() * net.norm.weight + net.norm.bias
    hidden = torch.stack([0.5 * h * (1 + torch.erf(h / 2**0.5)) for h in hidden])
    torch.testing.assert_close(net(x_D.expand(2, 3, D))[1, 2], net.last.weight @ hidden + net.last.bias)
    assert net.macs == W * D + W * K == sum(p.numel() for m in (net.hidden, net.last) for p in (m.weight,))


@pytest.mark.parametrize("multi", [False, True])
def test_the_loss_is_that_of_mixed_images(multi):
    net, x_BD = make(), torch.randn(5, D)
    y = torch.randint(0, 2, (5, K)) if multi else torch.randint(0, K, (5,))
    torch.manual_seed(3)
    got = net.loss(x_BD, y)
    torch.manual_seed(3)
    other, share = torch.randperm(5).tolist(), float(torch.rand(()))
    assert other != list(range(5))
    losses = []
    for i, j in enumerate(other):
        mixed = share * normalised(x_BD[i]) + (1 - share) * normalised(x_BD[j])
        logits = net.classify(mixed, None)
        if multi:
            want = share * y[i] + (1 - share) * y[j]
            losses.append(-(want * F.logsigmoid(logits) + (1 - want) * F.logsigmoid(-logits)).mean())
        else:
            want = share * F.one_hot(y[i], K) + (1 - share) * F.one_hot(y[j], K)
            losses.append(-((0.9 * want + 0.1 / K) * logits.log_softmax(-1)).sum())
    torch.testing.assert_close(got, torch.stack(losses).mean())


def ring(images):
    """Classes that no linear classifier tells apart: a feature's size, whatever its sign."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, images)
    x = rng.choice([-1.0, 1.0], (images, D)) * np.where(np.arange(D) % 2 == y[:, None], 2.0, 0.2)
    return (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32), y


def test_it_learns_what_a_linear_classifier_cannot():
    x_MD, y_M = (torch.from_numpy(a) for a in ring(700))
    torch.manual_seed(0)
    net, recipe = Perceptron(D, 2, 64), Perceptron.recipe(600)
    optimizer = recipe.make_optimizer(net.parameters())
    for _ in range(recipe.epochs):
        optimizer.zero_grad()
        net.loss(x_MD[:600], y_M[:600]).backward()
        optimizer.step()
    assert (net.eval()(x_MD[600:]).argmax(-1) == y_M[600:]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("images", "epochs", "batch"), [(1, 100, 1), (600, 100, 256), (24_000, 32, 256), (10**6, 8, 256)]
)
def test_its_training_takes_about_as_many_steps(images, epochs, batch):
    recipe = Perceptron.recipe(images)
    assert (recipe.epochs, recipe.batch_size) == (epochs, batch)


def test_what_counts_is_what_is_right():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, K, (2000,), generator=generator)
    noise = torch.randn(2000, K, generator=generator)
    # of Gaussians of one width around one-hot means these are the logits of Bayes' rule
    good = 1.5**2 * (F.one_hot(y, K) + torch.randn(2000, K, generator=generator) / 1.5)
    backbone, other = ensemble_weights(SINGLE_LABEL, y, 3 * good, noise).tolist()
    assert (backbone, other) == (pytest.approx(1.0, abs=0.05), pytest.approx(0.0, abs=0.25))  # the backbone's own scale
    second = 1.5**2 * (F.one_hot(y, K) + torch.randn(2000, K, generator=generator) / 1.5)
    backbone, other = ensemble_weights(SINGLE_LABEL, y, 3 * good, second).tolist()
    # as sure as each other: the scale aside they count the same
    assert other / backbone == pytest.approx(3.0, rel=0.15)
    backbone, other = ensemble_weights(SINGLE_LABEL, y, noise + good / 100, good).tolist()
    assert other > 10 * abs(backbone)


@pytest.mark.parametrize("multi", [False, True])
def test_with_light_regularisation_the_loss_is_that_of_single_images(multi):
    torch.manual_seed(0)
    net, x_BD = Perceptron(D, K, W, light=True).eval(), torch.randn(5, D)
    y = torch.randint(0, 2, (5, K)) if multi else torch.randint(0, K, (5,))
    want = F.binary_cross_entropy_with_logits(net(x_BD), y.float()) if multi else F.cross_entropy(net(x_BD), y)
    torch.testing.assert_close(net.loss(x_BD, y), want)


@pytest.mark.parametrize("light", [False, True])
def test_a_client_vector_is_a_second_input(light):
    torch.manual_seed(0)
    net, x_BD, c_BR = Perceptron(D, K, W, client=3, light=light).eval(), torch.randn(5, D), torch.randn(5, 3)
    hidden = net.norm(net.hidden(normalised(x_BD)) + c_BR @ net.of_client.weight.T)
    torch.testing.assert_close(net(x_BD, c_BR), net.last(F.gelu(hidden)))
    torch.testing.assert_close(net(x_BD, torch.zeros(5, 3)), net(x_BD))
    assert net.macs == W * (D + 3 + K)
    y, alike = torch.randint(0, K, (5,)), c_BR[:, None].expand(5, 4, 3)
    losses = []
    for client in (alike, alike + torch.randn(5, 4, 3)):  # one of the pasts is drawn
        torch.manual_seed(1)
        losses.append(float(net.loss(x_BD, y, client).detach()))
    assert losses[0] != losses[1]
    if light:
        assert losses[0] == pytest.approx(float(F.cross_entropy(net(x_BD, c_BR), y).detach()), rel=1e-5)
