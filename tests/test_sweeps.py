"""Sweeps and searches from the command line: failing jobs, parallel jobs, a kill."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.test_main import call, finished, until

pytestmark = pytest.mark.usefixtures("undrawn")


def below(process):
    """Return the numbers of the processes that a process has started, at any depth."""
    listed = Path(f"/proc/{process}/task/{process}/children")
    found = [int(number) for number in listed.read_text().split()] if listed.exists() else []
    return found + [other for one in found for other in below(one)]


def running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_the_jobs_of_a_killed_sweep_end(command, small):
    longer = ("training.recipe.epochs=3000", "training.patience=5000", "groups=1,2")
    process = command("-m", "+launcher=joblib", "hydra.launcher.n_jobs=2", *small, *longer)
    until(lambda: len(list(Path("outputs").glob("digits/*/checkpoints/last.ckpt"))) == 2, process)  # both train
    workers = [number for number in below(process.pid) if b"loky" in Path(f"/proc/{number}/cmdline").read_bytes()]
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 120
    while any(map(running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    finished(process)


def jobs(folder):
    (sweep,) = folder.glob("outputs/sweeps/*")
    return [json.loads(path.read_text()) for path in sorted(sweep.glob("jobs/*.json"))]


@pytest.mark.slow
def test_a_sweep_goes_on_when_a_job_fails_and_says_so(monkeypatch, capsys, tmp_path, small):
    status = call(monkeypatch, "-m", *small, "method=linear_head,iciia", "groups=3,max", "heads=1")
    out, err = capsys.readouterr()
    assert status == 1
    assert [j["status"] for j in jobs(tmp_path)] == ["done", "done", "failed", "done"]
    assert err == ""
    last = out.splitlines()[-2:]
    assert "3 of 4 jobs done" in " ".join(last)
    assert last[-1].startswith("error: job 2 failed (")
    assert "groups=3: must divide" in last[-1]
    table = out[out.rindex("small_cnn alone") :]
    assert table.count("linear_head") == 1
    assert "G=32" in table
    assert len(list(tmp_path.glob("outputs/sweeps/*/accuracy_vs_overhead.png"))) == 1
    assert len(list(tmp_path.glob("cache/features/*/manifest.json"))) == 1


@pytest.mark.slow
def test_a_sweep_leaves_out_methods_that_cannot_run_on_its_clients(monkeypatch, capsys, tmp_path, small):
    assert call(monkeypatch, "-m", *small, "method=backbone,finetune") == 0
    assert [j["status"] for j in jobs(tmp_path)] == ["done", "left out"]
    out = capsys.readouterr().out.splitlines()
    assert "1 of 2 jobs done" in out[-2]
    assert out[-1].startswith("warning: job 1 left out (method=finetune): method=finetune: learns from labelled images")
    monkeypatch.setenv("ICIIA_EXP_PID", "1")
    assert call(monkeypatch, "-m", *small, "method=finetune,prompt_tuning") == 1, "nothing ran"
    assert call(monkeypatch, *small, "method=finetune") == 2


@pytest.mark.slow
def test_a_repeated_sweep_runs_only_what_is_missing(monkeypatch, capsys, small):
    assert call(monkeypatch, "-m", *small, "seed=0") == 0
    monkeypatch.setenv("ICIIA_EXP_PID", "1")
    assert call(monkeypatch, "-m", *small, "seed=0,1", "partition.seed=${seed}") == 0
    out = capsys.readouterr().out
    assert out.count("finished before") == 1
    assert out.count("train: 3 epochs") == 2
    assert "gain\n" in out or "± s.e." in out


@pytest.mark.slow
def test_a_sweep_over_clients_has_a_table_for_each(monkeypatch, capsys, tmp_path, small):
    assert call(monkeypatch, "-m", *small, "method=backbone,linear_head", "partition.classes_per_client=2,3") == 0
    out = capsys.readouterr().out
    report = out[out.index("classes_per_client=2 (") :]
    assert report.count("small_cnn alone") == 2
    assert report.index("partition.classes_per_client=3 (") > report.index("small_cnn alone")
    assert len(list(tmp_path.glob("outputs/sweeps/*/accuracy_vs_overhead-*.png"))) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Optuna 2's own
def test_a_search_asks_val_clients_and_survives_failures(monkeypatch, capsys, tmp_path, small):
    arguments = ("-m", "+search=optuna", *small, "hydra.sweeper.n_trials=4", "groups=choice(1,3)", "heads=1")
    assert call(monkeypatch, *arguments) == 1
    out = capsys.readouterr().out
    done = [job for job in jobs(tmp_path) if job["status"] == "done"]
    assert 0 < len(done) < 4
    rows = [json.loads((Path(job["evaluation_dir"]) / "results.json").read_text()) for job in done]
    best = max(row["val_accuracy"] for row in rows)
    assert f"best on val clients, {100 * best:.1f} %: " in out
    assert "groups=3: must divide" in out
    monkeypatch.setenv("ICIIA_EXP_PID", "1")  # again: the same trials, finished
    call(monkeypatch, *arguments)
    assert capsys.readouterr().out.count("finished before") == len(done)


@pytest.mark.filterwarnings("ignore")  # Optuna 2's own
def test_a_search_in_which_nothing_works_is_one_line(monkeypatch, capsys, small):
    assert call(monkeypatch, "-m", "+search=optuna", *small, "hydra.sweeper.n_trials=2", "groups=choice(3)") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: no trial of the search succeeded; see the errors above"


@pytest.mark.filterwarnings("ignore")  # Optuna 2's own
def test_a_search_over_a_key_that_the_method_lacks(monkeypatch, capsys, small):
    assert call(monkeypatch, "-m", "+search=optuna", *small, "method=prior_em") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(
        "error: method.dropout: no such key; the search varies it, but this method has none: copy"
    )


@pytest.mark.slow
def test_a_sweep_over_what_changes_nothing_says_so(monkeypatch, capsys, small):
    assert call(monkeypatch, "-m", *small, "method=prior_em,iciia", "groups=1,2", "heads=1") == 0
    out = capsys.readouterr().out
    assert "warning: different runs of 4 jobs: 3; without an effect here: groups" in out


@pytest.mark.slow
def test_jobs_in_parallel_on_this_machine(monkeypatch, capsys, tmp_path, small):
    """Two processes; what they share is made once, and a failing job is named by the one that started them."""
    status = call(
        monkeypatch, "-m", "+launcher=joblib", *small, "method=backbone,prior_map,iciia", "groups=3", "heads=1"
    )
    assert status == 1
    assert sorted(job["status"] for job in jobs(tmp_path)) == ["done", "done", "failed"]
    assert "error: job 2 failed (method=iciia): groups=3: must divide" in capsys.readouterr().out
    assert len(list(tmp_path.glob("cache/features/*/manifest.json"))) == 1


@pytest.mark.parametrize("wanted", ["+launcher=joblib", "+launcher=slurm", "+search=optuna"])
def test_what_is_not_installed_is_named_with_its_command(monkeypatch, capsys, wanted):
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()  # which registers them
    repo = ConfigStore.instance().repo["hydra"]
    for group in ("launcher", "sweeper"):
        monkeypatch.setitem(repo, group, {name: node for name, node in repo[group].items() if name == "basic.yaml"})
    assert call(monkeypatch, "-m", wanted, "seed=0,1") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: hydra/")
    assert err.endswith("is not installed; pip install 'iciia_exp[sweeps]'\n")
