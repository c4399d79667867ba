"""The figures in the documents are those of the stored results, and those come from the listed settings."""

import argparse
import importlib.util
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from iciia_exp.config.check import check_keys
from tests.making.config import targets

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("results_of_documents", ROOT / "benchmarks" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_in_a_page_are_the_stored_ones(results, page):
    text = page.read_text()
    assert text.count("<!-- results:") == len(results.BLOCK.findall(text))
    assert results.filled(text) == text, "run python benchmarks/results.py --write"


def test_every_stored_table_is_shown_and_has_its_seeds(results):
    shown = {name for page in PAGES for _, name, *_ in results.BLOCK.findall(page.read_text())}
    stored = {path.stem for path in results.STORED.glob("*.csv")}
    assert stored == shown
    for name in stored:
        runs, table = pd.read_csv(results.STORED / f"{name}.csv"), results.TABLES[name]
        assert f"<!-- results: {name} " in (ROOT / "docs" / table.page).read_text()
        assert set(runs["label"]) <= set(table.settings)
        seeds = {label: tuple(sorted(part["seed"])) for label, part in runs.groupby("label")}
        assert set(seeds.values()) == {results.SEEDS}, seeds


def test_pictures_show_what_is_stored(results):
    for name in results.FIGURES:
        assert results.is_drawn(name), "run python benchmarks/results.py --write"


def test_a_changed_figure_is_found(results, tmp_path, monkeypatch):
    """A test of the test: the page follows the stored figures, and nothing else."""
    name = next(path.stem for path in sorted(results.STORED.glob("*.csv")))
    text = f"before\n<!-- results: {name} main -->\nold\n<!-- end -->\nafter\n"
    right = results.filled(text)
    assert right.startswith("before\n")
    assert right.endswith("<!-- end -->\nafter\n")
    assert "old" not in right
    runs = pd.read_csv(results.STORED / f"{name}.csv")
    runs.loc[0, "accuracy"] += 0.01
    runs.to_csv(tmp_path / f"{name}.csv", index=False)
    monkeypatch.setattr(results, "STORED", tmp_path)
    assert results.filled(text) != right
    assert not any(results.is_drawn(figure) for figure in results.FIGURES)  # other tables are not there


def test_every_setting_is_a_configuration(results, compose, monkeypatch):
    monkeypatch.setattr(results.Weights, "__format__", lambda _, name: f"{name}.safetensors")
    options = argparse.Namespace(data="d", parents="p", weights=None, out="o")
    composed = set()  # the settings of several tables once
    for name, table in results.TABLES.items():
        for number, (label, way) in enumerate(table.settings.items()):
            if number and way.split("method=")[-1] in composed:
                continue
            composed.add(way.split("method=")[-1])
            config = compose(*results.overrides(name, label, 1, options))
            for node in targets(OmegaConf.to_container(config, resolve=False)):
                check_keys(node, "")
