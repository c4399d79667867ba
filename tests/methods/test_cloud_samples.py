"""MPDA and CoDA against plain loops over clients, and what they receive."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from iciia_exp.data.clients import Ragged
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.ledger import Link, Sizes
from iciia_exp.methods.base import Facts
from iciia_exp.methods.tune.coda import CoDA
from iciia_exp.methods.tune.mpda import MPDA
from iciia_exp.models.retrieval import SEARCH, Pool
from tests.making.cloud import D, K, no_fit, small_cloud

RECIPE = {"lr": 0.3, "batch_size": 3, "clip_norm": 0.8, "epochs": 2, "own_epochs": 4}


@pytest.fixture
def cloud():
    """Clients with 5 to 8 train images of two classes each."""
    cloud = small_cloud(D, K, clients=10, noise=2.0)
    lengths = [8, 5, 7, 8, 6, 5, 8, 7, 6, 8]
    cloud.clients = type(cloud.clients)(
        cloud.clients.ids,
        np.array(["even", "odd"] * 5, dtype=object),
        Ragged.from_rows([cloud.clients.train[c][:n] for c, n in enumerate(lengths)]),
        cloud.clients.val,
        cloud.clients.test,
    )
    return cloud


def learned(method, cloud, clients=None):
    """Let some devices learn; return what they have learned and their link."""
    method.eval()
    method.learn(cloud.view, no_fit)
    link = Link(method.name, method.budget(Sizes()))
    numbers = np.arange(len(cloud.clients)) if clients is None else np.array(clients)
    return method.personalise(cloud.devices.own(numbers), link, cloud.view), link


@pytest.mark.parametrize("kind", [CoDA, MPDA])
def test_images_that_several_clients_have_are_refused(cloud, kind):
    train = [cloud.clients.train[c] for c in range(10)]
    train[3] = np.append(train[3], train[0][:1])
    cloud.clients = replace(cloud.clients, train=Ragged.from_rows(train))
    with pytest.raises(ConfigError, match=f"method={kind.name}: gets samples of other clients.*partition.deals=1"):
        learned(kind(Facts.of(nn.Linear(D, K))), cloud)
    learned(MPDA(Facts.of(nn.Linear(D, K)), arm="local"), cloud)  # receives nothing


def images(cloud, client, role="train"):
    rows = cloud.clients[role][client]
    return torch.from_numpy(cloud.batches.features[rows]), torch.from_numpy(cloud.batches.labels[rows])


def trained(net, x, y, epochs):
    """Train a copy of a classifier by PyTorch's own parts."""
    net = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), RECIPE["lr"])
    for _ in range(epochs):
        for at in range(0, len(x), RECIPE["batch_size"]):
            optimizer.zero_grad()
            F.cross_entropy(net(x[at : at + 3]), y[at : at + 3]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), RECIPE["clip_norm"])
            optimizer.step()
    return net


def counts(cloud, client):
    return np.bincount(cloud.batches.labels[cloud.clients.train[client]], minlength=K).astype(float)


def by_overlap(cloud, client):
    """Return the other clients, by the cosine of class counts, the most similar first."""
    own = counts(cloud, client)
    others = [c for c in range(len(cloud.clients)) if c != client]
    similar = [own @ counts(cloud, c) / np.linalg.norm(own) / np.linalg.norm(counts(cloud, c)) for c in others]
    return [others[i] for i in np.argsort(-np.array(similar), kind="stable")], similar


def assert_same(states, client, net):
    for name, value in net.named_parameters():
        torch.testing.assert_close(states[name][client], value.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("judge", ["train", "val"])
@pytest.mark.parametrize("arm", ["mpda", "selected", "match", "local"])
def test_mpda_against_a_loop(head, cloud, arm, judge):
    method = MPDA(Facts.of(head), arm, matching="nearest", candidates=4, judge=judge, **RECIPE)
    found, _ = learned(method, cloud)
    means = torch.stack([images(cloud, c)[0].mean(0) for c in range(10)])
    near = F.cosine_similarity(means[:, None], means[None], dim=-1).fill_diagonal_(-9)
    for client in range(10):
        judges = images(cloud, client, judge)
        candidates = near[client].argsort(descending=True)[:4].tolist()

        def loss(net, judges=judges):
            with torch.no_grad():
                return float(F.cross_entropy(net(judges[0]), judges[1]))

        net, best, accepted = head, loss(head), 0
        for candidate in candidates:
            tried = trained(net, *images(cloud, candidate), 2)
            if loss(tried) < best - 1e-7:
                net, best, accepted = tried, loss(tried), accepted + 1
        received = sum(len(cloud.clients.train[c]) for c in candidates)
        passed = received
        if arm in ("match", "local"):
            net = head
        if arm == "match":
            for candidate in candidates[:accepted]:
                net = trained(net, *images(cloud, candidate), 2)
                passed += len(cloud.clients.train[candidate])
        if arm != "selected":
            net = trained(net, *images(cloud, client), 4)
        assert_same(found.states, client, net)
        assert found.epochs_C[client] == (0 if arm == "selected" else 4)
        if arm != "local":
            of_client = {name: int(values[client]) for name, values in found.counts.items()}
            assert of_client == {"received": received, "passed": 2 * passed, "accepted": accepted}
    if arm != "local":
        assert 0 < found.counts["accepted"].float().mean() < 4


def test_coda_trains_on_the_clients_whose_classes_overlap(head, cloud):
    found, _ = learned(CoDA(Facts.of(head), ratio=2, **RECIPE), cloud)
    for client in range(10):
        order, similar = by_overlap(cloud, client)
        assert len(set(np.round(similar, 9))) > 2
        want = np.concatenate([cloud.clients.train[c] for c in order])[: 2 * len(cloud.clients.train[client])]
        x, y = torch.from_numpy(cloud.batches.features[want]), torch.from_numpy(cloud.batches.labels[want])
        assert_same(found.states, client, trained(trained(head, x, y, 2), *images(cloud, client), 4))
    lengths = torch.from_numpy(cloud.clients.train.lengths)
    assert found.counts["received"].tolist() == (2 * lengths).tolist()
    assert found.counts["passed"].tolist() == (4 * lengths).tolist()


def rows_of(cloud, monkeypatch, method):
    """Return the images that every device got, in the order of the devices."""
    asked = []
    view = type(cloud.view)
    plain = view.__getitem__

    def noted(self, index):
        asked.append(index)
        return plain(self, index)

    monkeypatch.setattr(view, "__getitem__", noted)
    learned(method, cloud)
    monkeypatch.undo()
    rows = dict(zip(asked[-1].client_C.tolist(), asked[-1].index_CS, strict=True))
    return [set(rows[client][rows[client] >= 0]) for client in range(len(rows))]


@pytest.mark.parametrize("retrieval", ["sample", "random", "client_type", "overlap"])
def test_what_is_retrieved(head, cloud, retrieval, monkeypatch):
    method = CoDA(Facts.of(head), retrieval=retrieval, ratio=3, **RECIPE)
    received = rows_of(cloud, monkeypatch, method)
    everything = cloud.clients.train.values
    for client, got in enumerate(received):
        own = cloud.clients.train[client]
        assert len(got) == 3 * len(own), "each image once"
        assert got <= set(everything) - set(own)
        if retrieval == "sample":
            x, y = torch.from_numpy(cloud.batches.features), torch.from_numpy(cloud.batches.labels)
            unit = method.represent(x, y)
            torch.testing.assert_close(unit.norm(dim=1), torch.ones(len(x)))
            others = np.setdiff1d(everything, own)
            near = (unit[others] @ unit[own].T).amax(1)
            assert got == set(others[near.argsort(descending=True).numpy()][: 3 * len(own)])
        if retrieval == "client_type":
            of_type = np.concatenate([cloud.clients.train[c] for c in range(client % 2, 10, 2) if c != client])
            assert got <= set(of_type) or set(of_type) <= got
    if retrieval == "random":
        again = rows_of(cloud, monkeypatch, method)
        other = rows_of(cloud, monkeypatch, CoDA(Facts.of(head), retrieval=retrieval, ratio=3, seed=1, **RECIPE))
        assert again == received != other


@pytest.mark.parametrize("library", SEARCH)
def test_what_is_nearest_by_both_libraries(library):
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((300, 16)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    owner = np.sort(rng.integers(0, 20, 300))
    clients, counts = np.array([3, 7, 99, 11, 5]), np.array([10, 40, 10, 0, 1000])
    queries = [unit[owner == c] if c < 20 else unit[:4] * -1 for c in clients]
    found = Pool(unit, owner, library).nearest(queries, clients, counts)
    for query, client, count, got in zip(queries, clients, counts, found, strict=True):
        near = (unit @ query.T).max(1)
        near[owner == client] = -np.inf
        order = np.argsort(-near, kind="stable")[: min(count, (owner != client).sum())]
        assert got.tolist() == order.tolist()


def test_faiss_that_is_not_installed(head, monkeypatch):
    monkeypatch.setattr("iciia_exp.methods.tune.coda.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"iciia_exp\[faiss\]") as caught:
        CoDA(Facts.of(head), search="faiss", **RECIPE)
    assert caught.value.key == "search"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MPDA, CoDA])
@pytest.mark.parametrize(
    "options", [{}, {"keep": 0.5, "filter_epochs": 2}, {"retrieval": "sample"}, {"matching": "random"}]
)
def test_a_device_learns_the_same_alone(head, cloud, kind, options, monkeypatch):
    if ("matching" in options) != (kind is MPDA) and options:
        pytest.skip("an option of the other method")
    method = kind(Facts.of(head), **options, **RECIPE)
    together, link = learned(method, cloud)
    alone, other = learned(method, cloud, [3])
    for name, state in alone.states.items():
        torch.testing.assert_close(state[0], together.states[name][3], atol=1e-5, rtol=1e-4)
    monkeypatch.setattr("iciia_exp.methods.tune.cloud_samples._NUMBERS", 1)  # one device at a time
    apart, again = learned(method, cloud)
    for name, state in apart.states.items():
        torch.testing.assert_close(state, together.states[name], atol=1e-5, rtol=1e-4)
    assert again.counted == link.counted != other.counted
    assert {name: values.tolist() for name, values in apart.counts.items()} == {
        name: values.tolist() for name, values in together.counts.items()
    }


@pytest.mark.parametrize(
    ("method", "images"),
    [
        (partial(MPDA), 20),
        (partial(MPDA, judge="val"), 27),
        (partial(MPDA, patience=2), 27),
        (partial(MPDA, arm="local", judge="val"), 20),  # nothing is judged
        (partial(CoDA), 20),
        (partial(CoDA, retrieval="sample"), 20),
        (partial(CoDA, patience=1), 27),
    ],
)
def test_the_backbone_passes_over_what_is_used(cloud, method, images):
    method = method(Facts.of(nn.Linear(D, K)), **RECIPE)
    method.learn(cloud.view, no_fit)
    lines = method.budget(Sizes(train=20, val=7, backbone_macs=10)).lines
    (line,) = (li for li in lines if (li.phase, li.site, li.what) == ("client_once", "device", "backbone"))
    assert line.macs == 10 * images


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        *(partial(MPDA, arm=arm, candidates=4) for arm in ("mpda", "selected", "match", "local")),
        *(partial(MPDA, matching=way, judge="val", patience=2, candidates=4) for way in ("nearest", "random")),
        *(partial(CoDA, retrieval=way, ratio=2) for way in ("overlap", "random", "client_type", "sample")),
        partial(CoDA, keep=0.4, ratio=2, filter_epochs=3, patience=1),
    ],
)
def test_a_client_costs_what_the_budget_states(head, cloud, method, monkeypatch):
    monkeypatch.setattr("iciia_exp.models.fit_many.is_plain_linear", lambda *_: False)
    method = method(Facts.of(head), **RECIPE)
    for client in range(3):
        with FlopCounterMode(display=False) as counter:
            found, link = learned(method, cloud, [client])
        sent = {name: int(found.counts[name][0]) if found.counts else 0 for name in ("received", "passed")}
        train = int(cloud.clients.train.lengths[client])
        budget = method.budget(Sizes(train=train, val=8, epochs=int(found.epochs_C[0]), backbone_macs=0, **sent))
        once = [line for line in budget.lines if line.phase == "client_once" and line.kind != "weights"]
        stated = {line.key: line.bytes for line in once if line.kind and line.bytes}
        assert {key: size for key, size in link.counted.items() if size} == stated
        macs = sum(line.macs for line in once)
        if getattr(method, "retrieval", "") == "sample":  # scikit-learn's, on the cloud
            assert [line.macs for line in once if line.site == "cloud" and not line.kind] == [68 * 2 * D * train]
            macs -= 68 * 2 * D * train
        assert counter.get_total_flops() // 2 == macs
    assert sum(cloud.clients.train.lengths) == 68


def test_the_device_keeps_what_looks_like_its_own(head):
    cloud = small_cloud(D, K, clients=12, noise=0.5)
    recipe = RECIPE | {"batch_size": 16}
    method = CoDA(Facts.of(head), retrieval="random", ratio=6, keep=0.3, filter_epochs=5, **recipe)
    filtered, plain = [], method._kept
    method._kept = lambda samples, *more: filtered.append((samples, plain(samples, *more))) or filtered[0][1]
    found, _ = learned(method, cloud)
    ((samples, kept),) = filtered
    for client in range(12):
        own = torch.tensor(sorted(set(cloud.batches.labels[cloud.clients.train[client]].tolist())))
        before, after = (torch.isin(part.y[client, part.mask[client]], own).float() for part in (samples, kept))
        assert len(after) == np.ceil(0.3 * len(before)) == 15
        assert after.sum() >= 0.9 * min(15, int(before.sum())), "those of its classes are kept first"
        assert before.mean() < 0.6
    assert found.counts["received"].tolist() == [2 * 6 * 8] * 12


def test_more_samples_than_there_are(head, cloud):
    found, _ = learned(CoDA(Facts.of(head), ratio=1000, **RECIPE), cloud)
    assert found.counts["received"].tolist() == (68 - cloud.clients.train.lengths).tolist()
    sample, _ = learned(
        CoDA(Facts.of(head), retrieval="sample", ratio=1000, keep=0.5, filter_epochs=1, **RECIPE), cloud
    )
    assert sample.counts["received"].tolist() == (2 * (68 - cloud.clients.train.lengths)).tolist()
    mpda, _ = learned(MPDA(Facts.of(head), candidates=1000, **RECIPE), cloud)
    assert mpda.counts["received"].tolist() == found.counts["received"].tolist()


@pytest.mark.parametrize("kind", [MPDA, CoDA])
def test_a_cloud_with_a_single_client(head, kind):
    cloud = small_cloud(D, K, clients=1)
    found, _ = learned(kind(Facts.of(head), **RECIPE), cloud)
    assert_same(found.states, 0, trained(head, *images(cloud, 0), 4))


@pytest.mark.parametrize("kind", [MPDA, CoDA])
def test_without_the_cloud_a_new_client_cannot_learn(head, cloud, kind):
    method = kind(Facts.of(head), **RECIPE)
    with pytest.raises(UserError, match=f"{method.name}: trains on samples of other clients, and the cloud that holds"):
        method.personalise(cloud.devices.own(np.array([0])), Link(method.name, method.budget(Sizes())), None)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (MPDA, "arm", "cloud"),
        (MPDA, "matching", "near"),
        (MPDA, "candidates", 0),
        (MPDA, "judge", "test"),
        (MPDA, "own_epochs", 0),
        (CoDA, "retrieval", "nearest"),
        (CoDA, "ratio", 0),
        (CoDA, "keep", 0.0),
        (CoDA, "keep", 1.5),
        (CoDA, "patience", 0),
        (CoDA, "lr", float("nan")),
        (CoDA, "filter_epochs", 0),
    ],
)
def test_settings_that_make_no_sense(head, kind, key, value):
    with pytest.raises(ConfigError) as caught:
        kind(Facts.of(head), **{key: value})
    assert caught.value.key == key


def test_the_pool_against_every_distance():
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((50, 6)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    owner = np.arange(50) % 7
    queries = [unit[owner == 2], unit[owner == 5][:2], unit[:3]]
    found = Pool(unit, owner).nearest(queries, np.array([2, 5, -1]), np.array([9, 4, 60]))
    for query, client, got, count in zip(queries, (2, 5, -1), found, (9, 4, 50), strict=True):
        others = np.flatnonzero(owner != client)
        best = (unit[others] @ query.T).max(1)
        assert got.tolist() == others[np.argsort(-best, kind="stable")][:count].tolist() or client < 0
        assert len(set(got)) == len(got) == count
