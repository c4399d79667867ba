"""Recommenders against vectors of the released models."""

import copy
from functools import partial

import pytest
import torch
from safetensors import safe_open
from sklearn.metrics import roc_auc_score

from iciia_exp.models.fit_many import fit_many
from iciia_exp.models.on_catalog import OnCatalog, multi_hot
from iciia_exp.models.recommenders import HISTORIES, RECOMMENDERS, Interactions
from iciia_exp.models.stacked import Examples
from iciia_exp.models.stacked_tables import StackedTables
from iciia_exp.recipe import Recipe
from iciia_exp.tasks import CLICK
from tests.making.released import Case, Rows, users_of

CASES = [("mpda_models_vectors", name) for name in RECOMMENDERS] + [("mpda_vectors", f"case{i}") for i in range(2)]


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


@pytest.mark.parametrize("case", CASES, indirect=True, ids=[name for _, name in CASES])
def test_training_and_acceptance_are_those_of_the_release(case):
    every, sets = users_of(case)
    net = Rows(case.net, every)
    sgd = partial(torch.optim.SGD, lr=case.sizes["lr"])
    recipe = Recipe(sgd, None, 1, case.sizes["batch"], case.sizes["clip_global_norm"])

    def trained(states, numbers, y):
        examples = Examples(numbers[None, :, None], y[None], torch.ones(1, len(y), dtype=torch.bool))
        return fit_many(net, examples, examples.none(), CLICK, recipe, starts=states, clip_rows=True).states

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
def test_statistics_stay_as_they_are_in_training(name):
    net = RECOMMENDERS[name](3, 5, 2)
    for module in net.modules():
        module.training = True  # as Lightning sets it, without `train()`
    torch.manual_seed(0)
    ids = [torch.randint(0, high, shape) for high, shape in ((3, (6,)), (5, (6,)), (5, (6, HISTORIES, 2)))]
    categories = torch.randint(0, 2, (6, 2)).float(), torch.randint(0, 2, (6, HISTORIES, 2, 2)).float()
    x = Interactions(ids[0], ids[1], categories[0], ids[2], categories[1], torch.empty(6, 0))
    before = copy.deepcopy(dict(net.named_buffers()))
    logits = net(x)
    logits.sum().backward()
    assert all(torch.equal(before[key], value) for key, value in net.named_buffers())
    torch.testing.assert_close(net.eval()(x), logits)


def test_tables_start_small():
    net = RECOMMENDERS["wide_deep"](100, 400, 20)
    net.start_afresh()
    for name, rows in (("user", 100), ("item", 400), ("category", 20)):
        table = net.tables[name].weight
        bound = (6 / (rows + table.shape[1])) ** 0.5
        assert 0.9 * bound < table.abs().max() <= bound
    assert all((layer.bias == 0).all() for layer in net.net if isinstance(layer, torch.nn.Linear))
    net = RECOMMENDERS["lr"](100, 400, 20)
    net.start_afresh()
    bound = (6 / (100 + 3 * 420 + 2)) ** 0.5
    assert 0.9 * bound < max(table.weight.abs().max() for table in net.tables.values()) <= bound


@pytest.mark.slow
@pytest.mark.parametrize("name", RECOMMENDERS)
def test_many_users_train_together_as_alone(name, freed):
    torch.manual_seed(0)
    users, items, categories, slots = 5, 9, 4, 3
    of_items = torch.randint(-1, categories, (items, 2))
    net = OnCatalog(RECOMMENDERS[name](users, items, categories), multi_hot(of_items, categories))
    histories = torch.randint(-1, items, (users, 6, HISTORIES * slots))
    x = torch.cat(
        [torch.arange(users).expand(6, -1).T[..., None], torch.randint(0, items, (users, 6, 1)), histories], 2
    )
    mask = torch.arange(6) < torch.tensor([6, 4, 1, 0, 5])[:, None]
    examples = Examples(x, torch.randint(0, 2, (users, 6)), mask)
    recipe = Recipe(partial(torch.optim.SGD, lr=0.5), None, 2, 4, 0.1)
    with freed(StackedTables):
        fit_many(net, examples, examples.none(), CLICK, recipe)
    for clip_rows in (False, True):
        together = fit_many(net, examples, examples.none(), CLICK, recipe, clip_rows=clip_rows).states
        for user in range(users):
            one = examples.take(torch.tensor([user]))
            alone = fit_many(net, one, one.none(), CLICK, recipe, clip_rows=clip_rows).states
            for key, value in alone.items():
                torch.testing.assert_close(value[0], together[key][user], atol=1e-6, rtol=1e-5)
    x = net.read(x[0])
    assert (x.categories_BHLG[x.items_BHL < 0] == 0).all()
    item = int(x.items_BHL.max())
    found = x.categories_BHLG[x.items_BHL == item][0].nonzero()[:, 0]
    assert set(found.tolist()) == set(of_items[item].tolist()) - {-1}
