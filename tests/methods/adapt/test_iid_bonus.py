"""A method is as careful after a few images as clients with all classes need it to be, and no more."""

from functools import partial

import pytest
import torch
from torch import nn

from iciia_exp.data.batches import ClientBatch
from iciia_exp.methods.adapt.client_prior import ClientPrior, ClientPriorMethod
from iciia_exp.methods.adapt.iciia_prior import IciiaPrior
from iciia_exp.methods.adapt.iid_bonus import LENGTHS, choose_iid_bonus, iid_bonus_after
from iciia_exp.methods.adapt.stream_encoder import StreamEncoder
from iciia_exp.methods.base import Facts
from tests.making.cloud import small_cloud

D, K = 12, 6


def val(images=800, seed=0):
    """Return one batch of clients with a class or two, whose images' features are noisy logits of their classes."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(0, K, (images,), generator=rng).sort().values
    x = torch.randn(images, K, generator=rng)
    x[torch.arange(images), y] += 2.0
    shape = (images // 8, 8)
    mask, image = torch.ones(shape, dtype=torch.bool), torch.arange(images).view(shape)
    return ClientBatch(x.view(*shape, K), y.view(shape), mask, torch.arange(shape[0]), image_CS=image)


def diagonal_head():
    """Return the best classifier that there is for the features of `val`."""
    head = nn.Linear(K, K)
    head.load_state_dict({"weight": 2 * torch.eye(K), "bias": torch.zeros(K)})
    return head


def test_iid_bonus_by_length():
    values = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert iid_bonus_after(values, torch.arange(10)).tolist() == [5, 5, 4, 3, 2, 2, 1, 1, 0, 0]
    assert iid_bonus_after(values, torch.tensor([[0.9, 6.3]])).tolist() == [[5, 1]]


def test_the_least_iid_bonus_that_harms_nobody():
    iid_bonus, need = torch.full((len(LENGTHS),), 9.0), torch.tensor([4.0, 4.0, 2.0, 1.0] + 4 * [0.0])

    def stream(x_CSD):
        # an unjust bias until the iid_bonus after so many images is what is needed there
        n = torch.arange(x_CSD.shape[1])
        short = iid_bonus_after(iid_bonus, n) < need[n]
        return x_CSD + 3.0 * short[None, :, None] * torch.eye(K)[0]

    record = choose_iid_bonus(iid_bonus, stream, lambda x: x, [val()])
    assert iid_bonus.tolist() == [4.0, 2.0, 1.0, 0.0, 0.0]
    assert record == {"iid_bonus": {"1": 4.0, "2": 2.0, "3": 1.0, "5": 0.0, "7": 0.0}}
    need[1:4] = torch.tensor([2.2, 1.6, 0.2])
    choose_iid_bonus(iid_bonus, stream, lambda x: x, [val()])
    assert iid_bonus.tolist() == [2.25, 1.75, 0.25, 0.0, 0.0]


def harmful(bias):
    """Return a stream that adds a bias to every answer with a past, if it is not careful enough."""
    return lambda x: x + bias(x) * (torch.arange(x.shape[1]) > 0)[None, :, None]


def test_harm_that_no_iid_bonus_prevents():
    iid_bonus = torch.zeros(len(LENGTHS))
    choose_iid_bonus(iid_bonus, harmful(lambda x: 3 * torch.eye(K)[0]), lambda x: x, [val()])
    assert iid_bonus.tolist() == [0.0] * len(LENGTHS)  # it would only cost others something
    stream = harmful(lambda x: ((7 - iid_bonus[0]).clamp(min=2) - 0.001 * iid_bonus[0]) * torch.eye(K)[0])
    choose_iid_bonus(iid_bonus, stream, lambda x: x, [val()])
    assert iid_bonus.tolist() == [5.0] * len(LENGTHS)  # more helps hardly more


def test_a_worse_answer_to_single_images_is_not_the_past_s_fault():
    iid_bonus = torch.zeros(len(LENGTHS))
    choose_iid_bonus(iid_bonus, lambda x: x + 3 * torch.eye(K)[0], lambda x: x, [val()])
    assert iid_bonus.tolist() == [0.0] * len(LENGTHS)
    choose_iid_bonus(iid_bonus, lambda x: x + (iid_bonus[0] < 3) * torch.eye(K)[0], lambda x: x, [val(4000)])
    assert iid_bonus.tolist() == [3.0] * len(LENGTHS)  # but if iid_bonus helps there too


def test_accuracy_counts_as_well_as_log_loss():
    iid_bonus = torch.zeros(len(LENGTHS))
    # surer is better by log-loss, and a bias of accuracy is made up for by it
    stream = harmful(lambda x: 0.5 * x + 0.8 * (iid_bonus[0] < 2) * torch.eye(K)[0])
    choose_iid_bonus(iid_bonus, stream, lambda x: 0.1 * x, [val(4000)])
    assert iid_bonus.tolist() == [2.0] * len(LENGTHS)
    stream = harmful(lambda x: 9 * (iid_bonus[0] < 2) * x)  # right as often, but far too sure
    choose_iid_bonus(iid_bonus, stream, lambda x: x, [val()])
    assert iid_bonus.tolist() == [2.0] * len(LENGTHS)


@pytest.mark.parametrize("images", [0, 7])
def test_too_few_images_say_nothing(images):
    iid_bonus = torch.ones(len(LENGTHS))
    batch = val(16)
    mask = torch.zeros_like(batch.mask_CS)
    mask.view(-1)[:images] = True
    assert choose_iid_bonus(iid_bonus, lambda x: x, lambda x: x, [batch._replace(mask_CS=mask)]) == {}
    assert iid_bonus.tolist() == [0.0] * len(LENGTHS)


def mixed_clients(x_MD, y_M, seed, clients=3000):
    rows = torch.stack([torch.randperm(len(y_M), generator=seed)[:4] for _ in range(clients)])
    return x_MD[rows], y_M[rows]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ClientPriorMethod, IciiaPrior])
def test_clients_with_all_classes_are_no_worse_off(kind):
    head = diagonal_head()
    batch, seed = val(), torch.Generator().manual_seed(1)
    x, y = mixed_clients(*(part.flatten(0, 1) for part in val(800, 3)[:2]), seed)
    loss = {}
    for iid_bonus in (0.0, None):
        torch.manual_seed(0)
        parts = {"prior": partial(ClientPrior, iid_bonus=iid_bonus, new=0.1, smoothing=0.1)}
        parts |= {"encoder": partial(StreamEncoder, heads=2)} if kind is IciiaPrior else {}
        method = kind(Facts.of(head), **parts).eval()
        # clients of one class each
        method.prior.types, method.prior.log_weight = torch.eye(K), torch.full((K,), 1 / K).log()
        record = method.calibrate([batch])
        assert ("iid_bonus" in record) == (iid_bonus is None)
        with torch.inference_mode():
            log_p = method.stream(x)[:, 1:].log_softmax(-1)
        loss[iid_bonus] = -log_p.gather(2, y[:, 1:, None]).mean().item()
    backbone = nn.functional.cross_entropy(head(x[:, 1:]).flatten(0, 1), y[:, 1:].flatten()).item()
    assert loss[0.0] > backbone + 0.1
    assert loss[None] < backbone + 0.03
    with torch.inference_mode():  # and it can be served one image after the other
        states = torch.zeros(len(x), 0, method.state_width)
        for i in range(x.shape[1]):
            logits, state = method.step(x[:, i], states)
            states = torch.cat([states, state[:, None]], 1)
        torch.testing.assert_close(logits, method.stream(x)[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_two_samples_of_images_ask_for_the_same_iid_bonus():
    head, chosen = diagonal_head(), []
    for seed in range(2):
        method = ClientPriorMethod(Facts.of(head), partial(ClientPrior, new=0.3, smoothing=0.1)).eval()
        method.prior.types, method.prior.log_weight = torch.eye(K), torch.full((K,), 1 / K).log()
        method.calibrate([val(800, seed)])
        chosen.append(method.prior.iid_bonus)
    assert chosen[0].min() > 2
    assert (chosen[0] - chosen[1]).abs().max() <= 0.5  # counted by labels, a whole nat


def test_the_iid_bonus_is_saved_with_the_weights():
    cloud = small_cloud(D, K)
    method = ClientPrior(Facts.of(nn.Linear(D, K)))
    method.read(cloud.view)
    method.iid_bonus.copy_(torch.arange(5.0))
    other = ClientPrior(Facts.of(nn.Linear(D, K)))
    other.read(cloud.view)
    other.load_state_dict(method.state_dict())
    assert other.iid_bonus.tolist() == [0, 1, 2, 3, 4]
    assert (
        "iid_bonus" not in ClientPrior(Facts.of(nn.Linear(D, K)), iid_bonus=0.0).state_dict()
    )  # given: it is in the settings
