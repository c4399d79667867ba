"""Client vector and client profile, against their equations as loops and on clients that differ in style."""

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from torch import nn
from torch.nn import functional as F

from iciia_exp.data.batches import ClientBatch, FeatureBatches
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.errors import ConfigError
from iciia_exp.methods.adapt.client_profile import ClientProfile
from iciia_exp.methods.adapt.client_vector import ClientVector
from iciia_exp.methods.base import Facts
from iciia_exp.models.perceptron import normalised
from tests.making.cloud import SmallCloud, no_fit, plain_fit, small_cloud

D, K, R = 16, 4, 3


def styled_cloud(style=2.0, clients=40, images=10, seed=0):
    """Return clients with all classes whose images are shifted along one direction, by as much for one client."""
    rng = np.random.default_rng(seed)
    centres, direction = rng.standard_normal((K, D)) * 2, rng.standard_normal(D)
    shift = style * rng.standard_normal(clients)
    client = np.repeat(np.arange(clients), 3 * images)
    labels = rng.integers(0, K, len(client))
    features = centres[labels] + shift[client, None] * direction + rng.standard_normal((len(client), D))
    role = np.tile(np.repeat(np.arange(3), images), clients)
    names = np.array([f"client {i}" for i in range(clients)], dtype=object)
    rows = [Ragged.from_pairs(client[role == r], np.flatnonzero(role == r), clients) for r in range(3)]
    batches = FeatureBatches(features.astype(np.float32), labels)
    return SmallCloud(Clients(names, names, *rows), batches, K, images), labels


def head_of(cloud):
    """Return a classifier fitted on the val images."""
    (batch,) = cloud.chunks("val")
    x, y = batch.x_CSD[batch.mask_CS], batch.y_CS[batch.mask_CS]
    head = nn.Linear(x.shape[1], cloud.num_classes)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50)

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(head(x), y) + 1e-2 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head.requires_grad_(False)


def learned(cloud, fit=None, **options):
    torch.manual_seed(0)
    method = ClientProfile(Facts.of(head_of(cloud)), **{"hidden": 16, "vector": R, **options})
    method.learn(cloud.view, fit or plain_fit(cloud.view))
    return method.eval()


# ---- the vector


def test_directions_are_those_of_the_pairs_of_a_client():
    cloud, labels = styled_cloud(images=4, clients=12)
    vector = ClientVector(Facts.of(nn.Linear(D, K)), R)
    vector.find_directions(lambda: cloud.chunks("train"))
    z = normalised(torch.from_numpy(cloud.batches.features)).double().numpy()
    train = cloud.clients.train.values
    every = z[train].mean(0)
    mean = np.stack([np.append(z[train][labels[train] == k], every[None], 0).mean(0) for k in range(K)])
    e = z - mean[labels]
    total = sum(np.outer(e[i], e[i]) for i in train) / len(train)
    pairs = [
        np.outer(e[i], e[j])
        for c in range(12)
        for i in cloud.clients.train[c]
        for j in cloud.clients.train[c]
        if i != j
    ]
    total += (0.1 * np.trace(total) / D + 1e-6) * np.eye(D)
    want = eigh(np.mean(pairs, 0), total)[1][:, ::-1][:, :R]
    got = vector.of_image.double().numpy()
    for j in range(R):
        sign = np.sign(want[:, j] @ got[:, j])
        np.testing.assert_allclose(got[:, j], sign * want[:, j], atol=1e-3)
    np.testing.assert_allclose(vector.of_class.numpy(), mean @ got, atol=1e-3)


def test_correlation_is_the_mean_product_of_pairs():
    cloud, _ = styled_cloud(images=5, clients=10)
    vector = ClientVector(Facts.of(nn.Linear(D, K)), R)
    vector.find_directions(lambda: cloud.chunks("train"))
    (val,) = cloud.chunks("val")
    posteriors = nn.Sequential(nn.Linear(D, K), nn.Softmax(-1)).requires_grad_(False)
    raw = vector(normalised(val.x_CSD), posteriors(val.x_CSD))
    vector.find_correlation([val], posteriors)
    e = vector(normalised(val.x_CSD), posteriors(val.x_CSD))
    flat = raw.flatten(0, 1)
    torch.testing.assert_close(e, (raw - flat.mean(0)) / flat.std(0), atol=1e-4, rtol=1e-4)
    products = [e[c, i] * e[c, j] for c in range(10) for i in range(5) for j in range(5) if i != j]
    torch.testing.assert_close(vector.correlation, torch.stack(products).mean(0).clamp(0, 0.95), atol=1e-4, rtol=1e-4)


def test_the_vector_is_the_best_linear_prediction():
    """Of a normal effect of variance rho from n images with noise of variance 1 - rho: Gaussian conditioning."""
    vector = ClientVector(Facts.of(nn.Linear(D, K)), 2)
    vector.correlation.copy_(torch.tensor([0.5, 0.1]))
    total = torch.tensor([[3.0, -2.0]])
    for n in (1, 4, 30):
        got = vector.shrunk(total, torch.tensor([float(n)]))
        for j, rho in enumerate((0.5, 0.1)):
            covariance = rho * np.ones((n, n)) + (1 - rho) * np.eye(n)
            want = rho * np.ones(n) @ np.linalg.solve(covariance, np.full(n, float(total[0, j]) / n))
            assert float(got[0, j]) == pytest.approx(want, rel=1e-5)
    assert (vector.shrunk(torch.zeros(1, 2), torch.zeros(1)) == 0).all()


def test_pasts_in_training_are_images_of_the_same_client_and_never_the_image():
    vector = ClientVector(Facts.of(nn.Linear(D, K)), 1)
    vector.correlation.fill_(0.5)
    clients = Ragged.from_rows([np.arange(5), np.arange(5, 45)])
    e_M1 = torch.where(torch.arange(45) < 5, 1.0, 100.0)[:, None]
    c_MJ = vector.of_pasts(e_M1, clients, 6)[..., 0]
    sizes = [sorted({round(float(v), 4) for v in c_MJ[rows].flatten()}) for rows in (slice(5), slice(5, 45))]
    want = [[scale * n * 0.5 / (1 + (n - 1) * 0.5) for n in range(most)] for scale, most in ((1, 5), (100, 32))]
    assert sizes[0] == pytest.approx(want[0], abs=1e-3)
    assert sizes[1] == pytest.approx(want[1], abs=1e-3)
    assert len({tuple(row.tolist()) for row in c_MJ.T}) == 6  # other pasts each time


# ---- the method


def by_equation(method, x_D, past_PD):
    """Return the log-posterior of one image by the module's docstring, up to what the client prior says."""

    def residual(x):
        return normalised(x) @ method.vector.of_image - method.head(x).softmax(-1) @ method.vector.of_class

    n, rho = len(past_PD), method.vector.correlation
    c = sum((residual(x) for x in past_PD), torch.zeros(R)) * rho / (1 + (n - 1) * rho)
    parts = [method.head(x_D), *(perceptron(x_D, c) for perceptron in method.perceptrons)]
    return sum(w * part for w, part in zip(method.ensemble_weight, parts, strict=True))


def test_the_equations():
    cloud, _ = styled_cloud(clients=12, images=6)
    method, x = learned(cloud), torch.randn(7, D)
    b = torch.stack([by_equation(method, x[n], x[:n]) for n in range(7)])
    want = method.prior.posterior(b[None], None, causal=True)
    torch.testing.assert_close(method.stream(x[None]).log_softmax(-1), want.log_softmax(-1), atol=1e-4, rtol=1e-4)
    others = [torch.cat([x[:n], x[n + 1 :]]) for n in range(7)]
    b = torch.stack([by_equation(method, x[n], others[n]) for n in range(7)])
    want = method.prior.posterior(b[None], None, causal=False)
    torch.testing.assert_close(method(x[None]).log_softmax(-1), want.log_softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("vector", [0, R])
def test_a_step_is_the_stream(vector):
    cloud, _ = styled_cloud(clients=12, images=6)
    method, x = learned(cloud, no_fit, vector=vector), torch.randn(2, 9, D)
    past, stream = torch.empty(2, 0, method.state_width), method.stream(x)
    for n in range(9):
        logits, kept = method.step(x[:, n], past)
        torch.testing.assert_close(logits, stream[:, n], atol=1e-4, rtol=1e-4)
        past = torch.cat([past, kept[:, None]], 1)


def test_style_is_used_where_clients_have_one():
    cloud, _ = styled_cloud(style=2.0)
    (test,) = cloud.chunks("test")
    losses = {}
    for vector in (0, R):
        method = learned(cloud, vector=vector, hidden=64)
        logits = method.stream(test.x_CSD)[:, 5:].flatten(0, 1)
        losses[vector] = float(F.cross_entropy(logits, test.y_CS[:, 5:].flatten()))
    assert losses[R] < 0.8 * losses[0]


def test_without_a_style_the_vector_is_nothing():
    cloud = small_cloud(D, K, clients=60, images=10)
    method = learned(cloud, no_fit)
    assert method.vector.correlation.max() < 0.15
    styled, _ = styled_cloud()
    assert learned(styled, no_fit).vector.correlation.max() > 0.4


@pytest.mark.slow
def test_clients_with_few_classes_gain_by_their_classes():
    cloud = small_cloud(D, K, noise=6.0, clients=200)
    method = learned(cloud)
    (test,) = cloud.chunks("test")
    alone = method._joined(method._logits(test.x_CSD, None, causal=True))
    right = [(b.argmax(-1) == test.y_CS)[:, 4:].float().mean() for b in (alone, method.stream(test.x_CSD))]
    assert right[1] > right[0] + 0.015


def test_a_class_without_images_keeps_what_the_backbone_says_of_it():
    cloud = small_cloud(D, K)
    head = head_of(cloud)
    cloud.batches.labels[cloud.batches.labels == 2] = 3
    torch.manual_seed(0)
    method = ClientProfile(Facts.of(head), hidden=8, vector=R)
    method.learn(cloud.view, plain_fit(cloud.view))
    assert method.known_classes.tolist() == [True, True, False, True]
    logits = method._logits(torch.randn(5, 1, D), None, causal=True)
    b, joined = logits[0].softmax(-1), method._joined(logits).softmax(-1)
    torch.testing.assert_close(joined[..., 2], b[..., 2])


def test_without_val_or_train_images_it_is_near_the_backbone():
    cloud = small_cloud(D, K)
    none = Ragged.empty(len(cloud.clients.val))
    cloud.clients = Clients(cloud.clients.ids, cloud.clients.types, cloud.clients.train, none, cloud.clients.test)
    method = ClientProfile(Facts.of(nn.Linear(D, K)), hidden=8, vector=R)
    record = method.learn(cloud.view, plain_fit(cloud.view))
    assert "images" not in record
    assert method.eval().stream(torch.randn(2, 3, D)).isfinite().all()


def test_one_val_image_is_enough():
    cloud = small_cloud(D, K)
    one = Ragged.from_rows([cloud.clients.val.values[:1], *[np.empty(0, np.int64)] * (len(cloud.clients.val) - 1)])
    cloud.clients = Clients(cloud.clients.ids, cloud.clients.types, cloud.clients.train, one, cloud.clients.test)
    torch.manual_seed(0)
    method = ClientProfile(Facts.of(nn.Linear(D, K)), hidden=8, vector=R)
    method.learn(cloud.view, no_fit)
    assert all(tensor.isfinite().all() for tensor in method.state_dict().values())
    assert method.eval().stream(torch.randn(2, 3, D)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "key"), [({"hidden": 0}, "hidden"), ({"vector": -1}, "vector"), ({"change": 2.0}, "change")]
)
def test_values_that_cannot_be(options, key):
    with pytest.raises(ConfigError, match=key):
        ClientProfile(Facts.of(nn.Linear(D, K)), **options)


def test_padding_changes_nothing():
    cloud, _ = styled_cloud(clients=12, images=6)
    method, x = learned(cloud, no_fit), torch.randn(1, 4, D)
    padded = torch.cat([x, torch.full((1, 3, D), 1e3)], 1)
    mask = torch.tensor([[True] * 4 + [False] * 3])
    torch.testing.assert_close(method(padded, mask)[:, :4], method(x), atol=1e-5, rtol=1e-5)
    batch = ClientBatch(padded, torch.zeros(1, 7, dtype=torch.int64), mask, torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(method.logits(batch, causal=True)[:, :4], method.stream(x), atol=1e-5, rtol=1e-5)


def test_clients_of_one_image_and_few_features_are_no_error():
    cloud, _ = styled_cloud(clients=30, images=1)
    assert learned(cloud, vector=R).vector.correlation.tolist() == [0.0] * R  # no pairs
    assert learned(cloud, no_fit, vector=100).vector.size == D
