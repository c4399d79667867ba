"""Every rival against an independent reference: its paper's equations as plain loops, SciPy, or a case known by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import require_own_labels
from iciia_exp.errors import UserError
from iciia_exp.methods.adapt.arm_cml import ArmCml
from iciia_exp.methods.adapt.calibration import mean_log_loss
from iciia_exp.methods.adapt.client_types import ClientTypesMethod
from iciia_exp.methods.adapt.context_token import ContextToken
from iciia_exp.methods.adapt.encoder import ConvAcrossImages, FeedForward
from iciia_exp.methods.adapt.lame import Lame
from iciia_exp.methods.adapt.prior_em import PriorEM, PriorMAP
from iciia_exp.methods.adapt.smoothed_prior import SmoothedPrior
from iciia_exp.methods.adapt.stata import StatA
from iciia_exp.methods.adapt.t3a import T3A
from iciia_exp.methods.base import Ask, Facts
from iciia_exp.methods.tune.finetune import FineTune
from iciia_exp.methods.tune.oracle_classes import OracleClasses
from iciia_exp.methods.tune.prompt_tuning import PromptTuning
from iciia_exp.models.mixers import TokenMixer
from tests.making.cloud import D, K, S, no_fit, small_cloud, studied

# ---- graphs and features


def test_lame_against_a_loop(head, x):
    method = Lame(Facts.of(head), neighbours=2, iterations=5)
    log_p = head(x).log_softmax(-1)
    y = log_p.softmax(-1)
    unit = F.normalize(x, dim=-1)
    for _ in range(5):
        new = []
        for i in range(S):
            order = sorted((j for j in range(S) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
            new.append((log_p[i] + sum(y[j] for j in order[:2])).softmax(-1))
        y = torch.stack(new)
    torch.testing.assert_close(method(x[None])[0].softmax(-1), y, atol=1e-5, rtol=1e-5)


def test_lame_without_edges_is_the_backbone(head, x):
    torch.testing.assert_close(Lame(Facts.of(head), neighbours=0)(x[None])[0], head(x).log_softmax(-1))
    torch.testing.assert_close(Lame(Facts.of(head))(x[None, :1])[0], head(x[:1]).log_softmax(-1))


def test_lame_has_settled(head, x):
    torch.testing.assert_close(
        Lame(Facts.of(head), iterations=30)(x[None]),
        Lame(Facts.of(head), iterations=100)(x[None]),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("supports", [1, 2, 20])
def test_t3a_against_its_prototypes(head, x, supports):
    method = T3A(Facts.of(head), supports=supports)
    head.requires_grad_(False)

    def entropy(logits):
        return float(torch.distributions.Categorical(logits=logits).entropy())

    own = [(entropy(head(w)), F.normalize(w, dim=0), k) for k, w in enumerate(head.weight)]
    images = [(entropy(head(z)), F.normalize(z, dim=0), int(head(z).argmax())) for z in x]
    prototypes = []
    for k in range(K):
        of_class = sorted((e for e in own + images if e[2] == k), key=lambda e: e[0])[:supports]
        prototypes.append(F.normalize(sum(z for _, z, _ in of_class), dim=0))
    torch.testing.assert_close(method(x[None])[0], x @ torch.stack(prototypes).T, atol=1e-5, rtol=1e-5)


def test_t3a_fits_its_scale(head):
    method, cloud = studied(T3A(Facts.of(head)))
    batches = list(cloud.chunks("val"))
    fitted = mean_log_loss(method.task, method.logits, batches)
    method.log_scale += 0.1
    assert fitted < mean_log_loss(method.task, method.logits, batches)
    method.log_scale -= 0.2
    assert fitted < mean_log_loss(method.task, method.logits, batches)


def test_stata_against_explicit_means(head, x):
    method, cloud = studied(StatA(Facts.of(head), neighbours=2, iterations=3, steps=2, anchor=0.7, sharpness=0.05))
    f = F.normalize(x, dim=-1).double()
    anchors, variance = method.means.double(), method.variance.double()
    # the anchors are the class means of the training images
    numbers = cloud.clients.train.values
    features = F.normalize(torch.from_numpy(cloud.batches.features[numbers]), dim=-1)
    labels = cloud.batches.labels[numbers]
    torch.testing.assert_close(anchors[2].float(), features[labels == 2].mean(0), atol=1e-5, rtol=1e-4)
    log_p = head(x).log_softmax(-1).double()
    w = torch.zeros(S, S, dtype=torch.float64)
    for i in range(S):
        order = sorted((j for j in range(S) if j != i), key=lambda j: -float(f[i] @ f[j]))
        for j in order[:2]:
            w[i, j] = (f[i] @ f[j]).clamp(min=0)
    z, means, s = log_p.exp(), anchors, variance
    for i in range(3):
        if i:
            n = z.sum(0)
            means = (z.T @ f + 0.7 * anchors) / (n[:, None] + 0.7)
            spread = (z[:, :, None] * (f[:, None] - means) ** 2).sum((0, 1))
            s = (spread + 0.7 * (variance + (anchors - means) ** 2).sum(0)) / (S + 0.7 * K)
        density = -0.5 * ((f[:, None] - means) ** 2 / s).sum(-1)
        for _ in range(2):
            logits = log_p + 0.05 * density + w @ z
            z = logits.softmax(-1)
    torch.testing.assert_close(method(x[None])[0].softmax(-1).double(), z, atol=1e-4, rtol=1e-3)


# ---- trained on client batches


def test_feedforward_sees_no_other_image(head, x):
    method = FeedForward(Facts.of(head), num_layers=2, groups=3).eval()
    torch.testing.assert_close(method(x[None])[0, 2], method(x[None, 2:3])[0, 0])
    # attention's four projections of D x D and their size here
    inner = sum(p.numel() for n, p in method.layers[0].attention.named_parameters() if n.endswith("weight"))
    assert inner == 4 * D * D // 3


def test_convolution_against_conv1d(head, x):
    mixer = ConvAcrossImages(Facts.of(head)).layers[0].attention
    before, own, after = mixer.inner.weight.chunk(3)
    kernel = torch.stack([after, own, before], -1)  # what an image gets from the one before it comes first
    bias_before, bias_own, bias_after = mixer.inner.bias.chunk(3)
    want = F.conv1d(x.T[None], kernel, padding=1)[0].T + bias_own
    want[:-1] += bias_before
    want[1:] += bias_after
    torch.testing.assert_close(mixer(x[None])[0], mixer.out(F.relu(want)), atol=1e-5, rtol=1e-5)


def test_context_token_against_two_token_attention(x):
    torch.manual_seed(0)
    mixer = TokenMixer(D, heads=1)
    token = mixer.token(x.mean(0))
    q, k, v = mixer.qkv(x).chunk(3, -1)
    _, token_k, token_v = mixer.qkv(token).chunk(3, -1)
    for i in range(S):
        weights = (torch.stack([q[i] @ k[i], q[i] @ token_k]) / D**0.5).softmax(0)
        want = mixer.out(weights[0] * v[i] + weights[1] * token_v)
        torch.testing.assert_close(mixer(x[None])[0, i], want, atol=1e-5, rtol=1e-5)


def test_context_token_looks_at_the_client(head, x):
    method = ContextToken(Facts.of(head)).eval()
    assert not torch.allclose(method(x[None])[0, 2], method(x[None, 2:3])[0, 0], atol=1e-3)


@pytest.mark.parametrize("layers", [1, 2])
def test_context_token_step_by_step(head, x, layers):
    method = ContextToken(Facts.of(head), num_layers=layers, heads=2).eval()
    past = torch.stack([x[:-1], x[:-1].flip(0)])
    mask = torch.ones(2, S - 1, dtype=torch.bool)
    mask[1, :2] = False
    logits, kept = method.step(x[-1:].expand(2, D), past, mask)
    torch.testing.assert_close(logits[0], method(x[None])[0, -1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1], method(torch.cat([past[1, 2:], x[-1:]])[None])[0, -1], atol=1e-5, rtol=1e-5)
    assert torch.equal(kept, x[-1:].expand(2, D))


def test_arm_s_context_is_the_mean(head, x):
    method = ArmCml(Facts.of(head), context=4, hidden=5).eval()
    contexts = torch.stack([method.context(z) for z in x])
    for n in range(S):
        mean = contexts[: n + 1].mean(0)
        want = method.classifier(method.inner(torch.cat([x[n], mean])))
        torch.testing.assert_close(method.stream(x[None])[0, n], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(method(x[None])[0, -1], method.stream(x[None])[0, -1])


@pytest.mark.parametrize(
    "kind", [PriorEM, PriorMAP, SmoothedPrior, ClientTypesMethod, Lame, T3A, StatA, FeedForward, ContextToken, ArmCml]
)
def test_the_order_of_a_client_s_images_means_nothing(head, x, kind):
    method, _ = studied(kind(Facts.of(head)))
    order = torch.randperm(S, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(method(x[None])[0, order], method(x[None, order])[0], atol=1e-4, rtol=1e-4)


# ---- methods of the partition's own clients


def test_finetuning_is_sgd_on_every_client_s_images(head):
    method, cloud = studied(
        FineTune(Facts.of(head), lr=0.5, batch_size=3, clip_norm=0.8, epochs=12, patience=2), clients=4
    )
    for client in range(4):
        net = nn.Linear(D, K)
        net.load_state_dict(head.state_dict())
        optimizer = torch.optim.SGD(net.parameters(), 0.5)
        parts = {}
        for role in ("train", "val", "test"):
            rows = cloud.clients[role][client]
            parts[role] = torch.from_numpy(cloud.batches.features[rows]), torch.from_numpy(cloud.batches.labels[rows])
        (x, y), (held, held_y), (test, test_y) = parts.values()
        best, waited, kept = (net(held).argmax(-1) == held_y).float().mean(), 0, net(test)
        for _ in range(12):
            for at in range(0, len(x), 3):
                optimizer.zero_grad()
                F.cross_entropy(net(x[at : at + 3]), y[at : at + 3]).backward()
                nn.utils.clip_grad_norm_(net.parameters(), 0.8)
                optimizer.step()
            now = (net(held).argmax(-1) == held_y).float().mean()
            waited += 1
            if now > best:
                best, waited, kept = now, 0, net(test)
            if waited >= 2:
                break
        rows = torch.from_numpy(cloud.clients.test[client])[None]
        mask = torch.ones(1, len(test), dtype=torch.bool)
        batch = ClientBatch(test[None], test_y[None], mask, torch.tensor([client]), image_CS=rows)
        torch.testing.assert_close(method.logits(batch)[0], kept.detach(), atol=1e-4, rtol=1e-4)


def test_prompt_tuning_by_its_equation(head, x):
    method = PromptTuning(Facts.of(head))
    method.learn(small_cloud(D, K, clients=5).view, no_fit)
    assert method.vectors.shape == (5, D // 2)
    y = torch.zeros(1, S, dtype=torch.int64)
    batch = ClientBatch(x[None], y, torch.ones(1, S, dtype=torch.bool), torch.tensor([3]))
    want = head(x) + method.prompt.weight @ method.vectors[3] + method.prompt.bias
    torch.testing.assert_close(method.logits(batch)[0], want)
    torch.testing.assert_close(method.training_loss(batch), F.cross_entropy(want, y[0]))
    with pytest.raises(UserError, match="client_mix=natural"):
        method.training_loss(batch._replace(client_C=torch.tensor([-1])))


def test_the_oracle_forbids_other_classes(head):
    method, cloud = studied(OracleClasses(Facts.of(head)))
    batch = next(cloud.chunks("test"))
    answers = method.logits(batch).argmax(-1)
    for row, client in enumerate(batch.client_C):
        own = set(cloud.batches.labels[cloud.clients.test[int(client)]])
        assert set(answers[row].tolist()) <= own


@pytest.mark.parametrize("kind", [FineTune, PromptTuning])
def test_they_need_labels_of_the_test_clients(kind):
    cloud = small_cloud(D, K)
    empty = type(cloud.clients.train).from_pairs(np.array([0]), np.array([0]), len(cloud.clients))
    clients = type(cloud.clients)(cloud.clients.ids, cloud.clients.types, empty, cloud.clients.val, cloud.clients.test)
    assert kind.asks == {Ask.CLIENT_LABELS}
    with pytest.raises(UserError, match=rf"{kind.name}: .* 11 of them \(client 1, say\) have none in train"):
        require_own_labels(clients, kind.name)


def test_state_of_a_client_is_stated(head):
    assert PriorEM(Facts.of(head)).state_bytes(15) == 4 * 15 * K
    assert FineTune(Facts.of(head)).state_bytes() == 4 * K * (D + 1)
    assert PromptTuning(Facts.of(head)).state_bytes() == 4 * D // 2
    assert Lame(Facts.of(head)).state_bytes(15) == 4 * 15 * (D + K)


@pytest.mark.parametrize("at_once", [1, 10**3])
def test_states_are_read_for_some_sequences_at_a_time(head, monkeypatch, at_once):
    method, cloud = studied(FineTune(Facts.of(head), epochs=2))
    (batch,) = cloud.chunks("test")
    whole = method.logits(batch)
    asked, states_of = [], method.states_of
    monkeypatch.setattr(method, "states_of", lambda client_C: asked.append(len(client_C)) or states_of(client_C))
    monkeypatch.setattr("iciia_exp.methods.tune.base._AT_ONCE", at_once)
    torch.testing.assert_close(method.logits(batch), whole)
    assert max(asked) == max(1, at_once // method.state_bytes()) < len(batch.client_C)
    assert sum(asked) == len(batch.client_C)
