"""The ledger that a link and the operation counter measure on a small cloud equals the stated budget, exactly."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from iciia_exp.config.paths import CONF_DIR
from iciia_exp.cost import count_macs
from iciia_exp.data.batches import ClientBatch
from iciia_exp.ledger import Budget, Line, Link, Sizes, payload_bytes, serve
from iciia_exp.methods.adapt.base import Adaptive
from iciia_exp.methods.adapt.iciia import IciiaMethod
from iciia_exp.methods.base import Ask
from iciia_exp.methods.tune.base import Personal
from iciia_exp.methods.tune.device_network import DeviceNetwork
from iciia_exp.methods.tune.full_finetune import FullFinetune
from iciia_exp.models.payloads import pack
from tests.making.cloud import ARRAYS, no_fit, personalised, small_cloud
from tests.making.config import methods
from tests.methods.test_methods import OneMore, make

D, K, S = 32, 5, 16
METHODS = methods("adapt", "tune")
#: the same with one layer, in place of two
ONE_LAYER = [m for m in methods("adapt") if "${num_layers}" in (CONF_DIR / "method" / f"{m}.yaml").read_text()]
IMAGE, LOGITS = 3 * 8 * 8, 4 * K  # bytes
BACKBONE = nn.Sequential(nn.Flatten(), nn.Linear(IMAGE, D), nn.Linear(D, K))


@pytest.fixture
def method(request, monkeypatch):
    torch.manual_seed(0)
    # groups that are joined for speed multiply zeros too, and Gram matrices replace the passes over D x K weights
    monkeypatch.setattr("iciia_exp.models.grouped._JOINED_VECTORS", 1000)
    monkeypatch.setattr("iciia_exp.models.fit_many.is_plain_linear", lambda *_: False)
    name, *layers = request.param if isinstance(request.param, tuple) else [request.param]
    return make(CONF_DIR / "method" / f"{name}.yaml", *layers)


def ledger(lines):
    """Return MACs and bytes by key, without lines of nothing."""
    sums = {}
    for line in lines:
        macs, size = sums.get(line.key, (0, 0))
        sums[line.key] = macs + line.macs, size + line.bytes
    return {key: numbers for key, numbers in sums.items() if any(numbers)}


def of_request(method, together):
    """Measure the MACs of a method in a request, those of the backbone's classifier left out."""
    if isinstance(method, Personal):

        def count(images):
            arrays = {name: torch.randn(1, images, *shape) for name, shape in ARRAYS.items()}
            batch = ClientBatch(torch.randn(1, images, D), None, None, torch.zeros(1, dtype=torch.int64), arrays=arrays)
            with FlopCounterMode(display=False) as counter:
                method.logits(batch)
            replaced = 0 if isinstance(method, DeviceNetwork) else images * D * K  # the backbone's classifier
            return counter.get_total_flops() // 2 - replaced

        return count(S) if together else count(S) - count(S - 1), "method"
    if together:
        return count_macs(method, torch.randn(1, S, D)) - S * D * K, "method"
    counted = count_macs(OneMore(method), torch.randn(1, D), torch.randn(1, S - 1, method.state_width))
    if method.streaming_macs(S) is None:  # all images again, which ICIIA does not classify again
        return counted - (1 if isinstance(method, IciiaMethod) else S) * D * K, "recomputation"
    return counted - D * K, "method"


def play(method, site, together, budget):
    """Play the serving of one client and one request; return what was measured as lines."""
    link, images = Link(method.name, budget), torch.zeros(S if together else 1, 3, 8, 8, dtype=torch.uint8)
    if isinstance(method, FullFinetune):  # everything is in the cloud
        link.up("images", images, phase="request")
        link.down("logits", torch.zeros(len(images), method.classes), phase="request")
        macs, classifier = of_request(method, together)[0], len(images) * D * method.classes
        own = (
            Line("request", "cloud", "backbone", macs=macs - classifier),
            Line("request", "cloud", "method", macs=classifier),
        )
        return [*link.lines(), *own]
    if isinstance(method, DeviceNetwork):  # the backbone is in the cloud, the network on the device
        link.up("images", images, phase="request")
        kind = "features" if method.array == "features" else "tokens"
        link.down(kind, pack(torch.zeros(len(images), *method.shape), method.sent), phase="request")
        if weights := method.payload():
            link.down("weights", weights)
        backbone = Line("request", "cloud", "backbone", macs=count_macs(BACKBONE, images.float()))
        return [*link.lines(), backbone, Line("request", "device", "method", macs=of_request(method, together)[0])]
    if site == "device":
        link.down("weights", BACKBONE.state_dict(), what="backbone")
        link.down("weights", method.payload())
    else:
        link.up("images", images, phase="request", what="backbone")
        link.down("logits", torch.zeros(len(images), K), phase="request")
    macs, what = of_request(method, together)
    backbone = count_macs(BACKBONE, images.float())
    return [*link.lines(), Line("request", site, "backbone", macs=backbone), Line("request", site, what, macs=macs)]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("site", ["device", "cloud"])
@pytest.mark.parametrize("method", [*METHODS, *((name, 1) for name in ONE_LAYER)], indirect=True, ids=str)
def test_a_request_costs_what_the_budget_states(method, site, together):
    if isinstance(method, Personal):
        if site == "cloud":
            pytest.skip("its states are on the devices")
        personalised(method, small_cloud(D, K))
    sizes = Sizes(
        S, together, site, count_macs(BACKBONE, torch.zeros(1, IMAGE)), payload_bytes(BACKBONE.state_dict()), IMAGE
    )
    budget = method.budget(sizes)
    once = ("features", "labels", "states")
    stated = [
        line for line in budget.lines if line.what != "training" and (line.phase == "request" or line.kind not in once)
    ]
    stated = [line for line in stated if (line.phase, line.site) != ("client_once", "device")]
    assert ledger(play(method, site, together, budget)) == ledger(stated)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, indirect=True)
def test_a_client_costs_what_the_budget_states(method):
    cloud = small_cloud(D, K, clients=3, images=20)
    if not isinstance(method, Personal):
        assert not [
            line for line in method.budget(Sizes()).lines if (line.phase, line.site) == ("client_once", "device")
        ]
        return
    if Ask.CLOUD_SAMPLES in method.asks:  # it counts the clients
        method.learn(cloud.view, no_fit)
    for client in range(3):
        link = Link(method.name, method.budget(Sizes()))
        with FlopCounterMode(display=False) as counter:
            learned = method.personalise(cloud.devices.own(np.array([client])), link, cloud.view)
        counts = {name: int(learned.counts.get(name, [0])[0]) for name in ("received", "passed")}
        sizes = Sizes(train=20, val=20, epochs=int(learned.epochs_C[0]), **counts, backbone_macs=0, image_bytes=0)
        stated = [line for line in method.budget(sizes).lines if line.phase == "client_once" and line.kind != "weights"]
        assert ledger(link.lines()) == ledger([line for line in stated if line.kind])
        assert counter.get_total_flops() // 2 == sum(line.macs for line in stated)


@pytest.mark.parametrize("method", METHODS, indirect=True)
def test_the_state_is_as_large_as_stated(method):
    state = method.budget(Sizes(S)).state_bytes
    if isinstance(method, Personal):
        personalised(method, small_cloud(D, K))
        assert state == payload_bytes(method.states_of(torch.tensor([0])))
    else:
        assert isinstance(method, Adaptive)
        assert state == 4 * (S - 1) * method.state_width


def test_a_payload_that_is_not_in_the_budget_is_refused():
    link = Link("leaky", Budget((Line("client_once", "device", "training", kind="features"),), 0))
    features = torch.zeros(3, 2)
    assert link.up("features", features, what="training") is features
    with pytest.raises(
        PermissionError, match=r"leaky: may not send labels of the training from the device to the cloud"
    ):
        link.up("labels", torch.zeros(3), what="training")
    with pytest.raises(PermissionError, match="features .* from the cloud to the device"):
        link.down("features", features, what="training")
    with pytest.raises(ValueError, match="kind='secrets': must be one of None, weights"):
        link.up("secrets", features)
    assert link.lines() == [Line("client_once", "device", "training", kind="features", bytes=24)]


@pytest.mark.parametrize("value", [np.zeros(3), {"a": [torch.zeros(2), "12345678"]}, b"x" * 24, ["é" * 12]])
def test_sizes_of_payloads(value):
    assert payload_bytes(value) == (24 if not isinstance(value, dict) else 16)


def test_a_value_without_a_size_is_refused():
    with pytest.raises(TypeError, match="a int has no size"):
        payload_bytes([1])


def test_unknown_parts_make_a_sum_unknown():
    budget = serve(Sizes(), 10, macs=5, weights=8)
    assert budget.macs("request") is None
    assert budget.bytes("client_once", "cloud") is None
    assert budget.bytes("request", "device") == 0
    assert budget.method_macs() == 5
    known = serve(Sizes(backbone_macs=100, backbone_bytes=50), 10, macs=5, weights=8)
    assert known.macs("request", "device") == 105
    assert known.macs("request", "cloud") == 0
    assert known.bytes("client_once", "cloud") == 58
    assert known.leaves_device() == ()
    assert serve(Sizes(site="cloud", image_bytes=7), 10, macs=5, weights=8).leaves_device() == ("images",)
