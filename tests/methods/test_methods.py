"""What every method must keep: clients are isolated, costs are stated, weights round-trip."""

import gc
import re
from functools import partial

import pytest
import torch
import yaml
from hydra.utils import get_object, instantiate
from torch import nn

from iciia_exp.config.check import identity
from iciia_exp.config.paths import CONF_DIR
from iciia_exp.cost import count_macs
from iciia_exp.data.batches import ClientBatch
from iciia_exp.errors import ConfigError
from iciia_exp.methods.adapt.heads import BackboneOnly, LinearHead
from iciia_exp.methods.adapt.iciia import IciiaMethod
from iciia_exp.methods.adapt.stream import StreamMethod
from iciia_exp.methods.base import Facts, Method
from tests.making.cloud import ARRAYS, Network, no_fit, small_cloud

D, K = 32, 5
FILES = sorted((CONF_DIR / "method").glob("*.yaml"))
#: those that answer the partition's clients only, that train in rounds, or that route, have tests of their own
BY_CLIENT = {path.stem for path in FILES if re.search("methods.(tune|cotrain|route)[.]", path.read_text())}


def make(path, layers=2):
    text = (
        path.read_text()
        .replace("${num_layers}", str(layers))
        .replace("${groups}", "4")
        .replace("${heads}", "2")
        .replace("${seed}", "0")
    )
    node = yaml.safe_load(re.sub(r"epochs: \d{2,}", "epochs: 2", text))
    facts = Facts.of(nn.Linear(D, K), arrays=ARRAYS, network=partial(Network, D))
    method = instantiate(node, facts=facts, _convert_="all").eval()
    cloud = small_cloud(D, K)
    if isinstance(method, StreamMethod):
        method.prepare(cloud.view, no_fit)
        method.eval()
    else:
        method.learn(cloud.view, no_fit)
    if isinstance(method, StreamMethod):  # as after training: a correction of nothing would hide errors
        nn.init.normal_(method.encoder.model.classifier.weight)
        nn.init.normal_(method.gate.weight)
        nn.init.normal_(method.log_anchor, std=0.1)
    return method


@pytest.fixture(params=[f for f in FILES if f.stem not in BY_CLIENT], ids=lambda p: p.stem)
def path(request):
    return request.param


@pytest.fixture
def method(path):
    torch.manual_seed(0)
    return make(path)


def test_each_client_equals_running_it_alone(method):
    lengths = [1, 3, 16, 7]
    clients = [torch.randn(n, D) for n in lengths]
    x_CSD = torch.full((4, 16, D), 1e3)  # padding with values that would show
    mask_CS = torch.zeros(4, 16, dtype=torch.bool)
    for c, x in enumerate(clients):
        x_CSD[c, : len(x)], mask_CS[c, : len(x)] = x, True
    together = method(x_CSD, mask_CS)
    assert together.shape == (4, 16, K)
    for c, x in enumerate(clients):
        torch.testing.assert_close(together[c, : len(x)], method(x[None])[0], atol=1e-5, rtol=1e-5)


def test_cost_is_stated_and_agrees_with_the_counter(method, monkeypatch):
    # groups that are joined for speed multiply zeros too, which is not in the cost
    monkeypatch.setattr("iciia_exp.models.grouped._JOINED_VECTORS", 1000)
    counted = count_macs(method, torch.randn(1, 16, D)) - 16 * D * K  # less the backbone's classifier
    assert method.macs(16) == counted
    streaming = method.streaming_macs(16)
    assert streaming is None or 0 <= streaming <= method.macs(16)
    assert method.num_parameters() >= 0


class OneMore(nn.Module):
    """A method's step as a network's forward pass."""

    def __init__(self, method):
        super().__init__()
        self.forward = method.step


def test_cost_of_one_more_image_agrees_with_the_counter(method, monkeypatch):
    monkeypatch.setattr("iciia_exp.models.grouped._JOINED_VECTORS", 1000)
    counted = count_macs(OneMore(method), torch.randn(1, D), torch.randn(1, 15, method.state_width)) - D * K
    assert method.streaming_macs(16) in (None, counted)


@pytest.mark.slow
def test_one_more_image_is_a_program_without_breaks(method):
    past, mask = torch.empty(1, 0, method.state_width), torch.tensor([[True, True, False]])
    torch._dynamo.reset()
    step = torch.compile(OneMore(method), dynamic=False, fullgraph=True, backend="eager")
    with torch.inference_mode():
        for _ in range(3):
            past = torch.cat([past, method.step(torch.randn(1, D), past)[1].unsqueeze(1)], 1)
        x = torch.randn(1, D)
        for got, want in zip(step(x, past, mask), method.step(x, past, mask), strict=True):
            torch.testing.assert_close(got, want)


def test_weights_round_trip(method, path):
    again = make(path)
    again.load_state_dict(method.state_dict())
    x = torch.randn(2, 5, D)
    torch.testing.assert_close(again(x), method(x))


def test_loss_ignores_padding(method):
    if not method.trainable:
        pytest.skip("is not trained by gradients")
    x, y = torch.randn(2, 4, D), torch.randint(0, K, (2, 4))
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    batch = ClientBatch(x, y, mask, torch.arange(2))
    other = batch._replace(x_CSD=torch.where(mask[..., None], x, 1e3), y_CS=torch.where(mask, y, 0))
    torch.testing.assert_close(method.training_loss(batch), method.training_loss(other))
    logits = (method.stream if isinstance(method, StreamMethod) else method)(x, mask)
    torch.testing.assert_close(method.training_loss(batch), nn.functional.cross_entropy(logits[mask], y[mask]))


def test_names_are_those_of_their_files(method):
    assert method.name in {f.stem for f in FILES}


def test_a_class_of_the_user_s_without_a_name_has_its_own():
    class Nameless(IciiaMethod):
        pass

    class Named(IciiaMethod):
        name = "mine"

    assert Nameless.name == "Nameless"
    assert identity(Nameless).startswith("tests.methods.test_methods.")  # its whole path
    assert (Named.name, identity(Named)) == ("mine", "tests:mine")
    assert identity(IciiaMethod) == IciiaMethod.name == "iciia"


def test_a_method_without_a_cost_cannot_exist():
    class Free(Method):
        def forward(self, x_CSD, mask_CS=None):
            return x_CSD

    with pytest.raises(TypeError, match="budget"):
        Free()


def test_mixed_precision_trains(method):
    if not method.trainable:
        return
    (batch,) = small_cloud(D, K).chunks("train")
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.train().training_loss(batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_baselines_start_from_the_backbone_s_head():
    head = nn.Linear(D, K)
    x = torch.randn(2, 3, D)
    for kind in (BackboneOnly, LinearHead):
        torch.testing.assert_close(kind(Facts.of(head))(x), head(x))
    assert not any(p.requires_grad for p in BackboneOnly(Facts.of(head)).parameters())
    assert all(p.requires_grad for p in LinearHead(Facts.of(head)).parameters())


@pytest.mark.parametrize(
    ("key", "value"), [("groups", 3), ("heads", 0), ("groups", "all"), ("heads", "max"), ("groups", True)]
)
def test_iciia_lists_the_divisors(key, value):
    with pytest.raises(ConfigError, match="valid: 1, 2, 4, 8, 16, 32"):
        IciiaMethod.canonical({key: value}, D)


def test_iciia_one_form_per_run():
    assert IciiaMethod.canonical({"groups": "max"}, D) == IciiaMethod.canonical({"groups": D}, D)
    base = {"groups": 1, "heads": 4}
    assert IciiaMethod.canonical(base | {"shuffle": False}, D) == IciiaMethod.canonical(base | {"shuffle": True}, D)
    grouped = {"groups": 2, "heads": 4}
    assert IciiaMethod.canonical(grouped | {"shuffle": False}, D)["shuffle"] is False


@pytest.mark.parametrize(
    ("layers", "attention", "width"), [(1, "full", 2 * D), (2, "full", D), (1, "causal", 2 * D), (3, "causal", 6 * D)]
)
def test_steps_equal_the_whole_sequence(layers, attention, width):
    method = IciiaMethod(Facts.of(nn.Linear(D, K)), num_layers=layers, heads=2, groups=4, attention=attention).eval()
    x, past = torch.randn(3, 6, D), torch.empty(3, 0, width)
    assert method.state_width == width
    assert method.state_bytes(5) == 20 * width
    for n in range(6):
        logits, own = method.step(x[:, n], past)
        past = torch.cat([past, own[:, None]], 1)
        torch.testing.assert_close(logits, method(x[:, : n + 1])[:, -1], atol=1e-5, rtol=1e-5)
    # with a mask: one client has a shorter past
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 2:] = False
    logits, _ = method.step(x[:, 0], past, mask)
    torch.testing.assert_close(logits[1], method.step(x[1:2, 0], past[1:2, :2])[0][0], atol=1e-5, rtol=1e-5)


def test_what_a_method_keeps_of_an_image(method):
    x, past = torch.randn(2, 4, D), torch.empty(2, 0, method.state_width)
    whole = method.stream(x) if method.causal else method(x)
    for n in range(4):
        logits, own = method.step(x[:, n], past)
        assert own.shape == (2, method.state_width)
        past = torch.cat([past, own[:, None]], 1)
        if method.causal or n == 3:
            torch.testing.assert_close(logits, whole[:, n], atol=1e-5, rtol=1e-5)


def test_streaming_needs_one_layer_or_causal_attention():
    head = nn.Linear(D, K)
    causal = IciiaMethod(Facts.of(head), num_layers=2, heads=2, groups=4, attention="causal")
    assert causal.streaming_macs(16) == 2 * (6 * D * D // 4 + 2 * 16 * D)
    assert (
        IciiaMethod(Facts.of(head), num_layers=1, heads=2, groups=4).streaming_macs(16) == 6 * D * D // 4 + 2 * 16 * D
    )
    assert IciiaMethod(Facts.of(head), num_layers=2, heads=2, groups=4).streaming_macs(16) is None


def classes_of(base):
    """Yield all classes of the package below a base."""
    for kind in base.__subclasses__():
        if kind.__module__.startswith("iciia_exp."):
            yield kind
            yield from classes_of(kind)


def test_a_class_is_an_interface_or_a_leaf():
    for path in FILES:
        get_object(yaml.safe_load(path.read_text())["_target_"])
    gc.collect()  # classes that other tests have made
    named = {kind for kind in classes_of(Method) if "name" in vars(kind)}
    assert {kind.name for kind in named} == {path.stem for path in FILES}
    for kind in named:
        assert not list(classes_of(kind)), kind


def test_the_interface_stays_small():
    members = [name for name in vars(Method) if not name.startswith("_")]
    members += [name for name in Method.__annotations__ if name not in members]
    assert len(members) <= 15, members


def test_facts_have_the_shapes_of_the_stored_arrays():
    head = nn.Linear(D, K)
    assert Facts.of(head).arrays == {"features": (D,)}
    assert Facts.of(head, arrays={"tokens": (5, 3)}).arrays == {"features": (D,), "tokens": (5, 3)}
