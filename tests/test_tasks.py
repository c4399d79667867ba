"""Losses and correct decisions of both tasks against plain numpy."""

import json
import pickle

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from iciia_exp.tasks import CLICK, MULTI_LABEL, SINGLE_LABEL, TASKS


def single(M=40, K=5):
    rng = np.random.default_rng(0)
    return rng.normal(size=(M, K)) * 3, rng.integers(0, K, M)


def multi(M=40, K=5):
    rng = np.random.default_rng(1)
    return rng.normal(size=(M, K)) * 3, rng.integers(0, 2, (M, K))


def nats(logits, y):
    """Return -log p of every answer: [M, 1], or [M, K] of a multi-label task."""
    if y.ndim == 2:
        p = 1 / (1 + np.exp(-logits))
        return -np.log(np.where(y == 1, p, 1 - p))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return -np.log(p[np.arange(len(y)), y])[:, None]


def right(logits, y):
    return (logits > 0) == (y == 1) if y.ndim == 2 else (logits.argmax(1) == y)[:, None]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_multi_label_equals_numpy(dtype):
    logits, y = multi()
    given = torch.tensor(logits, dtype=torch.float32), torch.tensor(y).to(dtype)
    assert MULTI_LABEL.correct(*given).dtype == torch.bool
    np.testing.assert_array_equal(MULTI_LABEL.correct(*given).numpy(), right(logits, y))
    np.testing.assert_allclose(MULTI_LABEL.log_loss(*given).numpy(), nats(logits, y).sum(1), rtol=1e-5)
    np.testing.assert_allclose(float(MULTI_LABEL.loss(*given)), nats(logits, y).mean(), rtol=1e-5)


def test_single_label_equals_numpy():
    logits, y = single()
    given = torch.tensor(logits, dtype=torch.float32), torch.tensor(y)
    assert SINGLE_LABEL.correct(*given).shape == (40, 1)
    np.testing.assert_array_equal(SINGLE_LABEL.correct(*given).numpy(), right(logits, y))
    np.testing.assert_allclose(SINGLE_LABEL.log_loss(*given).numpy(), nats(logits, y).sum(1), rtol=1e-5)
    np.testing.assert_allclose(float(SINGLE_LABEL.loss(*given)), nats(logits, y).mean(), rtol=1e-5)


@pytest.mark.parametrize(("task", "make"), [(SINGLE_LABEL, single), (MULTI_LABEL, multi)])
def test_log_loss_is_in_double_precision(task, make):
    logits, y = make()
    assert task.log_loss(torch.tensor(logits, dtype=torch.float16), torch.tensor(y)).dtype == torch.float64
    huge = task.log_loss(torch.tensor(logits) * 1e4, torch.tensor(y))
    assert torch.isfinite(huge).all()


@pytest.mark.parametrize(("task", "make"), [(SINGLE_LABEL, single), (MULTI_LABEL, multi)])
def test_the_loss_has_a_gradient_in_the_logits_precision(task, make):
    logits, y = make()
    x = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    loss = task.loss(x, torch.tensor(y))
    assert loss.dtype == torch.float32
    loss.backward()
    assert (x.grad != 0).all()


def test_one_attribute_is_not_one_class():
    logits, y = torch.tensor([[2.0], [-1.0]]), torch.tensor([[1], [1]])
    assert MULTI_LABEL.correct(logits, y).tolist() == [[True], [False]]


def test_probabilities():
    logits = torch.randn(2, 3, 4)
    torch.testing.assert_close(SINGLE_LABEL.probabilities(logits).sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(MULTI_LABEL.probabilities(logits), 1 / (1 + (-logits).exp()))


def test_decisions():
    assert SINGLE_LABEL.decisions(7) == 1
    assert MULTI_LABEL.decisions(7) == 7


def test_a_task_is_its_own_name():
    assert list(TASKS) == ["single-label", "multi-label", "click", "quality"]
    assert TASKS["multi-label"] is MULTI_LABEL
    assert json.loads(json.dumps({"task": SINGLE_LABEL})) == {"task": "single-label"}
    again = pickle.loads(pickle.dumps(MULTI_LABEL))
    assert type(again) is type(MULTI_LABEL)
    assert again == MULTI_LABEL


def test_click_loss_is_the_released_one():
    logits, y = torch.randn(30, 2) * 20, torch.arange(30) % 2
    want = [-np.log(p + 1e-7) for p in logits.softmax(-1)[torch.arange(30), y].double().numpy()]
    assert max(want) > 14  # p is 0 there
    np.testing.assert_allclose(CLICK.loss(logits, y, reduction="none").numpy(), want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(float(CLICK.loss(logits, y)), np.mean(want), rtol=1e-5)


def test_pairs_give_the_auc_of_every_client():
    generator = torch.Generator().manual_seed(0)
    client = torch.randint(0, 9, (400,), generator=generator)
    client[client == 3] = 4  # has none
    y = torch.randint(0, 2, (400,), generator=generator)
    y[client == 5] = 1
    score = torch.randint(-6, 6, (400,), generator=generator) / 4  # with ties
    twice, pairs = CLICK.pairs(score, y, client, 10)
    assert pairs.tolist()[3] == pairs.tolist()[5] == pairs.tolist()[9] == 0
    for number in (0, 1, 2, 4, 6, 7, 8):
        own = client == number
        yes, no = score[own & (y == 1)], score[own & (y == 0)]
        assert pairs[number] == len(yes) * len(no)
        want = roc_auc_score(y[own], score[own])
        assert int(twice[number]) / (2 * int(pairs[number])) == pytest.approx(want, abs=1e-12)


def test_pairs_of_no_item():
    none = torch.zeros(0, dtype=torch.int64)
    assert [part.tolist() for part in CLICK.pairs(none.float(), none, none, 2)] == [[0, 0], [0, 0]]
