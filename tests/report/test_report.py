"""Reports over finished runs: tables against plain arithmetic, figures that are drawn, no torch."""

import html
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from iciia_exp import Run
from iciia_exp.artifacts import read_json, write_json
from iciia_exp.config.experiment import Experiment
from iciia_exp.engine.execute import execute
from iciia_exp.engine.stages import Stages
from iciia_exp.errors import UserError
from iciia_exp.report import figures
from iciia_exp.report import text as text_tables
from iciia_exp.report.__main__ import main
from iciia_exp.results.tables import _results_in, comparisons, load_runs, select, settings
from tests.making.damage import DAMAGE, unchecked
from tests.making.vectors import make_vectors


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Five small runs: a backbone, a group sweep with two seeds, and a bound."""
    import os

    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from iciia_exp.config.paths import CONF_DIR
    from tests.conftest import SMALL

    folder = tmp_path_factory.mktemp("runs")
    keep = os.getcwd()
    os.chdir(folder)
    try:
        for job in (
            ["method=backbone"],
            *(["groups=4", f"seed={s}", "evaluation.drawn_clients=5"] for s in (0, 1)),
            ["groups=16"],
            ["method=oracle_classes"],
        ):
            GlobalHydra.instance().clear()
            with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
                config = hydra.compose(
                    "config", overrides=[*SMALL, "training.recipe.epochs=1", *job, "cache_dir=cache"]
                )
            execute(Stages(Experiment.from_config(config)), brief=True)
    finally:
        os.chdir(keep)
    return folder / "outputs"


@pytest.mark.slow
def test_a_repository_does_not_take_the_place_of_its_run(outputs, tmp_path):
    (run, *_) = load_runs([outputs])
    shutil.copytree(run["run_dir"].parent, tmp_path / "runs" / "a")
    (tmp_path / "a_model").mkdir()
    shutil.copy(run["run_dir"] / "results.json", tmp_path / "a_model")
    write_json(tmp_path / "export" / "latency.json", {"added_percent": {"1": 219.0}})  # of another run
    whole = tmp_path / "runs" / "a" / run["run_dir"].name
    folders = ([tmp_path], [tmp_path / "a_model", tmp_path / "runs"], [tmp_path / "runs", tmp_path / "a_model"])
    for given in folders:
        (found,) = load_runs(given)
        assert found["run_dir"] == whole
    (alone,) = load_runs([tmp_path / "a_model"])
    assert alone["latency_percent"] is None


@pytest.mark.slow
def test_two_clients_have_no_interval_anywhere(compose, tmp_path, capsys):
    owner = np.repeat(["train0", "train1", "train2", "val0", "test0", "test1"], 20).tolist()
    make_vectors(tmp_path / "data", owner=owner, split=[name[:-1] for name in owner])
    config = compose(
        *("dataset=features", "backbone=precomputed", f"data_dir={tmp_path}/data", "partition=owner"),
        *("method=client_prior", "logger=csv", "trainer=cpu", f"output_dir={tmp_path}/runs"),
    )
    row = execute(made := Stages(Experiment.from_config(config)))
    assert row["test_clients"] == 2
    assert read_json(made.evaluation.folder / "results.json")["gain_low"] is None
    main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")])
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"{100 * row['gain']:+.1f} |" in table
    assert "nan" not in table.lower() + capsys.readouterr().out.lower()
    Run.load(made.run.folder).save_pretrained(tmp_path / "hub")
    assert f"Gain {100 * row['gain']:.1f} points; " in (tmp_path / "hub" / "README.md").read_text()


def test_results_have_their_own_path_before_that_of_a_link(tmp_path):
    for name in ("project/outputs/a/run/evaluation-1", "project/outputs/b/run/evaluation-2", "elsewhere/evaluation-3"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "results.json").touch()
    outputs = tmp_path / "project" / "outputs"
    (outputs / "best").symlink_to(outputs / "b" / "run" / "evaluation-2")
    (outputs / "a" / "up").symlink_to(tmp_path)  # around the folder
    (outputs / "b" / "other").symlink_to(tmp_path / "elsewhere")
    found = [str(path.parent.relative_to(outputs)) for path in _results_in(outputs)]
    assert sorted(found) == ["a/run/evaluation-1", "b/other/evaluation-3", "b/run/evaluation-2"]


@pytest.mark.slow
def test_a_run_is_in_the_table_of_every_experiment_and_links_are_followed(outputs, tmp_path):
    shutil.copytree(outputs, tmp_path / "runs" / "digits")
    (tmp_path / "elsewhere").mkdir()
    for name, at in (("other", "runs"), ("linked", "elsewhere")):
        for path in sorted(outputs.rglob("results.json"))[:2]:
            copy = tmp_path / at / name / path.parent.parent.name / path.parent.name
            shutil.copytree(path.parent, copy)
            row = read_json(path) | {"name": name, "setting_digest": name}
            (copy / "results.json").write_text(json.dumps(row))
            unchecked(copy)
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "runs")  # no end
    names = [row["name"] for row in load_runs([tmp_path / "runs"])]
    assert {name: names.count(name) for name in names} == {"digits": 5, "other": 2, "linked": 2}


@pytest.mark.slow
def test_values_are_chosen_as_they_are_written(outputs):
    rows = load_runs([outputs])
    several = [row for row in rows if row["method"] == "iciia"]
    assert select(rows, ["optimizer.lr=3e-3"]) == select(rows, ["optimizer.lr=0.003"]) == several
    assert select(rows, ["training.shuffle_images=true"]) == several
    assert len(select(rows, ["method.groups=16,4.0"])) == len(several)


@pytest.mark.slow
def test_a_report_takes_the_place_of_an_earlier_one(outputs, tmp_path):
    out = tmp_path / "out"
    assert main([str(outputs), "--out", str(out)]) == 0
    several = {path.name for path in out.iterdir()}
    (out / "1-notes.md").write_text("mine")
    (out / "accuracy_vs_bytes.png").write_text("mine")
    assert main([str(outputs), "--where", "method=backbone", "--out", str(out)]) == 0
    left = {path.name for path in out.iterdir()}
    assert {"1-notes.md", "accuracy_vs_bytes.png", "table.csv"} < left
    assert several - left
    assert "iciia" not in "".join(path.read_text(errors="ignore") for path in out.glob("*.md"))


@pytest.mark.slow
def test_seeds_are_averaged(outputs):
    rows = load_runs([outputs])
    assert len(rows) == 5
    (title, part), *rest = comparisons(rows)
    assert not rest
    assert title == "digits, small_cnn"
    table = settings(part)
    assert sorted(table["runs"]) == [1, 1, 1, 2]
    pair = table[table["runs"] == 2].iloc[0]
    values = [r["accuracy"] for r in rows if r["groups"] == 4]
    assert pair["accuracy"] == pytest.approx(np.mean(values))
    assert pair["accuracy_se"] == pytest.approx(np.std(values, ddof=1) / 2**0.5)
    assert not table[table["method"] == "oracle_classes"]["front"].any()
    assert list(table["accuracy"]) == sorted(table["accuracy"], reverse=True)


def test_the_front_has_what_nothing_cheaper_beats():
    base = {
        "oracle": False,
        "name": "x",
        "dataset": "d",
        "backbone": "b",
        "partition_digest": "p",
        "epochs": 1,
        "run_dir": ".",
    }
    rows = [
        base | {"method": m, "setting_digest": m, "digest": m, "accuracy": a, "sequence_macs": c, "gain": a - 0.45}
        for m, a, c in (("cheap", 0.5, 1), ("dear", 0.4, 9), ("best", 0.8, 5), ("same", 0.8, 7), ("free", 0.4, 0))
    ]
    table = settings(
        [*rows, rows[2] | {"method": "known", "setting_digest": "k", "digest": "k", "accuracy": 1.0, "oracle": True}]
    )
    front = dict(zip(table["method"], table["front"], strict=True))
    assert front == {"known": False, "best": True, "same": True, "cheap": True, "dear": False, "free": False}


def test_conditions(outputs):
    rows = load_runs([outputs])
    assert {r["method"] for r in select(rows, ["method=iciia"])} == {"iciia"}
    assert len(select(rows, ["method=iciia,backbone", "config.method.groups=4"])) == 2
    assert len(select(rows, ["method.groups=4,16"])) == 3
    with pytest.raises(UserError, match="did you mean method.groups"):
        select(rows, ["method.grups=4"])
    with pytest.raises(UserError, match="expected key=value"):
        select(rows, ["groups"])
    with pytest.raises(UserError, match="^--where groups=5: no run is left; of those before it, groups is 16, 4$"):
        select(rows, ["method=iciia", "groups=5"])


def test_folders_without_runs(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1
    assert "no finished runs" in capsys.readouterr().err
    (tmp_path / "file").touch()
    for flag, name, kind in (("--html", "", "folder"), ("--out", "file", "file")):
        assert main([str(tmp_path), flag, str(tmp_path / name)]) == 1
        assert f"is a {kind}; choose another name" in capsys.readouterr().err
    write_json(tmp_path / "results.json", {"accuracy": 1})
    assert main([str(tmp_path)]) == 1
    assert "results.json: is not the results of a run" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_report(outputs, tmp_path, capsys):
    assert main([str(outputs), "--history", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| small_cnn alone " in out
    assert "| iciia N=1 H=4 G=4" in out
    assert "oracle_classes (oracle)" in out
    assert "drawn clients, drifting" in out
    names = {p.name for p in tmp_path.iterdir()}
    assert {"table.csv", "table.md", "table.tex", "history.md", "homogeneous.md"} <= names
    for name in ("accuracy_vs_overhead", "accuracy_vs_groups", "accuracy_vs_history", "gain_per_client"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    table = pd.read_csv(tmp_path / "table.csv")
    assert table["accuracy"].max() == max(r["accuracy"] for r in load_runs([outputs]))
    text = (tmp_path / "table.tex").read_text()
    assert text.count(r"\\") == 1 + 1 + 3  # the head, the backbone, the other settings
    assert r"oracle\_classes" in text


def test_numbers_in_the_tables_are_those_of_the_runs(outputs):
    rows = load_runs([outputs])
    table = settings(rows)
    text = text_tables.summary(table)
    single = next(r for r in rows if r["groups"] == 16)
    line = text[text["method"].str.contains("G=16")].iloc[0]
    want = [f"{100 * single[k]:.1f}" for k in ("accuracy", "accuracy_low", "accuracy_high")]
    assert line["accuracy"] == f"{want[0]} [{want[1]}, {want[2]}]"
    assert line["harmed (chance)"].startswith(f"{100 * single['harmed_share']:.1f} (")
    history = text_tables.by_history(table[table["groups"] == 16])
    counts = pd.read_parquet(single["run_dir"] / "history.parquet").query("protocol == 'stream' and history == 3")
    assert history.iloc[1]["3"] == f"{100 * (counts['method_correct'] / counts['decisions']).mean():.1f}"
    assert history.iloc[0]["3"] == f"{100 * (counts['backbone_correct'] / counts['decisions']).mean():.1f}"


def test_tables_as_markdown_and_latex():
    table = pd.DataFrame({"method": ["a_b *", "c"], "share, %": ["+12.50", "–"], "x": ["0.0 ± 1.0", ""]})
    assert text_tables.markdown(table).splitlines() == [
        "| method   |   share, % |         x |",
        "|:---------|-----------:|----------:|",
        "| a_b *    |     +12.50 | 0.0 ± 1.0 |",
        "| c        |          – |           |",
    ]
    assert text_tables.latex(table, "R&D: {50 %}\\").splitlines() == [
        *(r"\begin{table}", r"\centering", r"\caption{R\&D: \{50 \%\}\textbackslash{}}"),
        *(r"\begin{tabular}{lrr}", r"\toprule", r"method & share, \% & x \\", r"\midrule"),
        *(r"a\_b $^*$ & +12.50 & 0.0 $\pm$ 1.0 \\", r"c & -- &  \\", r"\bottomrule", r"\end{tabular}", r"\end{table}"),
    ]


def test_without_a_sweep_there_is_no_plot_of_it(outputs):
    assert figures.by_groups(settings(select(load_runs([outputs]), ["method=backbone"])), "x") is None


def test_it_loads_no_torch(outputs):
    check = (
        "import sys\nfrom iciia_exp.report.__main__ import main\n"
        f"code = main([{str(outputs)!r}, '--history'])\n"
        "sys.exit(f'{code}' if code or {'torch', 'lightning', 'timm', 'sklearn'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_run_counts_once(outputs):
    assert len(load_runs([outputs, outputs / "digits"])) == 5
    assert read_json(next(outputs.rglob("results.json")))["digest"] in {r["digest"] for r in load_runs([outputs])}


def test_a_table_without_a_column_is_named(outputs, tmp_path, capsys):
    shutil.copytree(outputs, tmp_path / "outputs")
    for path in (tmp_path / "outputs").rglob("clients.parquet"):
        pd.read_parquet(path).drop(columns="decisions").to_parquet(path)
        (path.parent / "checksums.json").unlink()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "table.md").write_text("earlier")
    to = ["--html", str(tmp_path / "a.html"), "--out", str(tmp_path / "report")]
    assert main([str(tmp_path / "outputs"), *to]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert [(path.name, path.read_text()) for path in (tmp_path / "report").iterdir()] == [("table.md", "earlier")]
    assert not (tmp_path / "a.html").exists()
    assert re.fullmatch(
        r"error: (.*)/clients\.parquet: has no column decisions; delete \1 and repeat the command", line
    )


@pytest.mark.parametrize("kind", ["cut", "flip", "lost"])
@pytest.mark.parametrize("name", ["results.json", "clients.parquet", "history.parquet", "attribution.parquet"])
def test_a_run_with_a_damaged_file_is_left_out(outputs, tmp_path, capsys, name, kind, caplog):
    shutil.copytree(outputs, tmp_path / "outputs")
    first, *rest = sorted((tmp_path / "outputs").rglob(name))
    before = len(load_runs([tmp_path / "outputs"]))
    DAMAGE[kind](first)
    with caplog.at_level("WARNING"):
        rows = load_runs([tmp_path / "outputs"])
    assert first.parent not in [row["run_dir"] for row in rows]
    assert len(rows) == before - 1
    if (name, kind) != ("results.json", "lost"):  # that is an unfinished run
        (said,) = [record.getMessage() for record in caplog.records]
        assert said.startswith(f"left out: {first.parent}")
        assert name in said
    for path in rest:
        DAMAGE[kind](path)
    if len(rest) == before - 1:
        with pytest.raises(UserError, match=str(tmp_path)):
            load_runs([tmp_path / "outputs"])


@pytest.mark.parametrize(
    "change", [{"task": "nope"}, {"accuracy": "high"}, {"method": None}, {"setting_digest": 5}], ids=str
)
def test_results_that_are_none_are_left_out(outputs, tmp_path, change, caplog):
    shutil.copytree(outputs, tmp_path / "outputs")
    unchecked(tmp_path)
    path = next((tmp_path / "outputs").rglob("results.json"))
    write_json(path, read_json(path) | change)
    with caplog.at_level("WARNING"):
        assert len(load_runs([tmp_path / "outputs"])) == 4
    (said,) = [record.getMessage() for record in caplog.records]
    (key,) = change
    assert said.startswith(f"left out: {path}: is not the results of a run ({key}: ")


def test_names_on_the_page_are_text(outputs, tmp_path):
    """Names of clients, classes and data sets are whatever a user has; none of them is HTML or ends the script."""
    name = "</script><b>\"&'<!--"
    shutil.copytree(outputs, tmp_path / "outputs")
    unchecked(tmp_path)
    for path in (tmp_path / "outputs").rglob("results.json"):
        write_json(path, read_json(path) | {"dataset": name, "backbone": name})
    for path in (tmp_path / "outputs").rglob("clients.parquet"):
        pd.read_parquet(path).assign(client=name).to_parquet(path)
    assert main([str(tmp_path / "outputs"), "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "</script><b>" not in text
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert "<" not in content
    (table,) = json.loads(content)
    assert table["rows"][0]["cells"][0] == f"{name} alone"
    assert {client[0] for row in table["rows"][1:] for client in row["clients"]} == {name}
    (title,) = re.findall("<h2>(.*?)</h2>", text)
    assert html.unescape(title) == f"digits: {name}, {name}"
    assert "<" not in title


@pytest.mark.slow
def test_the_page_in_a_browser(outputs, tmp_path):
    """It opens without errors; sorting, filtering, a run's clients and its examples with their pictures work."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    file = tmp_path / "report.html"
    assert main([str(outputs), "--html", str(file)]) == 0
    text = file.read_text()
    assert not re.search(r'(src|href)="https?:', text)
    # what a person does, by the page's own controls, and what is there afterwards
    script = """<script>
    window.addEventListener("error", event => document.title = "error: " + event.message);
    window.addEventListener("load", () => {
      const rows = () => [...document.querySelectorAll("section > .wide tbody tr")];
      const said = {before: rows().map(r => r.cells[0].textContent)};
      const head = [...document.querySelectorAll("section > .wide th")].find(h => h.textContent === "overhead");
      head.click();
      said.overhead = rows().map(r => r.cells[0].textContent);
      said.sorted = head.getAttribute("aria-sort");
      const search = document.querySelector("input");
      search.value = "iciia G=4";
      search.dispatchEvent(new Event("input"));
      said.left = rows().filter(r => !r.hidden).map(r => r.cells[0].textContent);
      rows().find(r => !r.hidden).click();
      said.clients = document.querySelectorAll(".clients tbody tr").length;
      said.gains = [...document.querySelectorAll(".clients tbody tr")].map(r => Number(r.cells[6].textContent));
      said.targets = [...document.querySelectorAll(".example .target")].map(t => t.textContent);
      said.others = [...document.querySelectorAll(".example .other")].map(t => t.textContent);
      said.hover = [...document.querySelectorAll("figure title")].map(t => t.textContent);
      said.title = document.title;
      Promise.all([...document.querySelectorAll(".example img")].map(i => i.decode())).finally(() => {
        said.pictures = [...document.querySelectorAll(".example img")].map(i => i.naturalWidth);
        document.body.innerHTML = "<pre id=said>" + JSON.stringify(said) + "</pre>";
      });
    });
    </script></body>"""
    file.write_text(text.replace("</body>", script))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [browser, *flags, "--virtual-time-budget=30000", "--dump-dom", f"file://{file}"]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    said = json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', page, re.S).group(1)))
    assert said["title"] == "iciia_exp: report"
    assert said["before"][0] == "small_cnn alone"
    assert sorted(said["before"]) == sorted(said["overhead"])
    assert said["sorted"] == "descending"
    assert said["overhead"][1].startswith("iciia N=1 H=4 G=4")
    assert [name.rstrip(" *") for name in said["left"]] == ["iciia N=1 H=4 G=4"]
    assert said["clients"] == 4
    assert said["gains"] == sorted(said["gains"])
    assert len(said["targets"]) == 12
    assert all("before: " in text and "after: " in text and "client " in text for text in said["targets"])
    assert all(re.fullmatch(r"\d\d+ %, (0|[+\u2212]\d\.\d\d+)", text) for text in said["others"])  # a digit, its share
    assert set(said["pictures"]) == {8}
    assert len(said["pictures"]) == 12 + len(said["others"])
    assert any(text.startswith("iciia N=1 H=4 G=16: ") for text in said["hover"])
    assert said["hover"].count("iciia N=1 H=4 G=16") >= 2  # its line by history, its box of gains
    assert "iciia N=1" in said["hover"]  # the line by groups
