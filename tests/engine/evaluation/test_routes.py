"""Evaluation of routers of prompts: tables, figures of the results, plots and curves of a report."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from iciia_exp.data.scenes import TRUTHS
from iciia_exp.engine.evaluation.routes import route_counts, route_measures, routes_table
from iciia_exp.report.figures import by_share
from iciia_exp.results import plots
from iciia_exp.results.pictures import draw_routes
from iciia_exp.results.summary import summarise
from tests.making.routing import NAMES, cloud_of, make


@pytest.fixture(scope="module")
def routed():
    method, _ = make("route_t2i", share=0.4)
    clients, batches = cloud_of()
    return method, routes_table(method, clients, batches, 16)


def test_a_line_for_every_test_prompt(routed):
    method, table = routed
    assert len(table) == 50
    assert table["image"].tolist() == list(range(190, 240))
    assert ((table["score"] < method.threshold()) == table["cloud"]).all()
    used = [f"label_{name}" for name in NAMES[:2]]
    assert np.allclose(table["superiority"], table[used].mean(axis=1), atol=1e-6)
    assert spearmanr(table["predicted_color"], table["label_color"]).statistic > 0.4
    assert all(len(prompt.split()) >= 2 for prompt in table["prompt"])


def test_prompts_that_the_better_model_answers_are_counted(routed):
    table = pd.DataFrame({"client": [0, 0, 0, 1], "image": range(4), "score": [0.1, 0.9, 0.2, 0.5]})
    table = table.assign(cloud=[True, False, True, False], superiority=[0.2, 0.8, 0.7, 0.5])
    numbers, counts = route_counts(table)
    assert numbers.tolist() == [0, 1]
    assert counts.method_correct_C.tolist() == [2, 0.5]
    assert counts.backbone_correct_C.tolist() == [2, 0.5]
    assert counts.both_correct_C.tolist() == [1, 0.5]
    found = summarise(route_counts(table, "image")[1])
    assert found["accuracy"] == 2.5 / 4
    assert found["accuracy_low"] < found["accuracy_high"]


def test_figures_of_the_results(routed):
    method, table = routed
    figures, curves = route_measures(method, table)
    assert figures["metrics"] == "clarity, color"
    assert figures["cloud_share"] == table["cloud"].mean()
    assert figures["share_low"] < figures["expected_share"] <= 0.4 < figures["share_high"]
    assert figures["accuracy"] == figures["win_rate"]
    low, high = figures["rank_correlation_low"], figures["rank_correlation_high"]
    assert low < figures["rank_correlation"] < high
    rng, found = np.random.default_rng(1), []
    for _ in range(1000):
        some = table.iloc[rng.integers(len(table), size=len(table))]
        found.append(spearmanr(some["score"], some["superiority"]).statistic)
    assert [low, high] == pytest.approx(np.percentile(found, [2.5, 97.5]), abs=0.04)
    by_router = curves.groupby("router")["delta_p"]
    assert (by_router.get_group("oracle").to_numpy() >= by_router.get_group("router").to_numpy() - 1e-9).all()
    assert figures["quality_area"] > 0


def test_plots(routed, tmp_path):
    method, table = routed
    figures, curves = route_measures(method, table)
    row = figures | {"method": "route_t2i", "dataset": "prompts"}
    assert plots.quality_vs_share(curves, row, tmp_path / "share.png").is_file()
    pictures = np.random.default_rng(0).integers(0, 256, (240, 2, 1, 8, 8, 3), dtype=np.uint8)
    assert draw_routes(table, pictures, row, tmp_path / "routes.png").is_file()
    assert draw_routes(table, None, row, tmp_path / "none.png") is None
    folders = [tmp_path / name for name in ("one", "two", "none")]
    for folder in folders:
        folder.mkdir()
    for folder in folders[:2]:
        curves.to_parquet(folder / "shares.parquet")
    settings = pd.DataFrame({"label": ["route_t2i", "other"], "run_dirs": [folders[:2], folders[2:]], "oracle": False})
    figure = by_share(settings, "prompts")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["by true PRS", "at random", "route_t2i"]
    assert by_share(settings.iloc[1:], "prompts") is None


def test_what_is_right_in_the_pictures(routed):
    method, table = routed
    rng = np.random.default_rng(0)
    true = {f"{side}_true_{name}": rng.random(len(table)) for side in ("device", "cloud") for name in TRUTHS}
    table = table.assign(
        **true,
        device_place=0.5,
        cloud_place=0.5,
        device_size=0.1,
        cloud_size=0.2,
        **{f"{side}_digit": true[f"{side}_true_digit"] ** 2 for side in ("device", "cloud")},
    )
    figures, curves = route_measures(method, table)
    assert figures["agreement_digit"] == pytest.approx(1)
    assert figures["agreement_difference_digit"] > 0.9
    assert figures["agreement_place"] is None
    right = {side: table[[f"{side}_true_{name}" for name in TRUTHS]].mean(axis=1) for side in ("device", "cloud")}
    assert figures["truth"] == pytest.approx(np.where(table["cloud"], right["cloud"], right["device"]).mean())
    of_router = curves[curves["router"] == "router"].set_index("share")["truth"]
    assert of_router[0.0] == pytest.approx(right["device"].mean())
    assert of_router[1.0] == pytest.approx(right["cloud"].mean())
    assert figures["truth_at_half"] == of_router[0.5]
