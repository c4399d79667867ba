"""Recommenders against vectors of the released models."""

import json
from functools import partial

import pytest
import torch
from safetensors import safe_open
from sklearn.metrics import roc_auc_score

from iciia_exp.models.fit_many import Examples, fit_many
from iciia_exp.models.recommenders import HISTORIES, RECOMMENDERS, Interactions, OnCatalog
from iciia_exp.recipe import Recipe
from iciia_exp.tasks import SingleLabel

CASES = [("mpda_models_vectors", name) for name in RECOMMENDERS] + [("mpda_vectors", f"case{i}") for i in range(2)]

#: Released order of the inputs in the one matrix of logistic regression.
LR_ROWS = ("user_linear", "item_linear_0", "category_linear_0", "item_linear_2", "category_linear_2", "item_linear_1")
LR_ROWS = (*LR_ROWS, "category_linear_1", "tags")


class Case:
    """A case of the vectors: sizes, model, states and interactions."""

    def __init__(self, file, name):
        self.file, self.name = file, name
        self.sizes = json.loads(file.metadata()[name])
        self.model = self.sizes.get("model", "din")
        self.keys = set(file.keys())
        numbers = (self.sizes["users_in_table"], self.sizes["items"], self.sizes["categories"] + 1)
        dim = self.sizes["dim"]
        widths = {"lr": (self.sizes.get("genome"),), "din": (dim, dim)}.get(self.model, (dim // 2,))
        self.net = RECOMMENDERS[self.model](*numbers, *widths).eval()
        left = self.net.load_state_dict(self.state("state"), strict=False)
        assert not left.unexpected_keys
        assert all(key.endswith("num_batches_tracked") for key in left.missing_keys)

    def get(self, name):
        return self.file.get_tensor(f"{self.name}/{name}")

    def state(self, part):
        """Return the parameters (and, of the start, the statistics) under their names here."""
        found = {}
        for own, theirs, transposed in self._names():
            if f"{self.name}/{part}/{theirs}" in self.keys:
                value = self.get(f"{part}/{theirs}")
                found[own] = value.T if transposed else value
        if self.model == "lr":
            sizes = [self.net.tags.in_features if n == "tags" else len(self.net.tables[n].weight) for n in LR_ROWS]
            for name, rows in zip(LR_ROWS, self.get(f"{part}/dense/kernel").split(sizes), strict=True):
                found["tags.weight" if name == "tags" else f"tables.{name}.weight"] = rows.T if name == "tags" else rows
        return found

    def _names(self):
        """Yield our name, the released name, and whether the matrix is transposed."""

        def linear(own, theirs):
            yield f"{own}.weight", f"{theirs}/kernel", True
            yield f"{own}.bias", f"{theirs}/bias", False

        def norm(own, theirs):
            pairs = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
            for mine, other in pairs.items():
                yield f"{own}.{mine}", f"{theirs}/{other}", False

        if self.model == "lr":
            yield from norm("norm", "lr_bn")
            yield "bias", "dense/bias", False
            return
        for own, theirs in {"user": "user_id", "item": "movie_emb", "category": "category_emb"}.items():
            yield f"tables.{own}.weight", f"embedding/{theirs}", False
        for i in range(3):
            yield from linear(f"net.{2 * i}", f"forward_net/dense{i}")
            activation = f"forward_net/activation{i}"
            yield f"net.{2 * i + 1}.{'alpha' if self.model == 'din' else 'weight'}", f"{activation}/alpha", False
            yield from norm(f"net.{2 * i + 1}.norm", f"{activation}/norm_inputs")
        for h, history in enumerate(("neg", "pos")):
            for i in range(3):
                theirs = f"attention_{history}_rating/compute_weight_logits/dense{i}"
                yield from linear(f"attention.{h}.score.{2 * i}", theirs)
        yield from norm("norm", "forward_net_bn")
        for i in range(4):
            yield from norm(f"norms.{i}", f"forward_net_bn_{i}")
        yield ("wide.weight" if self.model == "wide_deep" else "cross.weight"), "dense/kernel", True
        yield from norm("linear_norm", "linear/lr_bn")
        yield "tables.user_linear.weight", "linear/embedding/feat/user_id", False
        for kind, theirs in {"item": "movie_id", "category": "category_ids"}.items():
            for at, suffix in enumerate(("", "_seq_neg", "_seq_pos")):
                yield f"tables.{kind}_linear_{at}.weight", f"linear/embedding/feat/{theirs}{suffix}", False

    def interactions(self, user):
        """Return the samples of a user, and their labels."""

        def categories(name):
            ids = self.get(f"{user}/feat/{name}").long()
            return torch.where(ids == self.sizes["categories"], -1, ids)

        histories = ("neg", "pos")
        there = [self.get(f"{user}/mask/{h}_rating") > 0 for h in histories]
        ids = [self.get(f"{user}/feat/movie_id_seq_{h}")[..., 0].long() for h in histories]
        items = torch.stack([torch.where(t, i, -1) for t, i in zip(there, ids, strict=True)], 1)
        own = 1 if user == "test" else int(user.removeprefix("user")) + 1
        tags = self.get(f"{user}/feat/movie_genome") if f"{self.name}/{user}/feat/movie_genome" in self.keys else None
        x = Interactions(
            torch.full((len(items),), own),
            self.get(f"{user}/feat/movie_id")[:, 0].long(),
            categories("category_ids"),
            items,
            torch.stack([categories(f"category_ids_seq_{h}") for h in histories], 1),
            tags,
        )
        if user != "test":
            assert (self.get(f"{user}/feat/user_id") == own).all()
        return x, self.get(f"{user}/label").long()


@pytest.fixture
def case(request, reference):
    file, name = request.param
    with safe_open(reference / f"{file}.safetensors", "pt") as opened:
        yield Case(opened, name)


@pytest.mark.parametrize("case", CASES, indirect=True, ids=[name for _, name in CASES])
def test_logits_are_those_of_the_released_model(case):
    x, _ = case.interactions("test")
    assert any((row < 0).all() for row in x.items_BHL[:, 1])  # histories without an item
    torch.testing.assert_close(case.net(x), case.get("test_logits"), atol=1e-5, rtol=1e-5)


class Click(SingleLabel):
    """The released loss."""

    def loss(self, logits_MK, y, **options):
        return -(logits_MK.softmax(-1).gather(-1, y[:, None])[:, 0] + 1e-7).log()


class Rows(OnCatalog):
    """A model on numbers of interactions: in the vectors an item has other categories from one slot to another."""

    def __init__(self, net, every):
        super().__init__(net, torch.zeros(1, 1, dtype=torch.int64))
        self.every = every

    def read(self, x_BF):
        return Interactions(*(None if part is None else part[x_BF[:, 0]] for part in self.every))


def users_of(case):
    """Return the interactions of all users one after the other, and the numbers and labels of each one's."""
    names = [f"user{i}" for i in range(case.sizes["candidates"] + 1)]
    parts = [case.interactions(name) for name in [*names, "test"]]
    every = Interactions(
        *(None if part[0] is None else torch.cat(part) for part in zip(*(x for x, _ in parts), strict=True))
    )
    sets, at = [], 0
    for _, y in parts:
        sets.append((torch.arange(at, at + len(y)), y))
        at += len(y)
    return every, sets


@pytest.mark.parametrize("case", CASES, indirect=True, ids=[name for _, name in CASES])
def test_training_and_acceptance_are_those_of_the_release(case):
    every, sets = users_of(case)
    net = Rows(case.net, every)
    sgd = partial(torch.optim.SGD, lr=case.sizes["lr"])
    recipe = Recipe(sgd, None, 1, case.sizes["batch"], case.sizes["clip_global_norm"])

    def trained(states, numbers, y):
        examples = Examples(numbers[None, :, None], y[None], torch.ones(1, len(y), dtype=torch.bool))
        return fit_many(net, examples, examples.none(), Click("click"), recipe, starts=states, clip_rows=True).states

    def auc(states, numbers, y):
        own = {name: value[0] for name, value in states.items()}
        with torch.no_grad():
            score = torch.func.functional_call(net, own, (numbers[:, None],)).softmax(-1)[:, 1]
        return roc_auc_score(y, score)

    def assert_state(states, part):
        for name, value in case.state(part).items():
            if f"net.{name}" in states:
                torch.testing.assert_close(states[f"net.{name}"][0], value, atol=1e-5, rtol=1e-5)

    start = {name: p.detach()[None] for name, p in net.named_parameters()}
    own, test = sets[0], sets[-1]
    first = tuple(part[: case.sizes["batch"]] for part in own)
    assert_state(trained(start, *first), "one_step")
    best, states, accepted, found = auc(start, *own), start, [], []
    for candidate in sets[1:-1]:
        tried = trained(states, *candidate)
        found.append(auc(tried, *own))
        accepted.append(int(found[-1] > best + 1e-7))
        if accepted[-1]:
            best, states = found[-1], tried
    assert found == pytest.approx(case.get("candidate_auc").tolist(), abs=1e-5)
    assert accepted == case.get("accepted").tolist()
    final = trained(states, *own)
    assert_state(final, "final")
    assert auc(final, *test) == pytest.approx(float(case.get("arms_auc")[3, 1]), abs=1e-9)


@pytest.mark.parametrize("name", RECOMMENDERS)
def test_many_users_train_together_as_alone(name):
    torch.manual_seed(0)
    users, items, categories, slots = 5, 9, 4, 3
    of_items = torch.randint(-1, categories, (items, 2))
    net = OnCatalog(RECOMMENDERS[name](users, items, categories), of_items)
    histories = torch.randint(-1, items, (users, 6, HISTORIES * slots))
    x = torch.cat(
        [torch.arange(users).expand(6, -1).T[..., None], torch.randint(0, items, (users, 6, 1)), histories], 2
    )
    mask = torch.arange(6) < torch.tensor([6, 4, 1, 0, 5])[:, None]
    examples = Examples(x, torch.randint(0, 2, (users, 6)), mask)
    recipe = Recipe(partial(torch.optim.SGD, lr=0.5), None, 2, 4, 0.1)
    for clip_rows in (False, True):
        together = fit_many(net, examples, examples.none(), Click("click"), recipe, clip_rows=clip_rows).states
        for user in range(users):
            one = examples.take(torch.tensor([user]))
            alone = fit_many(net, one, one.none(), Click("click"), recipe, clip_rows=clip_rows).states
            for key, value in alone.items():
                torch.testing.assert_close(value[0], together[key][user], atol=1e-6, rtol=1e-5)
    x = net.read(x[0])
    assert (x.categories_BHLG[x.items_BHL < 0] == -1).all()
    item = int(x.items_BHL.max())
    assert x.categories_BHLG[x.items_BHL == item][0].tolist() == of_items[item].tolist()
