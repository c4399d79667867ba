"""Routers of prompts on a small cloud: what they learn, what a request costs, and what they refuse."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from iciia_exp.cost import count_macs
from iciia_exp.data.clients import Ragged
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.ledger import Link, Sizes
from iciia_exp.methods.route.route_t2i import RouteT2I
from tests.making.config import methods
from tests.making.routing import COSTS, PICTURES, PROMPT, TOKENS, WIDTH, cloud_of, fit_of, make, view_of

ROUTERS = [name for name in methods("route") if name != "route_confidence"]


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_better_than_chance(name):
    options = {"rule": "length"} if name == "fixed_router" else {}
    method, test = make(name, **options)
    assert method.weight_K.tolist() == [0.5, 0.5, 0]  # the third metric is the same for both
    assert [row["used"] for row in method.record["pair"]] == [True, True, False]
    score = method.score(test)[0].numpy()
    truth = method.true_superiority(test.arrays["quality"][0]).numpy()
    least = {"fixed_router": -0.3, "oracle_router": 0.999}.get(name, 0.5)
    assert spearmanr(score, truth).statistic > least
    assert len(method.reference_n) == 50
    assert method.payload()["threshold"] == method.threshold()
    assert "reference_n" not in method.payload()
    assert ((method.reference_n < method.threshold(0.3)).float().mean() <= 0.3).item()
    to_cloud = method.to_cloud(test, 0.3)
    assert torch.equal(to_cloud, (method.score(test).double() < method.threshold(0.3)) & test.mask_CS)
    assert method.logits(test).shape == (1, 50, 3)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_request_costs_what_the_budget_states(name, share):
    method, _ = make(name, share=share, learn=False)
    costs = dict(zip(("encoder_macs", "backbone_macs", "cloud_macs", "picture_bytes"), COSTS, strict=True))
    budget = method.budget(Sizes(1, image_bytes=PROMPT, **costs))
    network = getattr(method, "router", getattr(method, "encoder", None))
    text = COSTS[0] if method.reads_text else 0
    counted = text + (0 if network is None else count_macs(network, torch.randn(1, TOKENS, WIDTH)))
    if name == "linear_router":
        counted += TOKENS  # a number of each word
    assert budget.method_macs() == counted
    assert budget.macs("request") == counted + round((1 - share) * COSTS[1]) + round(share * COSTS[2])
    link, requests = Link(name, budget), 10
    for _ in range(round(share * requests)):
        link.up("prompt", bytes(PROMPT), "request")
        link.down("picture", bytes(COSTS[3]), "request")
    sent = {site: sum(size for key, size in link.counted.items() if key[1] == site) for site in ("device", "cloud")}
    assert {site: size / requests for site, size in sent.items()} == {
        "device": budget.bytes("request", "device"),
        "cloud": budget.bytes("request", "cloud"),
    }
    with pytest.raises(PermissionError):
        link.up("picture", bytes(COSTS[3]), "request")
    assert budget.leaves_device() == ("prompt",)


def test_models_that_do_not_differ_are_said():
    with pytest.raises(UserError, match=r"do not differ in any metric .* clarity 0\.\d+ and 0\.\d+"):
        make("route_t2i", gap=0.0)
    with pytest.raises(UserError, match="do not differ in any metric"):
        make("route_t2i", metrics=["same"])


def test_pictures_of_one_colour_are_said(caplog):
    clients, batches = cloud_of()
    batches.arrays["flaws"][3:5, 1] = 1
    method, _ = make("fixed_router", learn=False)
    with caplog.at_level(logging.WARNING):
        method.learn(view_of(clients, batches), None)
    assert "pair: 6 of 420 pictures of the cloud are of one colour" in caplog.text
    assert "of the device" not in caplog.text


def test_one_metric_is_learned_alone():
    method, test = make("route_t2i", metrics=["color"])
    assert method.weight_K.tolist() == [0, 1, 0]
    quality = test.arrays["quality"][0]
    assert torch.equal(method.true_superiority(quality), method.true_labels(quality)[:, 1])


def test_pictures_are_averaged_as_set():
    method, test = make("route_t2i", learn=False)
    method.mu_2K = torch.tensor([[0.5] * 3, [0.8] * 3])
    quality = test.arrays["quality"][0]
    averaged = method.true_labels(quality)
    method.average = "label"
    assert not torch.allclose(averaged, method.true_labels(quality), atol=1e-4)
    same = quality[:, :, :1].expand(-1, -1, PICTURES, -1)
    labels = method.true_labels(same)
    method.average = "quality"
    torch.testing.assert_close(labels, method.true_labels(same))


@pytest.mark.parametrize("options", [{"loss": "squares"}, {"loss": "superiority"}, {"select": False}, {"gates": 1}])
def test_ablations_learn(options):
    method, test = make("route_t2i", **options)
    truth = method.true_superiority(test.arrays["quality"][0]).numpy()
    assert spearmanr(method.score(test)[0].numpy(), truth).statistic > 0.5


def test_hybrid_llm_labels_are_probabilities_over_pictures():
    method, test = make("hybrid_llm", kind="prob")
    assert float(method.relax) == 0
    quality = test.arrays["quality"][0][:3]
    mean = method.mean_quality(quality).numpy()
    expected = [np.mean([edge >= cloud for edge in m[0] for cloud in m[1]]) for m in mean]
    assert method._label(quality, 0.0).tolist() == pytest.approx(expected)
    assert float(make("hybrid_llm", kind="trans")[0].relax) > 0


def test_everything_to_one_side():
    for rule, expected in (("edge", False), ("cloud", True)):
        method, test = make("fixed_router", rule=rule)
        assert (method.to_cloud(test) == expected).all()
        assert method.interval().expected == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, "share=1.5"),
        ({"share": -0.1}, "share=-0.1"),
        ({"metrics": ["sharp"]}, "metrics=sharp: must be among clarity, color, same"),
        ({"metrics": []}, "must name at least one"),
        ({"gamma": 0.0}, "gamma=0"),
        ({"heads": 3}, "heads=3: must divide the width of a token, 8"),
        ({"policy": "published", "confidence": 0.9}, "is of the calibrated policy"),
        ({"labels": "both"}, "labels=both"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(Exception) as error:  # noqa: PT011  # Hydra's, around ours
        make("route_t2i", learn=False, **options)
    assert isinstance(error.value.__cause__, ConfigError)
    assert message in str(error.value.__cause__)


def test_a_router_without_val_prompts_is_refused():
    method, _ = make("route_t2i", learn=False)
    clients, batches = cloud_of()
    cloud = view_of(replace(clients, val=Ragged.empty(1)), batches)
    with pytest.raises(UserError, match="has no val requests"):
        method.learn(cloud, fit_of(cloud, 1))


def test_thresholds_survive_saving():
    method, test = make("route_t2i")
    again = make("route_t2i", learn=False)[0]
    again.load_state_dict(method.state_dict())
    assert again.threshold() == method.threshold()
    torch.testing.assert_close(again.score(test), method.score(test))
    assert isinstance(again, RouteT2I)
