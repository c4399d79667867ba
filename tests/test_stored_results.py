"""The figures in the documents are those of the stored results, and those come from the listed settings."""

import argparse
import importlib
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from scipy.stats import spearmanr

from iciia_exp.config.check import check_keys
from tests.making.config import targets

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def results():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("results")


@pytest.fixture(scope="module")
def pages(results):
    return importlib.import_module("pages")


@pytest.fixture(scope="module")
def stored(results):
    return importlib.import_module("stored")


@pytest.fixture(scope="module")
def figures(results):
    return importlib.import_module("figures")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_in_a_page_are_the_stored_ones(pages, page):
    text = page.read_text()
    assert text.count("<!-- results:") == len(pages.BLOCK.findall(text))
    assert text.count("<!-- value:") == len(pages.VALUE.findall(text))
    assert not re.search(r"^\s*<!-- value:", text, re.M), "a comment at the start of a line ends the paragraph"
    assert pages.filled(text) == text, "run python benchmarks/results.py --write"


def test_the_pair_of_models_is_shown_by_metric(pages, stored, results, tmp_path, monkeypatch):
    sides = {
        "device_color": [0.2, 0.4],
        "cloud_color": [0.6, 0.6],
        "device_clear": [0.5, 0.5],
        "cloud_clear": [0.5, 0.7],
    }
    right = {"device_true_color": [0, 1], "cloud_true_color": [1, 1]}
    routes = pd.DataFrame(sides | right | {"label_color": [0.3, 0.4], "label_clear": [0.5, 0.4]})
    figures = {"agreement_color": 0.8, "agreement_difference_color": 0.7, "oracle": False}
    routes.to_parquet(tmp_path / "routes.parquet")
    row = figures | {"folder": tmp_path, "accuracy": 0.6, "backbone_accuracy": 0.5}
    lines = [results.line_of("route_scenes", "routellm", seed, row) for seed in range(3)]
    monkeypatch.setattr(stored, "STORED", tmp_path)
    stored.store("route_scenes", pd.DataFrame(lines), ["routellm"])
    *_, color, clear = pages.pair_part("route_scenes")
    assert color == "| color | 0.300 | 0.600 | 0.300 ± 0.100 | 50 % | 100 % | 0.80 (0.70) |"
    assert clear == "| clear | 0.500 | 0.600 | 0.100 ± 0.100 |  |  |  |"


def test_rank_correlations_are_compared_over_prompts(pages, stored, results, tmp_path, monkeypatch):
    """Paired, with an interval over prompts, and only between routers with the same labels."""
    rng = np.random.default_rng(0)
    truth = rng.random(300)
    noise = {"route_t2i": 0.2, "routellm": 0.2, "random": 5.0, "own labels": 0.2}
    rows = {}
    for label, scale in noise.items():
        routes = pd.DataFrame({"score": truth + scale * rng.random(300), "superiority": truth})
        if label == "own labels":
            routes["superiority"] = rng.random(300)
        (tmp_path / label).mkdir()
        routes.to_parquet(tmp_path / label / "routes.parquet")
        rank = spearmanr(routes["score"], routes["superiority"]).statistic
        rows[label] = [{"folder": tmp_path / label, "rank_correlation": rank}] * 3
    found = results.rank_differences(rows, "route_t2i")
    assert found["own labels"] == {}
    assert set(found["route_t2i"].values()) == {0.0}
    alike, worse = found["routellm"], found["random"]
    assert alike["rank less low"] < alike["rank less"] < alike["rank less high"]
    assert worse["rank less low"] < worse["rank less"] < worse["rank less high"] < 0
    lines = [{"label": k, "seed": n, "oracle": False, "accuracy": 0.6} | v for k, v in found.items() for n in range(3)]
    columns = dict.fromkeys(results.TABLES["route_scenes"].columns, 0.5)
    monkeypatch.setattr(stored, "STORED", tmp_path)
    stored.store("route_scenes", pd.DataFrame([line | columns for line in lines]), noise)
    last = [line.split(" | ")[-1].rstrip(" |") for line in pages.columns_part("route_scenes")]
    less = [100 * worse[key] for key in ("rank less", "rank less low", "rank less high")]
    assert last[0] == "rank correlation less `route_t2i`"
    assert last[4] == "{:+.1f} [{:+.1f}, {:+.1f}]".format(*less)
    assert last[5] == "–"


def test_what_a_benchmark_prints_is_stored_below_its_command(pages, stored, results, tmp_path, monkeypatch):
    (tmp_path / "bench_it.py").write_text("import sys; print('a | b'); sys.exit(sys.argv[1] == 'fail')")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    monkeypatch.setattr(stored, "STORED", tmp_path)
    options = argparse.Namespace(data=None, parents=None, weights=None, out=tmp_path)
    speed = results.TABLES["digits"]._replace(script="bench_it.py --fast")
    monkeypatch.setitem(results.TABLES, "speed", speed)
    results.run_script("speed", options)
    text = pages.filled("<!-- results: speed output -->\n<!-- end -->")
    command, _, line = stored.output_file("speed").read_text().splitlines()
    assert (command, line) == ("$ python benchmarks/bench_it.py --fast", "a | b")
    assert f"```text\n{command}\n" in text
    monkeypatch.setitem(results.TABLES, "speed", speed._replace(script="bench_it.py fail"))
    with pytest.raises(SystemExit, match="failed"):
        results.run_script("speed", options)
    assert pages.filled(text) == text


def test_a_figure_in_a_sentence(pages, stored):
    accuracy = 100 * pd.read_csv(stored.STORED / "digits.csv").query("label == 'iciia'")["accuracy"].mean()
    text = "it has <!-- value: digits iciia accuracy -->0<!-- end --> %."
    assert pages.filled(text) == f"it has <!-- value: digits iciia accuracy -->{accuracy:.1f}<!-- end --> %."


def test_every_stored_table_is_shown_and_has_its_seeds(pages, stored, results):
    shown = {name: part for page in PAGES for _, name, part, *_ in pages.BLOCK.findall(page.read_text())}
    del shown["all"]
    names = {path.stem for path in stored.STORED.glob("*.csv")}
    assert names == {name for name, part in shown.items() if part != "output"}
    assert {path.stem for path in stored.STORED.glob("*.txt")} == shown.keys() - names
    assert all(results.TABLES[name].measured for name in shown.keys() - names)
    for name in names:
        runs, table = pd.read_csv(stored.STORED / f"{name}.csv"), results.TABLES[name]
        assert f"<!-- results: {name} " in (ROOT / "docs" / table.page).read_text()
        order = list(table.settings) or list(dict.fromkeys(runs["label"]))
        assert list(dict.fromkeys(runs["label"])) == sorted(set(runs["label"]), key=order.index)
        seeds = {label: tuple(part["seed"]) for label, part in runs.groupby("label")}
        assert set(seeds.values()) == {results.SEEDS}, seeds


def test_pictures_show_what_is_stored(pages, figures):
    for name in figures.FIGURES:
        assert figures.is_drawn(name), f"{name}: run python benchmarks/results.py --write"


@pytest.fixture
def made_up(stored, results, tmp_path, monkeypatch):
    """Random figures of every table, without its last setting."""
    rng = np.random.default_rng(0)
    lengths = (0, 1, 3, 7, 8, 9, 11, 15)
    keys = [*stored.KEYS, *(f"backbone_{key}" for key in ("accuracy", "macs"))]
    keys += [f"round {n} {key}" for n in (0, 1) for key in ("bytes", "accuracy")]
    keys += [f"gain {q}" for q in results.QUANTILES]
    keys += [f"{who} bin 3 {key}" for who in ("method", "backbone") for key in ("confidence", "accuracy", "share")]
    sets = ("training_types", "held_out_types")
    keys += [f"{name} {n} {who}client_accuracy" for name in sets for n in lengths for who in ("", "backbone_")]
    for name, table in results.TABLES.items():
        labels = list(table.settings)[:-1] or [table.reference or "a 1", "b 1", "a 2"]
        runs = pd.DataFrame({"label": np.repeat(labels, 3), "seed": [0, 1, 2] * len(labels), "oracle": False})
        values = {key: rng.random(len(runs)) for key in dict.fromkeys((*keys, *table.columns))}
        pd.concat([runs, pd.DataFrame(values)], axis=1).to_csv(tmp_path / f"{name}.csv", index=False)
    monkeypatch.setattr(stored, "STORED", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("part", "table"),
    [
        *(("grid", table) for table in ("backbones", "heterogeneity", "severity", "dirichlet")),
        *(("sweep", table) for table in ("layers", "coda_tiny_imagenet", "coda_parts", "route_tiny_imagenet")),
        *(
            ("columns", table)
            for table in ("miet_lite0", "miet_bytes", "movielens", "dc_ccl_digits", "route_scenes", "training")
        ),
        *(("clients", "clients"), ("held_out", "held_out")),
    ],
)
def test_parts(pages, made_up, part, table):
    lines = pages.PARTS[part](table)
    assert len({line.count("|") for line in lines}) == 1
    labels = pd.read_csv(made_up / f"{table}.csv")["label"]
    assert all(any(label.split(" ")[-1] in line for line in lines) for label in labels)


def test_the_key_of_the_values_is_named(pages):
    assert pages.varied("route_tiny_imagenet", 1) == "`method.share`"
    assert pages.varied("dirichlet", 0) == "`partition.alpha`"
    assert pages.varied("backbones", 0) == ""


def test_differences_to_the_reference(pages, made_up):
    """Paired: the difference of the means, with the error of the differences."""
    runs = pd.read_csv(made_up / "dc_ccl_digits.csv").pivot(index="seed", columns="label", values="accuracy")
    less = 100 * (runs["fedavg"] - runs["dc_ccl"])
    lines = pages.columns_part("dc_ccl_digits")
    (line,) = (line for line in lines if line.startswith("| `fedavg` |"))
    assert line.endswith(f"| {less.mean():+.1f} ± {less.sem():.1f} |")
    (line,) = (line for line in lines if line.startswith("| `dc_ccl` |"))
    assert line.endswith("|  |")
    assert any(line.startswith("| bound: `dc_ccl arm=large_on_device` |") for line in lines)


@pytest.mark.slow
def test_the_picture_of_every_table_can_be_drawn(figures, made_up):
    """Also where a setting is missing."""
    drawn = {"client_profile_history"}  # its columns are those of the stored tables, which other tests draw
    for name in set(figures.FIGURES) - drawn:
        figures.FIGURES[name][0]().savefig(made_up / f"{name}.png")


def test_accuracy_by_length(pages, stored):
    head, _, alone, *lines = pages.lengths_part("digits")
    assert head.split(" | ")[1:] == ["0", "1", "2", "3", "5", "10", "15", "all |"]
    mean = pd.read_csv(stored.STORED / "digits.csv").query("label == 'iciia'")["partition 3 client_accuracy"].mean()
    (iciia,) = (line for line in lines if line.startswith("| `iciia` |"))
    assert iciia.split(" | ")[4].startswith(f"{100 * mean:.1f} ± ")
    assert "±" not in alone


def test_a_changed_figure_is_found(pages, stored, figures, tmp_path, monkeypatch):
    """A test of the test: the page follows the stored figures, and nothing else."""
    name = next(name for name in stored.stored_of(pages.CLIENTS))
    text = f"before\n<!-- results: {name} main -->\nold\n<!-- end -->\nafter\n"
    right = pages.filled(text)
    assert right.startswith("before\n")
    assert right.endswith("<!-- end -->\nafter\n")
    assert "old" not in right
    runs = pd.read_csv(stored.STORED / f"{name}.csv")
    runs.loc[0, "accuracy"] += 0.01
    runs.to_csv(tmp_path / f"{name}.csv", index=False)
    monkeypatch.setattr(stored, "STORED", tmp_path)
    assert pages.filled(text) != right
    assert not any(figures.is_drawn(figure) for figure in figures.FIGURES)  # other tables are not there


def test_the_best_are_bold(pages, stored, tmp_path, monkeypatch):
    """The best and what cannot be told from it; an oracle and methods with the clients' labels are not ranked."""
    accuracies = {"a": (0.8, 0.8, 0.8), "b": (0.81, 0.79, 0.79), "c": (0.7, 0.7, 0.7), "finetune": (0.9, 0.9, 0.9)}
    runs = [
        {"label": label, "seed": seed, "oracle": False, "accuracy": value, "backbone_accuracy": 0.5}
        for label, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    for name in ("digits", "tiny_imagenet"):
        pd.DataFrame(runs).to_csv(tmp_path / f"{name}.csv", index=False)
    monkeypatch.setattr(stored, "STORED", tmp_path)
    lines = {line.split("|")[1].strip(): line for line in pages.across_part("all")}
    assert [name for name, line in lines.items() if "**" in line] == ["`a`", "`b`"]
    assert list(lines)[3:] == ["`finetune` (own labels)", "`a`", "`b`", "`c`"]


def test_every_run_has_a_seed_of_its_own(results):
    for name, table in results.TABLES.items():
        assert table.script or re.search(r"(?<![.\w])seed=\{seed\}", table.common), name


@pytest.mark.slow
def test_every_setting_is_a_configuration(results, compose, monkeypatch):
    monkeypatch.setattr(results.Weights, "__format__", lambda _, name: f"{name}.safetensors")
    monkeypatch.setattr(results.First, "__format__", lambda *_: "first")
    options = argparse.Namespace(data="d", parents="p", weights=None, out="o")
    composed = set()  # of settings that differ in values alone one, and one of each table
    for name, table in results.TABLES.items():
        for number, (label, way) in enumerate(table.settings.items()):
            keys = re.sub(r"(?<!method)=\S+", "", way)
            if number and keys in composed:
                continue
            composed.add(keys)
            config = compose(*results.overrides(name, label, 1, options))
            for node in targets(OmegaConf.to_container(config, resolve=False)):
                check_keys(node, "")
