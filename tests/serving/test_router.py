"""A router from its run's directory: prompts, shares, files, and what it refuses."""

import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from iciia_exp import Run
from iciia_exp.config.experiment import Experiment
from iciia_exp.engine.evaluation.route_examples import CASES
from iciia_exp.engine.execute import execute
from iciia_exp.engine.stages import Stages
from iciia_exp.errors import UserError
from iciia_exp.methods.route import labels
from iciia_exp.report.__main__ import main as report
from iciia_exp.serving.router import Router, main

SCENES = (
    *("+experiment=route_t2i_scenes", "logger=none", "trainer=cpu", "training.recipe.epochs=1"),
    *("dataset.sizes={backbone: 32, train: 40, val: 20, test: 20}", "backbone.recipe.epochs=1"),
    *("backbone.model.device_channels=[8,8,8]", "backbone.model.cloud_channels=[8,8,16]"),
    *("backbone.model.device_steps=1", "backbone.model.cloud_steps=2", "backbone.model.pictures=1"),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run_dir(compose, cache, monkeypatch):
    """Return the directory of a run whose models hardly differ."""
    monkeypatch.setenv("ICIIA_EXP_CACHE", str(cache))
    monkeypatch.setattr(labels, "CLEAR", 0.0)
    made = Stages(Experiment.from_config(compose(*SCENES)))
    execute(made)
    return made.run.folder


@pytest.mark.slow
def test_prompts_are_routed_as_in_the_evaluation(run_dir, tmp_path, capsys):
    run = Run.load(run_dir)
    routes = pd.read_parquet(run.evaluation / "routes.parquet")
    router = Router.load(run_dir)
    found = router.route_all(routes["prompt"])
    assert [route.side == "cloud" for route in found] == routes["cloud"].tolist()
    # tokens are stored in half precision
    assert [route.score for route in found] == pytest.approx(routes["score"].tolist(), abs=2e-3)
    one = router.route("a small red one left of a large blue seven")
    assert set(one.metrics) == set(one.tokens) == set(run.class_names)
    assert all(0 < value < 1 for value in one.metrics.values())
    assert all(set(words) <= set(one.prompt.split()) for words in one.tokens.values())
    assert len(one.tokens["color"]) == 4  # two of five metrics' worth of ten words
    assert router.route(one.prompt, share=0.0).side == "device"
    assert router.interval(0.0).expected == 0
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*routes["prompt"], "", "a large green zero"]))
    assert main([str(run_dir), str(file), "--share", "0.3", "--out", str(tmp_path / "routes.csv")]) == 0
    table = pd.read_csv(tmp_path / "routes.csv")
    assert len(table) == len(routes) + 1
    assert list(table) == ["prompt", "side", "score", *run.class_names]
    assert "prompts go to the cloud" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompts.txt"], "there is no such file"),
        (["empty.txt"], "has no prompts"),
        (["some.txt", "--share", "2"], "share=2"),
        (["table.csv"], "has no column 'prompt'"),
    ],
)
def test_wrong_files_are_one_line(run_dir, arguments, message, capsys):
    open("empty.txt", "w").close()
    for name, text in (("some.txt", "a small red one\n"), ("table.csv", "caption\na small red one\n")):
        with open(name, "w") as file:
            file.write(text)
    assert main([str(run_dir), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_prompts_must_not_be_empty(run_dir):
    with pytest.raises(UserError, match="prompt 2: is empty"):
        Router.load(run_dir).route_all(["a small red one", " "])


def test_a_run_that_routes_nothing(stages):
    made = stages("method=backbone", "evaluation.history_lengths=[]", "evaluation.examples=0")
    execute(made)
    with pytest.raises(UserError, match="backbone routes no prompts"):
        Router.load(made.run.folder)


@pytest.mark.slow
def test_examples_are_on_the_page_with_pictures_and_the_tokens_that_decided(run_dir, tmp_path, browser):
    run = Run.load(run_dir)
    routes = pd.read_parquet(run.evaluation / "routes.parquet").set_index("image")
    examples = pd.read_parquet(run.evaluation / "route_examples.parquet")
    assert 4 <= len(examples) <= 12
    assert set(examples["case"]) <= set(CASES)
    assert examples.groupby("case")["cases"].first().sum() <= examples["drawn"].iloc[0] == len(routes)
    router, weights = Router.load(run_dir), run.method.weight_K.tolist()
    for row in examples.to_dict("records"):
        of = routes.loc[row["image"]]
        assert (row["side"] == "cloud", row["score"]) == (of["cloud"], of["score"])
        assert row["case"].startswith(row["side"])
        assert (of["superiority"] < 0.5) == (row["case"] in ("cloud, better there", "device, worse"))
        metrics = json.loads(row["metrics"])
        assert list(metrics) == [name for name, weight in zip(run.class_names, weights, strict=True) if weight]
        tokens = router.route(row["prompt"]).tokens
        assert {name: found["tokens"] for name, found in metrics.items()} == {name: tokens[name] for name in metrics}
        device, cloud = (Image.open(io.BytesIO(row[f"{side}_picture"])) for side in ("device", "cloud"))
        stored = run.features.array("pictures")[row["image"]]
        assert (np.asarray(device) == stored[0, 0]).all()
        assert (np.asarray(cloud) == stored[1, 0]).all()
    file = tmp_path / "report.html"
    assert report([str(run_dir), "--html", str(file)]) == 0
    (table,) = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text())[1])
    shown = table["rows"][1]["routes"]
    assert [row["prompt"] for row in shown] == examples["prompt"].tolist()
    assert all(row["pictures"]["device"].startswith("data:image/png;base64,") for row in shown)
    page, problems = browser.new_page(viewport={"width": 1000, "height": 900}), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"file://{file}")
    page.click("section tbody tr.has")
    assert page.locator(".route").count() == len(shown)
    first = page.locator(".route").first
    assert first.locator(".prompt").inner_text() == shown[0]["prompt"]
    assert first.locator("figure.answers figcaption").inner_text() == shown[0]["side"]
    assert first.locator("tr").count() == 2 + len(shown[0]["metrics"])
    assert " ".join(shown[0]["metrics"][0]["tokens"]) in first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert not problems
