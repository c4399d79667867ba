import pytest
import torch

from iciia_exp.errors import ConfigError
from iciia_exp.recipe import Recipe


def rates(recipe, steps=10, epochs=5):
    optimizer = recipe.make_optimizer([torch.nn.Parameter(torch.zeros(2))])
    schedule = recipe.make_schedule(optimizer, steps, epochs)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule:
            schedule.step()
    return seen


def test_schedules():
    assert rates(Recipe(lr=0.1)) == [0.1] * 10
    cosine = rates(Recipe(lr=0.1, schedule="cosine"))
    assert cosine[0] == 0.1
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[-1] < 0.01
    one = rates(Recipe(lr=0.1, schedule="onecycle"))
    assert max(one) == pytest.approx(0.1, rel=0.1)
    assert one[0] < 0.02
    assert one[-1] < 0.02


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizers_take_the_recipe_s_values(name):
    optimizer = Recipe(name, lr=0.2, momentum=0.5, weight_decay=0.3).make_optimizer(
        [torch.nn.Parameter(torch.zeros(1))]
    )
    group = optimizer.param_groups[0]
    assert type(optimizer).__name__.lower() == name
    assert (group["lr"], group["weight_decay"]) == (0.2, 0.3)
    if name == "sgd":
        assert group["momentum"] == 0.5


@pytest.mark.parametrize(
    "bad",
    [{"optimizer": "lion"}, {"lr": 0}, {"lr": "x"}, {"epochs": 0}, {"batch_size": 1.5}, {"momentum": 2}, {"weight_decay": -1},
     {"schedule": "stairs"}, {"trunk_lr": -1}, {"step_epochs": 0}, {"clip_norm": -1}, {"patience": -1}],
    ids=lambda b: next(iter(b)),
)  # fmt: skip
def test_bad_values_name_their_key(bad):
    with pytest.raises(ConfigError) as error:
        Recipe(**bad)
    assert error.value.key == next(iter(bad))


def test_a_step_every_few_epochs():
    seen = rates(Recipe(lr=1.0, schedule="step", step_epochs=2), steps=10, epochs=5)  # two steps an epoch
    assert seen == pytest.approx([1.0] * 4 + [0.1] * 4 + [0.01] * 2)


@pytest.mark.parametrize("schedule", ["constant", "onecycle"])
def test_a_trunk_has_a_rate_of_its_own(schedule):
    head, trunk = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    recipe = Recipe("sgd", lr=0.1, trunk_lr=0.01, schedule=schedule)
    optimizer = recipe.make_optimizer([head], [trunk])
    recipe.make_schedule(optimizer, 10, 1)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rate[id(head)] == pytest.approx(10 * rate[id(trunk)])
