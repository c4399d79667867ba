from functools import partial

import pytest
import timm.optim
import timm.scheduler
import torch
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedulers

from iciia_exp.errors import ConfigError
from iciia_exp.recipe import Recipe

FAST = partial(SGD, lr=0.1)


def rates(recipe, steps=10, epochs=5):
    """Return the learning rate of every step."""
    optimizer = recipe.make_optimizer([torch.nn.Parameter(torch.zeros(2))])
    made = recipe.make_scheduler(optimizer, steps, epochs)
    seen = []
    for step in range(1, steps + 1):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        epoch_ends = step % (steps // epochs) == 0
        if made and (made["interval"] == "step" or epoch_ends):
            if hasattr(made["scheduler"], "step_update"):  # of timm
                made["scheduler"].step(step * epochs // steps)
                made["scheduler"].step_update(step)
            else:
                made["scheduler"].step()
    return seen


def test_a_scheduler_without_a_length_spans_the_training_step_by_step():
    cosine = rates(Recipe(FAST, schedulers.CosineAnnealingLR))
    assert cosine[0] == 0.1
    assert cosine == sorted(set(cosine), reverse=True)
    assert cosine[-1] < 0.01
    one = rates(Recipe(FAST, schedulers.OneCycleLR))
    assert max(one) == pytest.approx(0.1, rel=0.1)
    assert one[0] < 0.02
    assert one[-1] < 0.02
    assert rates(Recipe(FAST, partial(schedulers.PolynomialLR, power=1.0))) == pytest.approx(
        [0.1 * (1 - step / 10) for step in range(10)]
    )
    assert rates(Recipe(FAST)) == rates(Recipe(FAST, partial(schedulers.ConstantLR, factor=1.0))) == [0.1] * 10


def test_any_other_scheduler_is_stepped_every_epoch():
    stairs = rates(Recipe(partial(SGD, lr=1.0), partial(schedulers.StepLR, step_size=2)))
    assert stairs == pytest.approx([1.0] * 4 + [0.1] * 4 + [0.01] * 2)
    given = rates(Recipe(FAST, partial(schedulers.CosineAnnealingLR, T_max=5)))
    assert given[0] == given[1] > given[2]


def test_timm_counts_epochs_unless_told_otherwise():
    by_epoch = rates(Recipe(FAST, partial(timm.scheduler.CosineLRScheduler, warmup_t=1, warmup_lr_init=0.01)))
    assert by_epoch[0] == by_epoch[1] == 0.01
    assert by_epoch[2] == by_epoch[3] == pytest.approx(0.1 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi / 5))).item())
    by_step = rates(Recipe(FAST, partial(timm.scheduler.CosineLRScheduler, t_in_epochs=False)))
    assert len(set(by_step)) == 10


@pytest.mark.parametrize(
    "optimizer",
    [FAST, partial(AdamW, lr=0.1, fused=True), partial(torch.optim.RAdam, lr=0.1), partial(timm.optim.Lamb, lr=0.1),
     partial(timm.optim.create_optimizer_v2, opt="lion", lr=0.1)],
)  # fmt: skip
def test_any_optimizer_of_torch_or_timm(optimizer):
    recipe = Recipe(optimizer, schedulers.CosineAnnealingLR, trunk_lr=0.01)
    head, trunk = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    made = recipe.make_optimizer([head], [trunk])
    (head.sum() + trunk.sum()).backward()
    made.step()
    assert (head < 1).all()
    assert (1 - head > 5 * (1 - trunk)).all()
    assert recipe.lr == 0.1


def test_fused_can_be_turned_off():
    recipe = Recipe(partial(AdamW, lr=0.1, fused=True))
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    assert recipe.make_optimizer(parameters).defaults["fused"]
    assert not recipe.make_optimizer(parameters, fused=False).defaults["fused"]


@pytest.mark.parametrize(
    "bad",
    [{"optimizer": "sgd"}, {"optimizer": SGD.__mro__[-1]}, {"optimizer": partial(SGD, lr=-1)},
     {"optimizer": partial(SGD, rate=1)}, {"scheduler": 3}, {"scheduler": partial(schedulers.StepLR, steps=2)},
     {"epochs": 0}, {"batch_size": 1.5}, {"trunk_lr": -1}, {"clip_norm": -1}],
    ids=str,
)  # fmt: skip
def test_bad_values_name_their_key(bad):
    with pytest.raises(ConfigError) as error:
        Recipe(**bad)
    assert error.value.key == next(iter(bad))


@pytest.mark.parametrize("scheduler", [None, schedulers.OneCycleLR])
def test_a_trunk_has_a_rate_of_its_own(scheduler):
    head, trunk = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    recipe = Recipe(FAST, scheduler, trunk_lr=0.01)
    optimizer = recipe.make_optimizer([head], [trunk])
    recipe.make_scheduler(optimizer, 10, 1)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rate[id(head)] == pytest.approx(10 * rate[id(trunk)])
