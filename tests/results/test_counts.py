import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from iciia_exp.errors import UserError
from iciia_exp.results.counts import ClientCountsMetric, batch_outcomes
from iciia_exp.results.summary import summarise
from iciia_exp.tasks import CLICK, MULTI_LABEL, SINGLE_LABEL


def batch(rng, clients, C=5, S=4, K=3):
    logits = [torch.tensor(rng.normal(size=(C, S, K)), dtype=torch.float32) for _ in range(2)]
    y = torch.tensor(rng.integers(0, K, (C, S)))
    mask = torch.tensor(rng.random((C, S)) < 0.7)
    mask[:, 0] = True
    return (*logits, y, mask, torch.tensor(rng.integers(0, clients, C)))


def test_counts_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    metric = ClientCountsMetric(7)
    want = {name: [0.0] * 7 for name in ("n", "b", "m", "bm", "lb", "lm")}
    for _ in range(3):
        base, method, y, mask, client = batch(rng, 6)  # client 6 never has images
        metric.update(*batch_outcomes(SINGLE_LABEL, base, method, y, mask, client))
        for c in range(len(client)):
            for s in range(y.shape[1]):
                if not mask[c, s]:
                    continue
                u, label = int(client[c]), int(y[c, s])
                right_b, right_m = int(base[c, s].argmax()) == label, int(method[c, s].argmax()) == label
                want["n"][u] += 1
                want["b"][u] += right_b
                want["m"][u] += right_m
                want["bm"][u] += right_b and right_m
                for key, z in (("lb", base[c, s].tolist()), ("lm", method[c, s].tolist())):
                    want[key][u] += math.log(sum(math.exp(v) for v in z)) - z[label]
    numbers, counts = metric.counts()
    present = [u for u in range(7) if want["n"][u]]
    assert 6 not in present
    assert numbers.tolist() == present
    got = (counts.images_C, counts.backbone_correct_C, counts.method_correct_C, counts.both_correct_C)
    for values, key in zip(got, ("n", "b", "m", "bm"), strict=True):
        assert values.dtype == np.int64
        assert values.tolist() == [want[key][u] for u in present]
    np.testing.assert_allclose(counts.backbone_loss_C, [want["lb"][u] for u in present], rtol=1e-6)
    np.testing.assert_allclose(counts.method_loss_C, [want["lm"][u] for u in present], rtol=1e-6)


def test_batches_add_up_in_any_grouping():
    rng = np.random.default_rng(1)
    batches = [batch(rng, 4) for _ in range(4)]
    one, parts = ClientCountsMetric(4), [ClientCountsMetric(4) for _ in range(2)]
    for i, b in enumerate(batches):
        one.update(*batch_outcomes(SINGLE_LABEL, *b))
        parts[i % 2].update(*batch_outcomes(SINGLE_LABEL, *b))
    for name, value in one.compute().items():
        torch.testing.assert_close(value, parts[0].compute()[name] + parts[1].compute()[name])


def test_logits_of_another_shape_are_refused():
    backbone, y, mask = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    for wrong in ((2, 3, 5), (2, 1, 4), (6, 4)):
        with pytest.raises(UserError, match=r"the method gives logits .* expected \[C, S, K\] \[2, 3, 4\]"):
            batch_outcomes(SINGLE_LABEL, backbone, torch.zeros(wrong), y, mask, torch.arange(2))


def test_one_client():
    metric = ClientCountsMetric(1)
    metric.update(*batch_outcomes(SINGLE_LABEL, *batch(np.random.default_rng(0), 1)))
    numbers, counts = metric.counts()
    assert numbers.tolist() == [0]
    assert len(counts) == 1


def multi_label_batch(rng, clients, C=5, S=4, K=3):
    base, method, _, mask, client = batch(rng, clients, C, S, K)
    y = torch.tensor(rng.integers(0, 2, (C, S, K)), dtype=torch.uint8)
    y[~mask] = 0  # as `FeatureBatches` pads
    return base, method, y, mask, client


def test_multi_label_counts_equal_plain_numpy():
    rng = np.random.default_rng(2)
    metric = ClientCountsMetric(7, decisions=3)
    rows = []  # one per attribute of an image: client, backbone right, method right, their nats
    images = np.zeros(7, dtype=int)
    for _ in range(3):
        given = multi_label_batch(rng, 6)
        metric.update(*batch_outcomes(MULTI_LABEL, *given))
        base, method, y, mask, client = (t.numpy() for t in given)
        for c, s in zip(*np.nonzero(mask), strict=True):
            images[client[c]] += 1
            for k in range(3):
                signs = [z[c, s, k] * (1 if y[c, s, k] else -1) for z in (base, method)]
                rows.append((client[c], *(z > 0 for z in signs), *(np.log1p(np.exp(-z)) for z in signs)))
    owner, base_right, method_right, base_nats, method_nats = (np.array(column) for column in zip(*rows, strict=True))
    numbers, counts = metric.counts()
    assert 6 not in numbers

    def of_clients(values):
        return np.array([values[owner == u].sum() for u in numbers])

    assert counts.decisions == 3
    np.testing.assert_array_equal(counts.images_C, images[numbers])
    np.testing.assert_array_equal(counts.decisions_C, of_clients(np.ones(len(owner), dtype=int)))
    np.testing.assert_array_equal(counts.backbone_correct_C, of_clients(base_right))
    np.testing.assert_array_equal(counts.method_correct_C, of_clients(method_right))
    np.testing.assert_array_equal(counts.both_correct_C, of_clients(base_right & method_right))
    np.testing.assert_array_equal(counts.gained_C, of_clients(method_right & ~base_right))
    np.testing.assert_array_equal(counts.lost_C, of_clients(base_right & ~method_right))
    np.testing.assert_allclose(counts.backbone_loss_C, of_clients(base_nats), rtol=1e-6)
    np.testing.assert_allclose(counts.method_loss_C, of_clients(method_nats), rtol=1e-6)


def test_padded_images_of_a_multi_label_batch_count_nothing():
    rng = np.random.default_rng(3)
    base, method, y, mask, client = multi_label_batch(rng, 4)
    plain, noisy = ClientCountsMetric(4, decisions=3), ClientCountsMetric(4, decisions=3)
    plain.update(*batch_outcomes(MULTI_LABEL, base, method, y, mask, client))
    noise = torch.where(mask[..., None], base, torch.full_like(base, torch.nan))
    noisy.update(*batch_outcomes(MULTI_LABEL, noise, method, torch.where(mask[..., None], y, 1 - y), mask, client))
    for name, value in plain.compute().items():
        torch.testing.assert_close(value, noisy.compute()[name])


def test_clicks_count_as_auc():
    rng = np.random.default_rng(3)
    metric = ClientCountsMetric(8, ranked=True)
    rows = []  # client, label, score of the backbone, score of the method
    for _ in range(6):
        base, method, y, mask, client = batch(rng, 7, K=2)
        y = torch.where(client[:, None] == 5, 1, y)
        metric.update(*batch_outcomes(CLICK, base, method, y, mask, client))
        owner = client[:, None].expand_as(y)[mask]
        rows.append(torch.stack([owner, y[mask], *((z[..., 1] - z[..., 0])[mask] for z in (base, method))], 1).double())
    rows = torch.cat(rows).numpy()
    numbers, counts = metric.counts()
    assert numbers.tolist() == [0, 1, 2, 3, 4, 6]  # 5 has one label, 7 no items
    assert counts.ranked
    for i, number in enumerate(numbers):
        own = rows[rows[:, 0] == number]
        assert counts.images_C[i] == len(own)
        aucs = [roc_auc_score(own[:, 1], own[:, column]) for column in (2, 3)]
        got = [counts.backbone_correct_C[i] / len(own), counts.method_correct_C[i] / len(own)]
        np.testing.assert_allclose(got, aucs, atol=1e-12)
        assert counts.both_correct_C[i] == min(counts.backbone_correct_C[i], counts.method_correct_C[i])
    row = summarise(counts, resamples=50)
    better = counts.method_correct_C > counts.backbone_correct_C
    assert row["improved_share"] == better.mean()
    worse = counts.method_correct_C < counts.backbone_correct_C
    assert row["harmed_share"] == worse.mean()
    assert row["harmed_share_by_chance"] == (better | worse).mean() / 2
    assert row["accuracy"] == np.average(counts.method_correct_C / counts.images_C, weights=counts.images_C)


def test_no_client_has_an_auc():
    metric = ClientCountsMetric(2, ranked=True)
    base, method, y, mask, client = batch(np.random.default_rng(4), 2, K=2)
    metric.update(*batch_outcomes(CLICK, base, method, torch.ones_like(y), mask, client))
    with pytest.raises(UserError, match="no client has items of both labels"):
        metric.counts()
