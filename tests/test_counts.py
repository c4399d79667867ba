import math

import numpy as np
import torch

from iciia_exp.counts import ClientCountsMetric


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
        metric.update(base, method, y, mask, client)
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
    got = (counts.images_C, counts.backbone_hits_C, counts.method_hits_C, counts.both_hits_C)
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
        one.update(*b)
        parts[i % 2].update(*b)
    for name, value in one.compute().items():
        torch.testing.assert_close(value, parts[0].compute()[name] + parts[1].compute()[name])


def test_one_client():
    metric = ClientCountsMetric(1)
    metric.update(*batch(np.random.default_rng(0), 1))
    numbers, counts = metric.counts()
    assert numbers.tolist() == [0]
    assert len(counts) == 1
