"""Labels, policies, measures and the mixture against vectors of the formulas, and the policies' promises."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.stats import beta

from iciia_exp.errors import ConfigError
from iciia_exp.methods.route.labels import compare_pair, labels_of, pareto_superiority, relative_superiority
from iciia_exp.methods.route.policy import calibrated_threshold, published_threshold, share_interval
from iciia_exp.models.token_router import TokenMixture, TokenRouter
from iciia_exp.results.routing import area, delta_p, random_delta_p, route_curve, saved, to_cloud, win_rate


@pytest.fixture
def vectors(reference):
    with safe_open(reference / "miet_route_formula_vectors.safetensors", "pt") as opened:
        yield lambda name: opened.get_tensor(name)


@pytest.mark.parametrize("case", [0, 1])
def test_labels_and_thresholds(vectors, case):
    q_edge, q_cloud, w, gamma, mu_edge, mu_cloud = (
        vectors(f"route_labels{case}/{name}") for name in ("q_edge", "q_cloud", "w", "gamma", "mu_edge", "mu_cloud")
    )
    quality = torch.stack([q_edge, q_cloud], 1)
    d = labels_of(quality, torch.stack([mu_edge, mu_cloud]), float(gamma), "quality")
    torch.testing.assert_close(d, vectors(f"route_labels{case}/D"), atol=1e-9, rtol=0)
    one = relative_superiority(q_edge.mean(1), q_cloud.mean(1), mu_edge, mu_cloud, float(gamma))
    torch.testing.assert_close(one, d)
    prs = pareto_superiority(d, w)
    torch.testing.assert_close(prs, vectors(f"route_labels{case}/prs"), atol=1e-9, rtol=0)
    half = len(prs) // 2
    reference, new = prs[:half].numpy(), prs[half:].numpy()
    mean = quality[half:].mean(2).numpy()
    for number, rho in enumerate(vectors(f"route_labels{case}/rho").tolist()):
        expected = {
            name: float(vectors(f"route_labels{case}/{name}")[number])
            for name in ("alpha_reference", "alpha_calibrated", "share_reference", "share_calibrated")
        }
        alphas = published_threshold(reference, rho), calibrated_threshold(reference, rho)
        assert alphas == pytest.approx((expected["alpha_reference"], expected["alpha_calibrated"]), abs=1e-9)
        shares = [(new < alpha).mean() for alpha in alphas]
        assert shares == pytest.approx([expected["share_reference"], expected["share_calibrated"]])
        free = new < calibrated_threshold(reference, rho, cap=None)
        assert free.mean() == pytest.approx(float(vectors(f"route_labels{case}/share_calibrated_uncapped")[number]))
        gained = float(vectors(f"route_labels{case}/delta_p_calibrated_uncapped")[number])
        assert delta_p(mean, free) == pytest.approx(gained, abs=1e-6)


@pytest.mark.parametrize("case", [0, 1])
def test_the_mixture(vectors, case):
    own = {
        name: vectors(f"router{case}/{name}") for name in ("E", "P_pos", "P_neg", "S", "head_w", "head_b", "metric_w")
    }
    k, d, rank = own["P_pos"].shape
    mixture = TokenMixture(d, k, rank, own["S"].shape[-1])
    names = {"experts": "E", "positive": "P_pos", "negative": "P_neg", "up": "S"}
    names |= {"head_weight": "head_w", "head_bias": "head_b"}
    mixture.load_state_dict({name: own[source] for name, source in names.items()})
    mask = vectors(f"router{case}/mask").bool()
    found = mixture(vectors(f"router{case}/tokens"), mask)
    affinity = vectors(f"router{case}/affinity")
    torch.testing.assert_close(found.affinity_Bnk, affinity * mask.unsqueeze(-1), atol=1e-5, rtol=0)
    assert torch.equal(found.selected_Bkn, vectors(f"router{case}/selected").bool())
    torch.testing.assert_close(found.r_Bkh, vectors(f"router{case}/r"), atol=1e-5, rtol=0)
    d_hat = found.logits_Bk.sigmoid()
    torch.testing.assert_close(d_hat, vectors(f"router{case}/D_hat"), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        pareto_superiority(d_hat, own["metric_w"]), vectors(f"router{case}/prs_hat"), atol=1e-5, rtol=0
    )


def test_padding_changes_nothing():
    torch.manual_seed(0)
    router = TokenRouter(8, 3).eval()
    tokens = torch.randn(2, 5, 8)
    padded = torch.cat([tokens, torch.zeros(2, 4, 8)], 1)
    torch.testing.assert_close(router(padded), router(tokens), atol=1e-5, rtol=1e-4)
    assert router(torch.zeros(1, 4, 8)).isfinite().all()  # no word that the encoder knows


@pytest.mark.parametrize("options", [{}, {"select": False}, {"gates": 1}])
def test_sizes_and_costs(options):
    router = TokenRouter(64, 10, **options)
    one = 16_640 + 128 + 640 + 31_370 - (10 * 64 * 16 if options.get("gates") == 1 else 0)
    assert sum(p.numel() for p in router.parameters()) == one
    n, gates = 20, options.get("gates", 2)
    most = n if "select" in options else 4
    assert router.mixture.most(n) == most
    mixture = n * 64 * 10 + 10 * most * gates * (64 * 16 + 16 * 64) + 10 * 64
    assert router.macs(n) == 4 * n * 64**2 + 2 * n**2 * 64 + mixture


def test_a_calibrated_share_of_new_requests_is_as_stated():
    rng = np.random.default_rng(0)
    shares = {"calibrated": [], "published": [], "sure": []}
    for _ in range(2000):
        reference, new = rng.random(39), rng.random(4000)
        for name, alpha in (
            ("calibrated", calibrated_threshold(reference, 0.5, None)),
            ("published", published_threshold(reference, 0.5, None)),
            ("sure", calibrated_threshold(reference, 0.5, None, confidence=0.95)),
        ):
            shares[name].append((new < alpha).mean())
    means = {name: np.mean(found) for name, found in shares.items()}
    assert means["calibrated"] == pytest.approx(0.5, abs=0.006)  # 20 of 40
    assert means["published"] == pytest.approx(0.5, abs=0.006)  # (19 + 1) of 40
    assert np.mean(np.array(shares["sure"]) <= 0.5) >= 0.94
    low, high = beta.ppf([0.025, 0.975], 20, 20)
    found = share_interval(np.sort(reference), calibrated_threshold(reference, 0.5, None))
    assert found == pytest.approx((0.5, low, high))
    inside = np.mean([(low <= share) and (share <= high) for share in shares["calibrated"]])
    assert inside == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("requests", [30, 300])
@pytest.mark.parametrize("cap", [None, 0.3])
def test_the_share_of_new_requests_is_within_its_interval(requests, cap):
    """Also where the threshold is the cap, which is none of the scores."""
    rng, inside = np.random.default_rng(0), []
    for _ in range(500):
        reference, new = rng.random(200), rng.random(requests)
        threshold = calibrated_threshold(reference, 0.5, cap)
        found = share_interval(reference, threshold, requests)
        inside.append(found.low <= (new < threshold).mean() <= found.high)
    assert 0.93 <= np.mean(inside) <= 0.99


def test_the_ends_of_the_budget():
    scores = np.array([0.1, 0.2, 0.3])
    assert calibrated_threshold(scores, 0.0) == -np.inf
    assert calibrated_threshold(scores, 1.0, cap=None) == np.inf
    assert published_threshold(scores, 1.0) == 0.5
    assert published_threshold(scores, 0.0) == 0.1  # strictly below it is nobody
    assert share_interval(scores, -np.inf) == (0, 0, 0)
    assert share_interval(scores, np.inf) == (1, 1, 1)
    capped = share_interval(scores, 0.25)  # no score of its own
    assert capped.expected == pytest.approx(2 / 3)
    assert capped.low < 2 / 3 < capped.high
    for rho in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="share"):
            calibrated_threshold(scores, rho)
    with pytest.raises(ConfigError, match="no reference requests"):
        published_threshold(scores[:0], 0.5)


def test_measures_of_routing():
    rng = np.random.default_rng(0)
    q = rng.random((200, 2, 10))
    q[:, 1] += 0.3
    q[:, 1, 9] -= 0.6  # the cloud is worse in one of ten
    everything = np.ones(200, dtype=bool)
    assert delta_p(q, everything) == pytest.approx(80)
    assert random_delta_p(q, 0.5) == pytest.approx(40)
    assert delta_p(q, ~everything) == 0
    score, prs = rng.random(200), rng.random(200)
    assert win_rate(prs, prs < 0.5) == 1
    assert win_rate(np.full(200, 0.5), everything) == 0.5
    curve = route_curve(score, q, prs, [f"m{i}" for i in range(10)])
    assert curve["delta_p"].iloc[[0, -1]].tolist() == pytest.approx([0, 80])
    assert to_cloud(score, 0.3).sum() == 60
    assert score[to_cloud(score, 0.3)].max() < score[~to_cloud(score, 0.3)].min()
    gain = (q[:, 1] - q[:, 0]) / np.abs((q[:, 1] - q[:, 0]).mean(0))
    best = -gain.mean(1)
    assert area(route_curve(best, q, prs, range(10)), "delta_p") > 3 * abs(area(curve, "delta_p"))
    assert 0.2 < saved(best, q, 40) < 1
    assert np.isnan(saved(best, -q, 40))


def test_metrics_in_which_the_models_do_not_differ_are_not_used():
    rng = np.random.default_rng(0)
    q = rng.normal(0.5, 0.1, (400, 2, 2, 3))
    q[:, 1, :, 1] += 0.05
    q[:, 1, :, 2] -= 0.05
    pair = compare_pair(q, ["same", "better", "worse"])
    assert pair["used"].tolist() == [False, True, True]
    assert pair["difference"].tolist() == pytest.approx([0, 0.05, -0.05], abs=0.02)
    assert pair["standard_error"].to_numpy() == pytest.approx(0.1 / 400**0.5, rel=0.2)
    assert compare_pair(q[:1], ["a", "b", "c"])["used"].tolist() == [False] * 3
