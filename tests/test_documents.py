"""Every command in README and docs: those of the package run on small settings, the others exist as they are typed."""

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from iciia_exp import dashboard
from iciia_exp.__main__ import main
from iciia_exp.artifacts import read_json
from iciia_exp.cache import main as cache_main
from iciia_exp.config.check import check_keys
from iciia_exp.report.__main__ import main as report_main
from tests.engine.test_experiments import EXPERIMENTS, offline_weights  # noqa: F401
from tests.making.config import targets
from tests.making.vectors import make_vectors

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text() for page in PAGES}


def commands(start):
    """Return the commands of all pages that begin so: lines of blocks without a language, and pieces of code in text."""
    found = []
    for text in TEXTS.values():
        fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
        blocks = [block for language, block in fenced if language in ("", "sh", "bash")]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`([^`\n]+)`", prose)
        found += [line.split(" # ")[0].strip() for line in lines if line.startswith(start)]
    return sorted(set(found))


MAIN = [c for c in commands("python -m iciia_exp") if c.split()[2] == "iciia_exp"]

#: An experiment by name alone, which `tests/engine/test_experiments.py` runs.
BY_NAME = [c for c in MAIN if (f := re.fullmatch(r".* \+experiment=(\w+)( data_dir=\S+)?", c)) and f[1] in EXPERIMENTS]

#: Placeholders for what a reader has; with them a command is composed and checked, or gets small data of the form.
NEEDS_MORE = ("FILE", "NAME", "trainer=gpu", "launcher=slurm", "OVERRIDES", "--help", "swin_b")


def split(arguments, compose):
    """Return the arguments without a sweep's values, and those of its first and its last job."""
    plain, swept = [], {}
    for override in OverridesParser.create().parse_overrides([a for a in arguments if a not in ("-m", "--multirun")]):
        if override.is_sweep_override():
            values = [str(value) for value in override.sweep_string_iterator()]
            swept[override.get_key_element()] = values
        else:
            plain.append(override.input_line)
    config = compose(*plain, hydra=True)
    named = {} if "search=optuna" in " ".join(plain) else dict(config.hydra.sweeper.params or {})
    for key, values in named.items():
        swept.setdefault(key, str(values).split(","))
    jobs = [[f"{key}={values[place]}" for key, values in swept.items()] for place in (0, -1)]
    return plain, jobs


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for all commands: they have the same small backbone."""
    return tmp_path_factory.mktemp("cache")


def test_there_are_commands():
    assert len(MAIN) >= 20
    assert {"README.md", "reports.md", "rivals.md", "streams.md"} <= set(TEXTS)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.filterwarnings("ignore")  # Optuna's own
@pytest.mark.parametrize(
    "command", [c for c in MAIN if "--config-dir" not in c and c not in BY_NAME]
)  # docs/extend.md: below
def test_a_command_of_the_package_works(command, compose, small, cache, tmp_path, monkeypatch, offline_weights, capsys):  # noqa: F811
    arguments = [a for a in shlex.split(command)[3:] if a != "..."]
    monkeypatch.setenv("ICIIA_EXP_CACHE", str(cache))
    if "--help" in arguments:
        monkeypatch.setattr(sys, "argv", ["iciia_exp", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return
    name = next(
        (e for a in arguments if "experiment=" in a for e in re.findall(r"\w+", a)[1:] if e in EXPERIMENTS), None
    )
    make, more = EXPERIMENTS[name] if name else (None, ())
    if name == "features":
        make, more = (
            (lambda root, _: make_vectors(root)),
            ("partition=classes_per_client", "partition.classes_per_client=2"),
        )
    data = tmp_path / "data"
    if make is not None:
        data.mkdir()
        make(data, monkeypatch)
    arguments = [f"data_dir={data}" if a.startswith("data_dir=") else a for a in arguments]
    if name == "folder" and "partition=owner" in arguments:
        lines = [f"{p.relative_to(data)},{p.parent.name},{i % 7}" for i, p in enumerate(sorted(data.rglob("*.jpg")))]
        (tmp_path / "images.csv").write_text("\n".join(["path,label,owner", *lines]))
        more = [m for m in more if not m.startswith("partition")]
    arguments = [f"dataset.csv={tmp_path}/images.csv" if a.startswith("dataset.csv=") else a for a in arguments]
    plain, jobs = split(arguments, compose)
    if any(word in command for word in NEEDS_MORE):  # a GPU, a cluster, weights; large ones run in test_experiments.py
        for job in jobs:
            config = compose(*plain, *job)
            for node in targets(OmegaConf.to_container(config, resolve=False)):
                check_keys(node, "")
        return
    own = make is not None or name in ("dc_ccl_digits", "miet_digits")  # whose backbone and partition have other keys
    size = ("logger=csv", "trainer=smoke", *more) if own else small
    fewer = ("hydra.sweeper.n_trials=2",) if "search=optuna" in command else ()
    plain = [p for p in plain if not p.startswith("hydra.sweeper.n_trials")]
    for job in jobs[:1] if jobs[0] == jobs[1] else jobs:
        mode = ("-m", *fewer) if fewer else ("hydra.mode=RUN",)
        given = [s for s in size if not (s.startswith("partition.") and any(j.startswith("partition=") for j in job))]
        monkeypatch.setattr(sys, "argv", ["iciia_exp", *mode, *plain, *given, *job])
        with contextlib.suppress(SystemExit):
            main()
        assert "error" not in capsys.readouterr().err
    if "stage=" not in command:
        assert list(tmp_path.glob("outputs/*/*/*/results.json"))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_what_a_reader_brings_works_as_the_page_shows(tmp_path, monkeypatch, capsys):
    """The files of docs/extend.md, written as they stand, and its commands."""
    blocks = re.findall(r"^```(?:python|yaml)\n((?:# @.*\n)?# file: (\S+)\n.*?)^```", TEXTS["extend.md"], re.S | re.M)
    assert len(blocks) == 19
    for text, name in blocks:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (images,) = re.findall(r"^```python\n((?:(?!```).)*^np\.savez\(.*?)^```", TEXTS["extend.md"], re.S | re.M)
    exec(images, {})  # writes images.npz
    monkeypatch.syspath_prepend(str(tmp_path))
    for command in (c for c in MAIN if "--config-dir" in c):
        arguments = shlex.split(command)[3:]
        more = ["training.recipe.epochs=2", *["logger=csv"] * ("logger=" not in command)]
        monkeypatch.setattr(sys, "argv", ["iciia_exp", *arguments, *more])
        with contextlib.suppress(SystemExit):
            main()
        out, err = capsys.readouterr()
        assert err == ""
        assert ("two_layers alone" if "two_layers" in command else "perceptron alone") in out
    rows = [read_json(path) for path in tmp_path.glob("outputs/mine/*/*/results.json")]
    assert {row["method"] for row in rows} == {"mean_prior", "iciia", "iciia_prior", "hidden_head", "class_bias"}
    assert all(row["gain"] > 0 for row in rows if row["method"] == "mean_prior")
    assert all(row["gain"] > 0 and row["client_device_macs"] for row in rows if row["method"] == "class_bias")
    (lines,) = tmp_path.glob("outputs/mine/*/lines.jsonl")
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert sum("train/gradient_norm" in line for line in told) == 2
    assert 0 < told[-1]["test/accuracy"] < 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with finished runs at every place that a command of the report names, as outputs/digits."""
    import os

    from iciia_exp import run_experiment
    from tests.conftest import SMALL

    folder, keep = tmp_path_factory.mktemp("documents"), os.getcwd()
    os.chdir(folder)
    try:
        for name, method in (("digits", "iciia"), ("digits", "prior_map"), ("rivals", "prior_map")):
            run_experiment(f"method={method}", f"name={name}", f"cache_dir={folder}/cache", "groups=4", *SMALL)
    finally:
        os.chdir(keep)
    for named in re.findall(r"outputs/\w+", " ".join(commands("python -m iciia_exp.report"))):
        if not (folder / named).is_dir():
            shutil.copytree(folder / "outputs" / "rivals", folder / named)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", commands("python -m iciia_exp.report"))
def test_a_command_of_the_report_works(command, finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    assert report_main(shlex.split(command)[3:]) == 0
    assert "small_cnn alone" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Pydantic:DeprecationWarning")
def test_commands_of_cache_and_dashboard_work(capsys):
    (command,) = commands("python -m iciia_exp.cache")
    assert cache_main(shlex.split(command)[3:]) == 0
    (command,) = commands("python -m iciia_exp.dashboard")
    assert dashboard.main([*shlex.split(command)[3:], "--dry-run"]) == 0


@pytest.mark.parametrize("script", sorted({c.split()[1] for c in commands("python benchmarks/")}))
def test_a_benchmark_knows_its_options(script, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in commands(f"python {script}"):
        for word in shlex.split(command)[2:]:
            if not word.isdigit() and "|" not in word:
                assert word in text, word


def test_other_commands_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands("make "):
        assert command.split()[1] in targets
    for command in commands("wandb sweep"):
        assert (ROOT / command.split()[2]).is_file()
    extras = re.findall(r"iciia_exp\[([\w,]+)\]", "".join(TEXTS.values()))
    listed = (ROOT / "pyproject.toml").read_text()
    assert extras
    for extra in ",".join(extras).split(","):
        assert f"\n{extra} = [" in listed


def test_links_and_pictures_are_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_the_site_has_every_page():
    listed = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(page.name for page in PAGES if page.name != "README.md")
