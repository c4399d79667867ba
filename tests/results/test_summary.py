"""Vectorised statistics against plain loops and known distributions."""

import numpy as np
import pytest

from iciia_exp.results.summary import ClientCounts, averages, harmed_by_chance, summarise, worst_decile


def make(n=60, seed=0, images=(5, 40), p_base=0.6, p_gain=0.3, p_loss=0.1):
    rng = np.random.default_rng(seed)
    images_C = rng.integers(*images, n)
    rows = []
    for m in images_C:
        base = rng.random(m) < p_base
        method = np.where(base, rng.random(m) > p_loss, rng.random(m) < p_gain)
        rows.append((base.sum(), method.sum(), (base & method).sum(), rng.random(m).sum(), rng.random(m).sum()))
    base, method, both, lb, lm = (np.array(c) for c in zip(*rows, strict=True))
    return ClientCounts(images_C, base, method, both, lb, lm)


def test_averages_equal_a_plain_loop():
    counts = make(37)
    per_client = [h / n for h, n in zip(counts.method_correct_C, counts.images_C, strict=True)]
    worst = sorted(per_client)[:4]  # a tenth of 37, rounded up
    got = averages(counts.method_correct_C, counts.method_loss_C, counts.images_C)
    assert got["accuracy"] == pytest.approx(sum(counts.method_correct_C) / sum(counts.images_C))
    assert got["client_accuracy"] == pytest.approx(sum(per_client) / 37)
    assert got["worst_decile"] == pytest.approx(sum(worst) / 4)
    assert got["log_loss"] == pytest.approx(sum(counts.method_loss_C) / sum(counts.images_C))


def test_summary_is_paired_and_repeats():
    counts = make()
    row = summarise(counts, resamples=500)
    assert row == summarise(counts, resamples=500)
    assert row["gain"] == pytest.approx(row["accuracy"] - row["backbone_accuracy"])
    for name in ("accuracy", "gain", "client_gain", "backbone_accuracy"):
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    gains = (counts.method_correct_C - counts.backbone_correct_C) / counts.images_C
    lowest = np.argsort(counts.backbone_correct_C / counts.images_C, kind="stable")[:6]
    assert row["gain_where_backbone_is_worst"] == pytest.approx(gains[lowest].mean())
    assert row["harmed_share"] == pytest.approx((gains < 0).mean())
    assert (row["test_clients"], row["test_images"]) == (60, counts.images_C.sum())


def test_bootstrap_interval_has_the_width_of_theory():
    """For equal clients the interval of the mean is +-1.96 standard errors."""
    counts = make(400, images=(20, 21))
    gains = (counts.method_correct_C - counts.backbone_correct_C) / counts.images_C
    row = summarise(counts)
    width = row["client_gain_high"] - row["client_gain_low"]
    assert width == pytest.approx(2 * 1.96 * gains.std(ddof=1) / 20, rel=0.1)
    assert row["se_clients"] == pytest.approx((counts.method_correct_C / counts.images_C).std(ddof=1) / 20, rel=0.1)


@pytest.mark.parametrize("clients", [3, 5, 10])
def test_intervals_of_few_clients_cover_the_truth(clients):
    """95 % should have the true gain; percentiles of the bootstrap have it in 70 % with 3 clients."""
    inside = []
    for seed in range(300):
        row = summarise(make(clients, images=(20, 21), seed=seed), resamples=400)
        inside.append(row["client_gain_low"] <= 0.4 * 0.3 - 0.6 * 0.1 <= row["client_gain_high"])
    assert np.mean(inside) >= 0.91


def test_two_clients_have_no_interval_but_a_standard_error():
    row = summarise(make(2), resamples=20)
    assert np.isnan([row["gain_low"], row["accuracy_high"], row["log_loss_gain_low"]]).all()
    assert row["se_clients"] > 0


def test_intervals_stay_within_what_is_possible():
    counts = make(3, images=(3, 4), p_gain=0.9, p_loss=0, seed=1)
    row = summarise(counts)
    assert row["accuracy_high"] == 1
    assert row["backbone_accuracy_low"] >= 0
    assert row["gain_high"] <= 1


def test_chance_harm_matches_the_harm_of_clients_that_are_all_alike():
    counts = make(3000, images=(16, 17), p_gain=0.2, p_loss=0.1)
    harmed = float((counts.lost_C > counts.gained_C).mean())
    assert harmed_by_chance(counts) == pytest.approx(harmed, abs=0.03)
    assert harmed > 0.02


def test_chance_harm_is_below_the_harm_of_clients_that_differ():
    """Half the clients gain, half lose: far more are harmed than noise around a common gain would harm."""
    n = 100
    lost = np.repeat([0, 6], n // 2)
    gained = np.repeat([10, 0], n // 2)
    base = np.full(n, 10)
    counts = ClientCounts(np.full(n, 20), base, base - lost + gained, base - lost, np.ones(n), np.ones(n))
    assert (counts.lost_C > counts.gained_C).mean() == 0.5
    assert harmed_by_chance(counts) < 0.3


def test_one_client_and_identical_methods():
    counts = ClientCounts(*(np.array([v]) for v in (4, 3, 3, 3)), np.array([1.0]), np.array([1.0]))
    row = summarise(counts, resamples=20)
    assert row["gain"] == row["harmed_share"] == row["harmed_share_by_chance"] == 0
    assert np.isnan([row["gain_low"], row["log_loss_gain_high"], row["se_clients"]]).all()


def test_a_hundred_thousand_clients_are_summarised():
    n = 100_000
    rng = np.random.default_rng(0)
    images = np.full(n, 16)
    correct = rng.binomial(16, 0.8, n)
    row = summarise(ClientCounts(images, correct, correct, correct, images * 0.5, images * 0.5), resamples=100)
    assert row["accuracy"] == pytest.approx(0.8, abs=0.01)


def test_counts_are_checked():
    with pytest.raises(ValueError, match="one entry per client"):
        ClientCounts(*(np.ones(n) for n in (2, 2, 2, 2, 2, 3)))
    with pytest.raises(ValueError, match="at least one image"):
        ClientCounts(*(np.zeros(2) for _ in range(6)))


def test_worst_decile_of_few_clients_is_the_worst_client():
    assert worst_decile(np.array([1, 3]), np.array([4, 4])) == 0.25


def multi_label(n=30, decisions=5, seed=0):
    """Return the counts of clients whose images have five decisions each, and the same decisions as images of one."""
    flat = make(n, seed, images=(4, 20))
    images_C = flat.images_C
    parts = [np.random.default_rng(seed + i).binomial(decisions * images_C, 0.7) for i in range(2)]
    both = np.minimum(*parts)
    losses = [decisions * images_C * rate for rate in (0.4, 0.3)]
    return (
        ClientCounts(images_C, *parts, both, *losses, decisions=decisions),
        ClientCounts(decisions * images_C, *parts, both, *losses),
    )


def test_answers_of_several_per_image():
    counts, flat = multi_label()
    np.testing.assert_array_equal(counts.decisions_C, 5 * counts.images_C)
    np.testing.assert_array_equal(flat.decisions_C, flat.images_C)
    assert len(counts) == 30


def test_a_summary_of_attributes_is_that_of_as_many_images():
    counts, flat = multi_label()
    row, want = summarise(counts, resamples=200), summarise(flat, resamples=200)
    assert row["test_images"] * 5 == want["test_images"]
    assert {k: v for k, v in row.items() if k != "test_images"} == {k: v for k, v in want.items() if k != "test_images"}
    assert row["log_loss"] == pytest.approx(0.3)
    assert row["backbone_log_loss"] == pytest.approx(0.4)
    assert 0.6 < row["accuracy"] < 0.8
    assert harmed_by_chance(counts) == harmed_by_chance(flat)
