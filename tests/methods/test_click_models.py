"""MPDA and CoDA that train a whole click model on every device: plain loops, the released procedure, and budgets."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from iciia_exp.data.batches import FeatureBatches
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.data.views import CloudView, Devices
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.ledger import Link, Sizes
from iciia_exp.methods.base import Facts
from iciia_exp.methods.tune.coda import CoDA
from iciia_exp.methods.tune.finetune import FineTune
from iciia_exp.methods.tune.mpda import MPDA
from iciia_exp.models.backbones.recommender import ClickModel
from iciia_exp.models.recommenders import RECOMMENDERS
from iciia_exp.tasks import CLICK
from tests.making.cloud import no_fit
from tests.making.released import Case, Rows, users_of

USERS, ITEMS, SLOTS = 7, 15, 2
LENGTHS = [7, 4, 6, 8, 5, 3, 8]
RECIPE = {"trains": "backbone", "lr": 0.5, "batch_size": 3, "clip_norm": 0.2, "epochs": 2, "own_epochs": 3}


def click_model(model="wide_deep"):
    torch.manual_seed(0)
    made = ClickModel(2, model, users=USERS, items=ITEMS, item_categories=[[i % 4, i % 3] for i in range(ITEMS)])
    with torch.no_grad():
        for parameter in made.net.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return made.eval().requires_grad_(False)


class Cloud:
    """Users with up to 8 train items, and 4 val and test items each."""

    def __init__(self, model="wide_deep"):
        self.backbone = click_model(model)
        rng = np.random.default_rng(0)
        rows, owner, role = [], [], []
        for user, length in enumerate(LENGTHS):
            for number in range(length + 8):
                rows.append([user, rng.integers(ITEMS), *rng.integers(-1, ITEMS, 2 * SLOTS)])
                owner.append(user)
                role.append(0 if number < length else 1 + number % 2)
        self.rows, owner, role = np.array(rows, dtype=np.int32), np.array(owner), np.array(role)
        self.labels = rng.integers(0, 2, len(rows))
        self.labels[owner == 5] = 1  # its AUC is not defined
        with torch.no_grad():
            features = self.backbone.features(torch.from_numpy(self.rows)).numpy()
        names = np.array([f"user {i}" for i in range(USERS)], dtype=object)
        parts = [Ragged.from_pairs(owner[role == r], np.flatnonzero(role == r), USERS) for r in range(3)]
        self.clients = Clients(names, names, *parts)
        self.batches = FeatureBatches(features, self.labels, arrays={"images": self.rows})
        self.view = CloudView(self.clients, self.batches, 2, 8, backbone=lambda: self.backbone)
        self.devices = Devices(self.clients, self.batches)

    @property
    def facts(self):
        model = self.backbone
        return Facts(CLICK, model.head, arrays={"images": self.rows.shape[1:]}, network=lambda: copy.deepcopy(model))

    def items(self, user, role="train"):
        rows = self.clients[role][user]
        return torch.from_numpy(self.rows[rows]), torch.from_numpy(self.labels[rows])

    def learned(self, method, users=range(USERS)):
        method.eval()
        method.learn(self.view, no_fit)
        link = Link(method.name, method.budget(Sizes()))
        return method.personalise(self.devices.own(np.array(users)), link, self.view), link


@pytest.fixture
def cloud():
    return Cloud()


def trained(net, x, y, epochs):
    """Train a copy of a model by PyTorch's own parts, with the norm of the dense gradient."""
    net = copy.deepcopy(net).requires_grad_(True)
    optimizer = torch.optim.SGD(net.parameters(), RECIPE["lr"])
    for _ in range(epochs):
        for at in range(0, len(x), RECIPE["batch_size"]):
            optimizer.zero_grad()
            p = net(x[at : at + 3]).softmax(-1)
            F.nll_loss((p + 1e-7).log(), y[at : at + 3]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), RECIPE["clip_norm"])
            optimizer.step()
    return net


def assert_same(states, user, net):
    named = dict(net.named_parameters())
    assert set(states) == set(named)
    for name, value in named.items():
        torch.testing.assert_close(states[name][user], value.detach(), atol=2e-5, rtol=1e-4)


def value_of(net, x, y, measure):
    """Return what shall be small: the loss, or -AUC (0 of one label)."""
    with torch.no_grad():
        logits = net(x)
    if measure == "loss":
        return float(F.nll_loss((logits.softmax(-1) + 1e-7).log(), y))
    return -roc_auc_score(y, logits[:, 1] - logits[:, 0]) if len(set(y.tolist())) == 2 else 0.0


def by_items(cloud, user):
    """Return the other users by the overlap of their items, |A and B| / (|A| |B|)."""
    items = [set(cloud.items(u)[0][:, 1].tolist()) for u in range(USERS)]
    others = [u for u in range(USERS) if u != user]
    near = [len(items[user] & items[u]) / len(items[user]) / len(items[u]) for u in others]
    return [others[i] for i in np.argsort(-np.array(near), kind="stable")]


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["loss", "auc"])
@pytest.mark.parametrize("arm", ["mpda", "selected", "match", "local"])
def test_mpda_against_a_loop(cloud, arm, measure):
    method = MPDA(cloud.facts, arm, matching="overlap", candidates=3, measure=measure, **RECIPE)
    found, _ = cloud.learned(method)
    taken = []
    for user in range(USERS):
        own, candidates = cloud.items(user), by_items(cloud, user)[:3]
        net, best, accepted = cloud.backbone.net, value_of(cloud.backbone.net, *own, measure), 0
        for candidate in candidates if arm != "local" else ():
            tried = trained(net, *cloud.items(candidate), 2)
            if value_of(tried, *own, measure) < best - 1e-7:
                net, best, accepted = tried, value_of(tried, *own, measure), accepted + 1
        if arm == "match":
            net = cloud.backbone.net
            for candidate in candidates[:accepted]:
                net = trained(net, *cloud.items(candidate), 2)
        if arm != "selected":
            net = trained(net, *own, 3)
        assert_same(found.states, user, net)
        taken.append(accepted)
    if arm != "local":
        assert found.counts["accepted"].tolist() == taken
        assert 0 < sum(taken) < 3 * USERS
        assert measure == "loss" or taken[5] == 0, "a user with one label accepts nobody"


@pytest.mark.slow
@pytest.mark.parametrize("model", RECOMMENDERS)
def test_coda_trains_on_the_users_with_the_same_items(model):
    cloud = Cloud(model)
    found, _ = cloud.learned(CoDA(cloud.facts, ratio=2, **RECIPE))
    for user in range(USERS):
        rows = np.concatenate([cloud.clients.train[u] for u in by_items(cloud, user)])[: 2 * LENGTHS[user]]
        x, y = torch.from_numpy(cloud.rows[rows]), torch.from_numpy(cloud.labels[rows])
        assert_same(found.states, user, trained(trained(cloud.backbone.net, x, y, 2), *cloud.items(user), 3))
    assert found.counts["received"].tolist() == [2 * n for n in LENGTHS]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        *(partial(MPDA, matching=way, candidates=3) for way in ("overlap", "random", "nearest")),
        partial(MPDA, arm="local"),
        partial(MPDA, judge="val", measure="auc", patience=1, candidates=3),
        *(partial(CoDA, retrieval=way, ratio=2) for way in ("overlap", "random", "sample")),
        partial(CoDA, keep=0.4, ratio=2, filter_epochs=3),
    ],
)
def test_a_user_costs_what_the_budget_states(cloud, method, monkeypatch):
    monkeypatch.setattr("iciia_exp.models.fit_many.is_plain_linear", lambda *_: False)
    method = method(cloud.facts, **RECIPE)
    cloud.learned(method, [0])  # counts the MACs of the model, once
    for user in range(3):
        with FlopCounterMode(display=False) as counter:
            found, link = cloud.learned(method, [user])
        sent = {name: int(found.counts[name][0]) if found.counts else 0 for name in ("received", "passed")}
        sizes = Sizes(train=LENGTHS[user], val=4, epochs=int(found.epochs_C[0]), backbone_macs=0, **sent)
        once = [line for line in method.budget(sizes).lines if line.phase == "client_once" and line.kind != "weights"]
        stated = {line.key: line.bytes for line in once if line.kind and line.bytes}
        assert {key: size for key, size in link.counted.items() if size} == stated
        macs = sum(line.macs for line in once)
        if getattr(method, "retrieval", "") == "sample":  # scikit-learn's, on the cloud
            macs -= sum(line.macs for line in once if line.site == "cloud")
        assert counter.get_total_flops() // 2 == macs


@pytest.mark.parametrize(("method", "images"), [(MPDA, 0), (partial(MPDA, matching="nearest"), 5), (CoDA, 0)])
def test_a_model_of_ids_needs_features_only_to_send_them(cloud, method, images):
    method = method(cloud.facts, **RECIPE)
    cloud.learned(method, [0])
    lines = method.budget(Sizes(train=5, val=4, backbone_macs=10)).lines
    assert [line.macs for line in lines if (line.site, line.what) == ("device", "backbone")][-1:] == [10 * images]


def test_a_sample_is_a_row_of_ids_and_a_label(cloud):
    _, link = cloud.learned(CoDA(cloud.facts, retrieval="random", ratio=2, **RECIPE), [0])
    samples = 2 * LENGTHS[0]
    assert sorted(size for size in link.counted.values() if size) == [8, 8 * samples, 4 * (2 + 2 * SLOTS) * samples]


@pytest.mark.slow
def test_a_user_learns_the_same_alone(cloud, monkeypatch):
    for method in (
        MPDA(cloud.facts, candidates=3, **RECIPE),
        CoDA(cloud.facts, keep=0.5, ratio=2, filter_epochs=2, **RECIPE),
    ):
        together, _ = cloud.learned(method)
        with monkeypatch.context() as patched:
            patched.setattr("iciia_exp.methods.tune.cloud_samples._NUMBERS", 1)
            apart, _ = cloud.learned(method)
        for name, state in apart.states.items():
            torch.testing.assert_close(state, together.states[name], atol=1e-5, rtol=1e-4)


def test_logits_are_those_of_the_users_own_models(cloud):
    method = MPDA(cloud.facts, "local", **RECIPE)
    found, _ = cloud.learned(method)
    batch = cloud.devices.own(np.arange(USERS))["val"]
    logits = method.classify(batch, found.states)
    for user in (0, 4):
        net = trained(cloud.backbone.net, *cloud.items(user), 3)
        torch.testing.assert_close(logits[user], net(cloud.items(user, "val")[0]).detach(), atol=1e-4, rtol=1e-4)


class Released(ClickModel):
    """A released model on numbers of interactions, as a backbone."""

    def __init__(self, net):
        nn.Module.__init__(self)
        self.net, self.dim = net, net.net.hidden + 2
        self.head = nn.Linear(self.dim, 2)


@pytest.mark.parametrize("name", [*RECOMMENDERS, "case0", "case1"])
@pytest.mark.parametrize("arm", ["selected", "mpda", "match"])
def test_the_released_procedure(reference, monkeypatch, name, arm):
    file = "mpda_vectors" if name.startswith("case") else "mpda_models_vectors"
    with safe_open(reference / f"{file}.safetensors", "pt") as opened:
        case = Case(opened, name)
        every, sets = users_of(case)
        backbone = Released(Rows(case.net, every))
        owner = np.repeat(np.arange(len(sets)), [len(y) for _, y in sets])
        numbers, labels = np.arange(len(owner)), torch.cat([y for _, y in sets]).numpy()
        users, test = len(sets) - 1, owner == len(sets) - 1
        owner[test] = 0
        names = np.array([f"user {i}" for i in range(users)], dtype=object)
        parts = [Ragged.from_pairs(owner[of], numbers[of], users) for of in (~test, test & False, test)]
        features = np.zeros((len(owner), backbone.dim), dtype=np.float32)
        batches = FeatureBatches(features, labels, arrays={"images": numbers[:, None].astype(np.int32)})
        clients = Clients(names, names, *parts)
        facts = Facts(CLICK, backbone.head, arrays={"images": (1,)}, network=lambda: backbone)
        sizes = case.sizes
        method = MPDA(
            facts, arm, "backbone", "random", users - 1, "train", "auc", sizes["lr"], sizes["batch"],
            sizes["clip_global_norm"], "rows", 1, 1,
        )  # fmt: skip
        order = np.arange(1, users)[None]
        monkeypatch.setattr("iciia_exp.methods.tune.mpda.match_clients", lambda *_: order)
        view = CloudView(clients, batches, 2, 8, backbone=lambda: backbone)
        method.eval()
        method.learn(view, no_fit)
        link = Link("mpda", method.budget(Sizes()))
        found = method.personalise(Devices(clients, batches).own(np.array([0])), link, view)
        assert found.counts["accepted"].tolist() == [int(case.get("accepted").sum())]
        own = {n: value[0] for n, value in found.states.items()}
        if arm == "mpda":
            for n, value in case.state("final").items():
                if f"net.{n}" in own:
                    torch.testing.assert_close(own[f"net.{n}"], value, atol=1e-5, rtol=1e-5)
        row = {"selected": 2, "mpda": 3, "match": 4}[arm]
        for column, (rows, y) in enumerate((sets[0], sets[-1])):
            with torch.no_grad():
                score = torch.func.functional_call(backbone.net, own, (rows[:, None],)).softmax(-1)[:, 1]
            assert roc_auc_score(y, score) == pytest.approx(float(case.get("arms_auc")[row, column]), abs=1e-9)


def test_the_backbone_gives_hidden_layer_and_logits():
    model = click_model("deepfm")
    rows = torch.randint(0, USERS, (5, 2 + 2 * SLOTS), dtype=torch.int32)
    features = model.features(rows)
    assert features.shape == (5, model.dim) == (5, 82)
    torch.testing.assert_close(features[:, -2:], model(rows))
    torch.testing.assert_close(model.head(features), model(rows))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"users": None}, ""),
        ({"num_classes": 3}, ""),
        ({"model": "fm"}, "model"),
        ({"model": "lr", "item_width": 4}, "item_width"),
        ({"item_width": 0}, "item_width"),
    ],
)
def test_a_backbone_that_makes_no_sense(settings, key):
    plain = {"num_classes": 2, "users": 3, "items": 2, "item_categories": [[0], []]}
    ClickModel(**plain)
    with pytest.raises(ConfigError) as caught:
        ClickModel(**plain | settings)
    assert caught.value.key == key


def test_a_backbone_refuses_images():
    with pytest.raises(UserError, match="rows of ids"):
        click_model().transform(np.zeros((8, 8, 3), dtype=np.uint8))


def test_settings_that_make_no_sense(cloud):
    head = Facts.of(nn.Linear(4, 2))
    for facts, settings, key in (
        (head, {"trains": "backbone"}, "trains"),
        (head, {"trains": "head"}, "trains"),
        (head, {"clip": "rows"}, "clip"),
        (head, {"measure": "auc"}, "measure"),
        (cloud.facts, {"trains": "classifier", "clip": "rows"}, "clip"),
        (cloud.facts, {"trains": "classifier"}, "matching"),
    ):
        with pytest.raises(ConfigError) as caught:
            MPDA(facts, **settings)
        assert caught.value.key == key
    with pytest.raises(ConfigError, match="retrieval=overlap: compares items, which only trains=backbone reads"):
        CoDA(cloud.facts, trains="classifier")
    assert MPDA(cloud.facts, arm="local", trains="classifier").candidates == 0


def test_a_new_user_has_no_items_in_the_cloud(cloud):
    method = MPDA(cloud.facts, candidates=3, **RECIPE)
    method.learn(cloud.view, no_fit)
    own = cloud.devices.own(np.array([0]))
    own = {role: batch._replace(client_C=torch.tensor([-1])) for role, batch in own.items()}
    with pytest.raises(UserError, match="overlap of items takes users whom the cloud knows"):
        method.personalise(own, Link("mpda", method.budget(Sizes())), cloud.view)


def test_finetune_trains_the_classifier_of_clicks(cloud):
    method = FineTune(Facts(CLICK, cloud.backbone.head))
    found, _ = cloud.learned(method)
    assert all(torch.isfinite(state).all() for state in found.states.values())
