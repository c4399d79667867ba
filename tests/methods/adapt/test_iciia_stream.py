"""ICIIA for streams, against its equations written as a loop."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from iciia_exp.data.batches import ClientBatch
from iciia_exp.errors import ConfigError
from iciia_exp.methods.adapt.client_prior import ClientPrior
from iciia_exp.methods.adapt.iciia_prior import IciiaPrior
from iciia_exp.methods.adapt.iciia_stream import IciiaStream
from iciia_exp.methods.adapt.image_classifier import ImageClassifier
from iciia_exp.methods.adapt.stream import KNOTS
from iciia_exp.methods.adapt.stream_encoder import StreamEncoder
from iciia_exp.methods.base import Facts
from iciia_exp.tasks import MULTI_LABEL
from tests.making.cloud import no_fit, plain_fit, small_cloud

D, K = 16, 5


def build(task="single-label", num_layers=1, perceptron=0, kind=IciiaStream):
    encoder = partial(StreamEncoder, num_layers=num_layers, heads=2, groups=4)
    return kind(Facts.of(nn.Linear(D, K), task), encoder, image=partial(ImageClassifier, perceptron=perceptron))


def make(seed=0, task="single-label", perceptron=0):
    torch.manual_seed(seed)
    method = build(task, num_layers=2, perceptron=perceptron).eval()
    if perceptron:
        method.image.ensemble_weight.copy_(torch.tensor([0.7, 0.4]))
        method.image.known_classes[0] = False
    for name, parameter in method.named_parameters():
        if not name.startswith(("image.head", "encoder.model.layers")):
            nn.init.normal_(parameter, std=0.3)
    return method.requires_grad_(False)


def at(table, n):
    """Interpolate a table of the knots, linear in log(1 + n)."""
    right = next((i for i, knot in enumerate(KNOTS) if knot >= n), len(KNOTS) - 1)
    if KNOTS[right] <= n:
        return table[right]
    low, high = math.log1p(KNOTS[right - 1]), math.log1p(KNOTS[right])
    share = (math.log1p(n) - low) / (high - low)
    return (1 - share) * table[right - 1] + share * table[right]


def by_equation(method, x_D, past_PD, encoded_PD):
    """Return the logits of one image by the module's docstring."""

    def classify(x):
        b = method.image.head(x)
        if method.image.perceptron is None:
            return b
        both = 0.7 * b + 0.4 * method.image.perceptron(x)
        if (
            method.task != MULTI_LABEL
        ):  # among the classes that it knows; those have the odds against the others that b says
            both = both[..., 1:].log_softmax(-1) + b[..., 1:].logsumexp(-1, keepdim=True)
            return torch.cat([b[..., :1], both], -1)
        return torch.cat([b[..., :1], both[..., 1:]], -1)

    n, b = len(past_PD), classify(x_D)
    if n == 0:
        return at(method.log_anchor, 0).exp() * b
    logits = classify(past_PD) * method.log_sharpness.exp()
    p_PK = logits.sigmoid() if method.task == MULTI_LABEL else logits.softmax(-1)
    m = encoded_PD.mean(0)
    sure = sum(p @ p for p in p_PK) / n
    pairs = [p @ q for i, p in enumerate(p_PK) for j, q in enumerate(p_PK) if i != j]
    same = sum(pairs) / max(1, len(pairs)) if pairs else torch.zeros(())
    same, sure = (same + 1e-3).log(), (sure + 1e-3).log()
    likeness = method.likeness(torch.stack([same, sure, same - sure, torch.tensor(math.log1p(n))]))
    trust, weight, more = method.gate(m) + likeness
    even = nn.functional.softplus(method.even_images + more) + 1e-3
    if method.task == MULTI_LABEL:
        pi = (p_PK.sum(0) + even / 2) / (n + even)
        prior = (pi / (1 - pi)).log()
    else:
        prior = ((p_PK.sum(0) + even / K) / (n + even)).log()
    learned = 2 * trust.sigmoid() * method.encoder.model.classifier(m)
    correction = learned + at(method.prior_weight, n) * 2 * weight.sigmoid() * prior
    return at(method.log_anchor, n).exp() * b + at(method.log_correction, n).exp() * correction


@pytest.mark.parametrize("perceptron", [0, 8])
@pytest.mark.parametrize("task", ["single-label", MULTI_LABEL])
def test_the_equations(task, perceptron):
    method, x = make(task=task, perceptron=perceptron), torch.randn(9, D)
    encoded = method.encoder(x[None])[0]
    stream = method.stream(x[None])[0]
    whole = method(x[None])[0]
    for n in range(9):
        torch.testing.assert_close(stream[n], by_equation(method, x[n], x[:n], encoded[:n]), atol=1e-5, rtol=1e-5)
        others = [i for i in range(9) if i != n]
        want = by_equation(method, x[n], x[others], encoded[others])
        torch.testing.assert_close(whole[n], want, atol=1e-5, rtol=1e-5)


def test_without_a_past_the_answer_is_the_backbone_s():
    method, x = make(), torch.randn(20, 1, D)
    assert (method.stream(x).argmax(-1) == method.image(x).argmax(-1)).all()
    fresh = build().eval()
    torch.testing.assert_close(fresh.stream(x), fresh.image.head(x))


def test_the_backbone_s_classifier_is_not_trained():
    method = build(num_layers=2).train()
    for _ in range(2):
        x, y, mask = torch.randn(4, 6, D), torch.randint(0, K, (4, 6)), torch.ones(4, 6, dtype=torch.bool)
        method.encoder.model.classifier.weight.data.normal_()
        method.gate.weight.data.normal_()
        method.training_loss(ClientBatch(x, y, mask, torch.arange(4))).backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == name.startswith("image.head."), name


@pytest.mark.parametrize("kind", [IciiaStream, IciiaPrior])
def test_the_per_image_classifier_is_of_the_clients_images(kind):
    torch.manual_seed(0)
    cloud = small_cloud(D, K)  # the head has seen none of them
    method = build(perceptron=32, kind=kind)
    method.prepare(cloud.view, plain_fit(cloud.view))
    assert method.training
    x, y = (torch.cat([b[i][b.mask_CS] for b in cloud.chunks("test")]) for i in (0, 1))
    assert torch.equal(method.image(x), method.image.head(x))  # what training sees
    method.eval()
    right = [float((logits.argmax(-1) == y).float().mean()) for logits in (method.image.head(x), method.image(x))]
    assert right[1] > right[0] + 0.2
    torch.testing.assert_close(method.stream(x[:, None]).argmax(-1)[:, 0], method.image(x).argmax(-1))
    if kind is IciiaPrior:  # calibrated for the logits of both classifiers
        prior = ClientPrior(Facts.of(method.image.head))
        prior.calibrate(method.image, list(cloud.chunks("val")))
        torch.testing.assert_close(prior.calibrator.bias, method.prior.calibrator.bias)
    else:
        assert method.macs(16) - build(kind=kind).macs(16) == 16 * 32 * (D + K)


def test_a_class_without_images_keeps_what_the_backbone_says_of_it():
    method, x = make(perceptron=8), torch.randn(50, D)
    b, both = method.image.head(x).softmax(-1), method.image(x).softmax(-1)
    torch.testing.assert_close(both[:, 0], b[:, 0])
    assert not torch.allclose(both, b)
    cloud = small_cloud(D, K)
    cloud.batches.labels[cloud.batches.labels == 2] = 3
    method.prepare(cloud.view, no_fit)
    assert method.image.known_classes.tolist() == [True, True, False, True, True]


def test_the_per_image_classifier_is_not_trained_with_the_module():
    method = make(perceptron=8).train()
    method.requires_grad_(True)
    x, y, mask = torch.randn(4, 6, D), torch.randint(0, K, (4, 6)), torch.ones(4, 6, dtype=torch.bool)
    method.training_loss(ClientBatch(x, y, mask, torch.arange(4))).backward()
    assert all(p.grad is None for p in method.image.perceptron.parameters())


def test_a_width_that_is_none_is_named():
    with pytest.raises(ConfigError, match=r"^image.perceptron=-1: must be a whole number of 0 to 65536"):
        build(perceptron=-1)


def batch(seed, y=None, images=7):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, images, D, generator=generator)
    y = torch.randint(0, K, (32, images), generator=generator) if y is None else y(x)
    mask = torch.rand(32, images, generator=generator) < 0.9
    return ClientBatch(x, y, mask, torch.arange(32))


def val_loss(method, batches):
    losses = [method.task.log_loss(method.stream(b.x_CSD, b.mask_CS)[b.mask_CS], b.y_CS[b.mask_CS]) for b in batches]
    return float(torch.cat(losses).mean())


def test_what_helps_nobody_is_turned_off():
    # labels are the backbone's own answers: its logits should count more, the correction not at all
    method = make()
    batches = [batch(s, lambda x: method.image.head(x).argmax(-1)) for s in range(8)]
    before = val_loss(method, batches)
    record = method.calibrate(iter(batches))
    after = val_loss(method, batches)
    assert after < 0.6 * before
    assert record["log_loss"] == pytest.approx(after, abs=1e-3)
    assert record["log_loss_before"] == pytest.approx(before, abs=1e-3)
    assert record["history"] == [0, 1, 2, 3, 5]
    assert min(record["anchor"]) > 2
    assert max(c / a for c, a in zip(record["correction"][1:], record["anchor"][1:], strict=True)) < 0.3


def test_longer_pasts_than_were_seen_count_as_the_longest():
    method = make()
    method.calibrate([batch(0)])
    assert int(method.longest) == 6
    for n in (6, 9, 400):
        assert method._at(method.log_anchor, torch.tensor([float(n)]))[0] == method._at(
            method.log_anchor, torch.tensor([6.0])
        )
    assert method.stream(torch.randn(1, 300, D)).isfinite().all()


def test_calibration_of_a_multi_label_task_and_of_nobody():
    method = make(task=MULTI_LABEL)
    some = batch(0)
    some = some._replace(y_CS=(torch.rand(32, 7, K) < 0.3).to(torch.uint8))
    record = method.calibrate([some])
    assert record["log_loss"] < record["log_loss_before"]
    assert method.calibrate([]) == {}


def test_values_are_checked():
    with pytest.raises(ConfigError, match=r"^encoder.feature_dropout=1.0"):
        IciiaStream(Facts.of(nn.Linear(D, K)), partial(StreamEncoder, feature_dropout=1.0))
    with pytest.raises(ConfigError, match=r"^encoder.groups=3"):
        IciiaStream.canonical({"encoder": {"groups": 3}}, D)
