"""The fitted classifier on problems whose answer is known."""

import json
import math

import numpy as np
import pytest
import torch

from iciia_exp.errors import UserError
from iciia_exp.models.linear_probe import PENALTIES, fit_linear_head, out_of_fold_logits
from iciia_exp.tasks import MULTI_LABEL, SINGLE_LABEL


def clusters(images, dim, classes, spread, seed=0):
    """Return features around one centre for each class, and labels."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    labels = rng.integers(0, classes, images)
    return (centres[labels] + spread * rng.normal(size=(images, dim))).astype(np.float32), labels


def logits(x, weight, bias):
    return x @ weight.T + bias


def accuracy(x, labels, weight, bias):
    return float((logits(x, weight, bias).argmax(1) == labels).mean())


@pytest.mark.parametrize("classes", [2, 5])
def test_a_separable_problem_is_solved(classes):
    x, labels = clusters(300, 16, classes, 0.3)
    weight, bias, record = fit_linear_head(x, labels, SINGLE_LABEL, classes)
    assert (weight.shape, bias.shape) == ((classes, 16), (classes,))
    assert weight.dtype == bias.dtype == np.float32
    new, wanted = clusters(300, 16, classes, 0.3, seed=1)
    assert accuracy(new, wanted, weight, bias) > 0.99
    assert record["penalty"] == min(PENALTIES)  # nothing speaks against large weights


@pytest.mark.parametrize("classes", [2, 3])
def test_the_fit_minimises_what_it_says(classes):
    """Mean log-loss plus half the penalty times the squared weights on standardised features: gradient zero."""
    x, labels = clusters(200, 6, classes, 2.0)
    x = 5 * x + 3
    weight, bias, record = fit_linear_head(x, labels, SINGLE_LABEL, classes)
    scale = float(x.std())
    standard = torch.tensor((x - x.mean(0)) / scale, dtype=torch.float64)
    w = torch.tensor(weight * scale, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(bias + weight @ x.mean(0), dtype=torch.float64, requires_grad=True)
    loss = SINGLE_LABEL.loss(standard @ w.T + b, torch.tensor(labels))
    # two classes: scikit-learn has one row of weights, the difference of ours
    squares = w.square().sum() if classes > 2 else (w[1] - w[0]).square().sum()
    (loss + record["penalty"] / 2 * squares).backward()
    assert float(w.grad.abs().max()) < 2e-3
    assert float(b.grad.abs().max()) < 2e-3


def test_noise_gets_the_largest_penalty():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(400, 40)).astype(np.float32), rng.integers(0, 4, 400)
    *_, record = fit_linear_head(x, labels, SINGLE_LABEL, 4)
    assert record["penalty"] == max(PENALTIES)
    losses = list(record["held_out_log_loss"].values())
    assert losses == sorted(losses)
    assert len(losses) == 2  # the second was worse, and no other is tried


def test_scale_and_offset_of_the_features_change_no_answer():
    x, labels = clusters(200, 8, 4, 1.0)
    plain = fit_linear_head(x, labels, SINGLE_LABEL, 4)
    moved = fit_linear_head(100 * x + 50, labels, SINGLE_LABEL, 4)
    assert plain[2]["penalty"] == moved[2]["penalty"]
    np.testing.assert_allclose(logits(x, *plain[:2]), logits(100 * x + 50, *moved[:2]), atol=2e-2)


@pytest.mark.parametrize("present", [[1, 3], [0, 2, 5]])
def test_a_class_without_images_never_wins(present):
    x, numbers = clusters(300, 8, len(present), 0.5)
    weight, bias, _ = fit_linear_head(x, np.array(present)[numbers], SINGLE_LABEL, 6)
    assert weight.shape == (6, 8)
    far = np.random.default_rng(1).normal(size=(500, 8)).astype(np.float32) * 50  # farther than any image was
    assert set(logits(far, weight, bias).argmax(1)) <= set(present)
    assert accuracy(x, np.array(present)[numbers], weight, bias) > 0.95
    absent = [k for k in range(6) if k not in present]
    assert SINGLE_LABEL.probabilities(torch.tensor(logits(x, weight, bias)))[:, absent].max() < 1e-9


def test_a_class_of_one_image():
    x, labels = clusters(60, 8, 3, 0.5)
    labels[labels == 2] = 0
    labels[0] = 2
    weight, bias, _ = fit_linear_head(x, labels, SINGLE_LABEL, 3)
    assert np.isfinite(weight).all()
    assert np.isfinite(bias).all()


@pytest.mark.parametrize("images", [2, 3, 6])
def test_very_few_images(images):
    x = np.eye(images, 4, dtype=np.float32)
    weight, _, record = fit_linear_head(x, np.arange(images) % 2, SINGLE_LABEL, 2)
    assert np.isfinite(weight).all()
    assert record["penalty"] in PENALTIES


def test_many_classes_with_few_images_give_no_warning():
    """Warnings are errors in the tests; scikit-learn's takes such labels for a regression's."""
    x, labels = clusters(40, 8, 30, 0.5)
    fit_linear_head(x, labels, SINGLE_LABEL, 30)


def test_the_record_is_plain_and_complete():
    x, labels = clusters(100, 4, 3, 1.0)
    *_, record = fit_linear_head(x, labels, SINGLE_LABEL, 3)
    assert json.loads(json.dumps(record)) == record
    losses = record["held_out_log_loss"]
    assert set(losses) == {f"{p:g}" for p in PENALTIES}
    assert all(math.isfinite(v) for v in losses.values())
    assert losses[f"{record['penalty']:g}"] == min(losses.values())


def test_the_same_seed_gives_the_same_classifier():
    x, labels = clusters(100, 4, 3, 2.0)
    one, two = (fit_linear_head(x.copy(), labels, SINGLE_LABEL, 3, seed=5) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one[:2], two[:2], strict=True))
    assert one[2] == two[2]
    assert fit_linear_head(x, labels, SINGLE_LABEL, 3, seed=6)[2] != one[2]


def test_the_features_are_left_as_they_are():
    x, labels = clusters(50, 4, 3, 1.0)
    before = x.copy()
    fit_linear_head(x, labels, SINGLE_LABEL, 3)
    np.testing.assert_array_equal(x, before)


def test_one_class_cannot_be_fitted():
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    with pytest.raises(UserError, match=r"backbone\.train=head: needs images of at least two classes"):
        fit_linear_head(x, np.full(20, 2), SINGLE_LABEL, 5)


# ---- multi-label


def attributes(images, seed=0):
    """Return features and three attributes that hold on one side of a plane each, not all equally often."""
    x = np.random.default_rng(seed).normal(size=(images, 8)).astype(np.float32)
    planes = np.random.default_rng(99).normal(size=(3, 8))
    return x, (x @ planes.T > np.array([0.0, 1.0, -3.0])).astype(np.uint8)


def test_every_attribute_has_its_own_classifier():
    x, labels = attributes(500)
    weight, bias, _ = fit_linear_head(x, labels, MULTI_LABEL, 3)
    assert (weight.shape, bias.shape) == ((3, 8), (3,))
    assert weight.dtype == bias.dtype == np.float32
    new, wanted = attributes(500, seed=1)
    assert (((logits(new, weight, bias) > 0) == wanted).mean(0) > 0.95).all()


def test_attributes_are_fitted_independently():
    x, labels = attributes(200)
    weight, bias, _ = fit_linear_head(x, labels, MULTI_LABEL, 3)
    alone, alone_bias, _ = fit_linear_head(x, labels[:, 1:2], MULTI_LABEL, 1)
    np.testing.assert_allclose(weight[1], alone[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(bias[1], alone_bias[0], rtol=1e-5, atol=1e-5)


def test_probabilities_of_noise_are_the_shares():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 3)).astype(np.float32)
    labels = (rng.random((4000, 2)) < [0.2, 0.7]).astype(np.uint8)
    weight, bias, _ = fit_linear_head(x, labels, MULTI_LABEL, 2)
    probabilities = MULTI_LABEL.probabilities(torch.tensor(logits(x, weight, bias))).numpy()
    np.testing.assert_allclose(probabilities.mean(0), labels.mean(0), atol=0.01)


def test_an_attribute_that_all_or_no_images_have():
    x, labels = attributes(100)
    labels[:, 0], labels[:, 2] = 1, 0
    weight, bias, record = fit_linear_head(x, labels, MULTI_LABEL, 3)
    answers = logits(100 * x, weight, bias) > 0
    assert answers[:, 0].all()
    assert not answers[:, 2].any()
    assert ((logits(x, weight, bias) > 0)[:, 1] == labels[:, 1]).mean() > 0.9
    assert np.isfinite(bias).all()
    json.dumps(record)


def test_a_fold_may_hold_all_images_of_a_class():
    x, labels = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32), np.zeros(40, dtype=np.int64)
    labels[7] = 2
    found = out_of_fold_logits(x, labels, SINGLE_LABEL, 3, 1e-4)
    assert np.isfinite(found).all()
    assert found[7].argmax() == 0  # its classifier has seen class 0 alone
    assert (found[:, 1] < -20).all()


@pytest.mark.parametrize("task", ["single-label", "multi-label"])
def test_out_of_fold_logits_are_those_of_new_images(task):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 40)).astype(np.float32)
    labels = rng.integers(0, 3, 300)  # nothing to learn: only a classifier's own images can look right
    if task == "multi-label":
        labels = np.eye(3, dtype=np.uint8)[labels]
    weight, bias, _ = fit_linear_head(x, labels, task, 3)
    own, new = x @ weight.T + bias, out_of_fold_logits(x, labels, task, 3, 1e-4)
    assert new.dtype == np.float16
    right = (lambda z: (z.argmax(1) == labels).mean()) if labels.ndim == 1 else (lambda z: ((z > 0) == labels).mean())
    chance = 1 / 3 if labels.ndim == 1 else 5 / 9
    assert right(own) > chance + 0.1
    assert abs(right(new) - chance) < 0.08
    assert (new == out_of_fold_logits(x, labels, task, 3, 1e-4)).all()
