"""The command line: as a subprocess where the process matters, in this process for the many ways to mistype."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iciia_exp import run_experiment
from iciia_exp.__main__ import main
from iciia_exp.errors import UserError

pytestmark = pytest.mark.usefixtures("undrawn")


def until(condition, process, seconds=400):
    """Wait until a condition holds, which it must while the process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def finished(process, timeout=240):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def test_help_is_quick_and_imports_no_torch(tmp_path):
    check = (
        "import sys; sys.argv = ['iciia_exp', '--help']; from iciia_exp.__main__ import main\n"
        "try: main()\nexcept SystemExit as e: code = e.code\n"
        "heavy = {'torch', 'lightning', 'timm', 'wandb', 'pandas', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'{code} {heavy}' if heavy or code else 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for word in (
        "+experiment=NAME",
        "method: arm_cml, backbone, client_prior, client_profile,",
        "groups: 1",
        "iciia_exp.cache",
        "-m groups=",
    ):
        assert word in done.stdout
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_two_identical_commands_at_once_then_a_third(tmp_path, command, small, monkeypatch, capsys):
    both = [command(*small) for _ in range(2)]
    results = [finished(p) for p in both]
    for code, out, err in results:
        assert code == 0, err
        assert "small_cnn alone" in out
        assert err == ""
    trained = [out.count("train: 3 epochs") for _, out, _ in results]
    assert sorted(trained) == [0, 1]
    tables = [out[out.index("method ") :] for _, out, _ in results]
    assert tables[0] == tables[1]
    assert call(monkeypatch, *small) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "finished before" in out
    assert out[out.index("method ") :] == tables[0]
    assert sorted(os.listdir(tmp_path)) == ["cache", "outputs"]


@pytest.mark.slow
def test_killed_for_real_and_repeated(tmp_path, command, stages, small):
    """SIGKILL in the middle of the method's training; the repeated command ends as if nothing had happened."""
    from iciia_exp.engine.execute import execute

    longer = ("training.recipe.epochs=150", "training.patience=1000")
    process = command(*small, *longer)
    until(lambda: list(Path("outputs").glob("digits/*/checkpoints/last.ckpt")), process)
    process.send_signal(signal.SIGKILL)
    finished(process)
    assert not list(Path("outputs").glob("digits/*/*/results.json"))
    resumed = execute(stages(*longer))
    whole = execute(stages(*longer, f"output_dir={tmp_path}/whole"))
    for key, value in whole.items():
        if not key.startswith("seconds") and key != "finished":
            assert resumed[key] == value, key


def test_one_of_several_processes_says_that_it_leaves_the_work(monkeypatch, capsys, small):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert call(monkeypatch, *small, "method=backbone", "stage=evaluate") == 0
    assert "process 1 of 4: leaves the work to the first" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "abc")
    assert call(monkeypatch, *small) == 2
    assert capsys.readouterr().err.startswith("error: WORLD_SIZE=abc: must be a whole number")


def call(monkeypatch, *arguments):
    """Call the command line in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["iciia_exp", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
        sys.exit(0)
    return stop.value.code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grups=3"], "grups: no such key; did you mean groups?"),
        (
            ["training.recipe.epoks=2"],
            "training.recipe.epoks: no such key; did you mean training.recipe.epochs?",
        ),
        (["+partition.clases=3"], "partition.clases: no such key"),
        (
            ["optimizer.betas=[0.9,0.99]"],
            "optimizer.betas: no such key; an argument that is not listed gets a plus sign",
        ),
        (["optimizer.lrr=1"], "optimizer.lrr: no such key; did you mean optimizer.lr?"),
        (
            ["callbacks.a._target_=x"],
            "callbacks.a._target_: no such key; what is not listed gets a plus sign: +callbacks",
        ),
        (["+groups=16"], "+groups: is there already; leave the plus sign out: groups=..."),
        (
            ["backbone=timm", "backbone.model=resnet18"],
            "backbone.model=resnet18: holds several settings; set backbone.mod",
        ),
        (["optimizer.lr=1e-3x"], "optimizer.lr=1e-3x: is a text, not a number ("),
        (
            ["+callbacks.a._target_=iciia_exp.recipe.Recip"],
            "callbacks.a._target_=iciia_exp.recipe.Recip: cannot be import",
        ),
        (["lr=3"], "lr: no such key; did you mean"),
        (["protocol=published"], "protocol: no such key; protocol is now training"),
        (["trainng=published"], "trainng: no such key; did you mean training?"),
        (["method=icia"], "method=icia: no such option; did you mean iciia?"),
        (["partition=qqq"], "partition=qqq: no such option; valid: classes_per_client"),
        (["+experiment=digts"], "experiment=digts: no such option; did you mean digits?"),
        (["experiment=digits"], "experiment: add a plus sign, +experiment=NAME; valid: c3d_ucf101"),
        (["+experimnt=digits"], "experimnt: no such "),
        (["groups=1,2"], "groups=1,2: several values are a sweep; add -m"),
        (["groups=["], "groups=[: not of the form key=value"),
        (["groups"], "groups: not of the form key=value"),
        (["stage=check", "method=finetune"], "method=finetune: learns from labelled images of the test clients; "),
        (["stage=check", "+experiment=coda_digits", "partition.deals=2"], "method=coda: gets samples of other clients"),
        (["method=[0,1]"], "method=[0,1]: no such option; valid: arm_cml"),
        (["data_dir=/x/ü[1]"], """quote twice: 'data_dir="/x/ü[1]"'"""),
        (["partition=owner"], "partition=owner: 1,297 of the dataset's 1,297 images have no owner"),
        (["groups=${nope}"], "groups: Interpolation key 'nope' not found"),
        (
            ["method._target_=nowhere.X"],
            "cannot be imported (no module nowhere in the working folder or on PYTHONPATH)",
        ),
        (["method=null"], "method=null: no such option; valid: arm_cml"),
        (["groups=3"], "groups=3: must divide the feature width D=512; valid: 1, 2, 4,"),
        (
            ["partition.classes_per_client=11"],
            "partition.classes_per_client=11: the dataset has 10 classes; use 1 to 10",
        ),
        (["partition.images_per_client=700"], "partition.images_per_client=700: the 600 train images do not fill one"),
        (["trainer.accelerator=tpus"], "trainer.accelerator=tpus: "),
        (["-m", "grups=1,2"], "grups: no such key; did you mean groups?"),
        (["method=[iciia,prior_em]"], "method=[iciia,prior_em]: takes one option; for a run of each, -m method=iciia,"),
        (["training.images=1000000000000"], "training.images=1000000000000: must be a whole number of 1 to 100000"),
        (
            ["evaluation.drawn_clients=1000000000"],
            "evaluation.drawn_clients=1000000000: must be a whole number of 0 to",
        ),
        (["evaluation.neighbours=1000000"], "evaluation.neighbours=1000000: must be a whole number of 1 to 100"),
        (
            ["seed=99999999999999999999"],
            "seed=99999999999999999999: must be a whole number of 0 to 9223372036854775807",
        ),
        (["features.precision=foo"], "features.precision=foo: must be one of 32-true, 32, 16-mixed,"),
        (["backbone.recipe.batch_size=${seed}"], "backbone.recipe.batch_size=0: must be a whole number of at least 1"),
        (["dataset.sizes=null"], "dataset.sizes=None: must be a dictionary {key: value, ...}"),
        (["evaluation.history_lengths=5"], "evaluation.history_lengths=5: must be a list [value, ...]"),
        (["~features.num_workers"], "~features.num_workers: is null already; leave it out"),
        (["~features.num_werkers"], "~features.num_werkers: no such key; did you mean features.num_workers?"),
        (["~dataset.sizes"], "dataset.sizes: is missing; give it a value"),
        (["--config-name", "nothing"], "--config-name=nothing: no such configuration"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    assert call(monkeypatch, "logger=csv", *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("outputs/digits/*"))
    assert not list(tmp_path.glob("cache/*"))


def test_a_folder_that_cannot_be_made_is_named(monkeypatch, capsys, tmp_path, small):
    (tmp_path / "file").write_text("not a folder")
    for key in ("output_dir", "cache_dir"):
        assert call(monkeypatch, *small, f"{key}={tmp_path}/file/below") == 2
        out, err = capsys.readouterr()
        assert f"{key}={tmp_path / 'file'}" in err
        assert len(err.splitlines()) == 1
        assert not out  # before any work


def test_an_argument_of_the_trainer_is_refused_on_a_finished_run(monkeypatch, capsys, small):
    assert call(monkeypatch, *small, "method=backbone") == 0
    for given in ("+trainer.barebones=true", "+trainer.enable_checkpointing=false", "trainer.precision=64-true"):
        assert call(monkeypatch, *small, "method=backbone", given) == 2
        assert capsys.readouterr().err.startswith(f"error: {given.lstrip('+').replace('true', 'True', 1)[:20]}")


def test_a_run_for_which_memory_is_too_small_says_so(monkeypatch, capsys, small):
    from iciia_exp.engine import execute

    for error in (MemoryError("Unable to allocate 7 TiB"), RuntimeError("[enforce] can't allocate memory: you tried")):
        monkeypatch.setattr(execute, "execute", lambda *_, error=error: raise_(error))
        assert call(monkeypatch, *small) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: memory is full (")
        assert "training.images" in err
    monkeypatch.setattr(execute, "execute", lambda *_: raise_(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="other"):
        call(monkeypatch, *small)


def raise_(error):
    raise error


def test_tracebacks_on_request(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["iciia_exp", "logger=csv", "groups=3"])
    with pytest.raises(Exception, match="groups=3"):
        main()


def test_conf_works_from_any_folder(monkeypatch, tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert call(monkeypatch, "--cfg", "job", "groups=4") == 0
    assert "groups: 4" in capsys.readouterr().out


def test_the_same_from_python(small, tmp_path):
    run = run_experiment("method=prior_map", *small)
    assert run.results["method"] == "prior_map"
    assert run_experiment("method=prior_map", *small).path == run.path
    for overrides, message in (
        (["gruops=4"], "gruops: no such key; did you mean groups?"),
        (["groups=5", *small], "groups=5: must divide"),
        (["method=iccia"], "method=iccia: no such option; did you mean iciia?"),
        (["stage=features", *small], "stage=features: gives no finished run"),
    ):
        with pytest.raises(UserError) as error:
            run_experiment(*overrides)
        assert message in str(error.value)


def test_run_experiment_within_a_program_of_hydra(small, tmp_path, monkeypatch):
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    (tmp_path / "mine.yaml").write_text(
        "defaults: [_self_, {override hydra/job_logging: none}, {override hydra/hydra_logging: none}]\nmine: 3\n"
    )
    seen = []

    @hydra.main(version_base="1.3", config_path=str(tmp_path), config_name="mine")
    def program(config):
        run = run_experiment(*small, "method=backbone")
        seen.extend([config.mine, run.method.name, GlobalHydra.instance().is_initialized()])

    monkeypatch.setattr(sys, "argv", ["program.py"])
    program()
    assert seen == [3, "backbone", True]


def test_overrides_are_texts():
    with pytest.raises(UserError, match=r"overrides are texts, one by one.*run_experiment\(\*overrides\)"):
        run_experiment(["method=backbone", "seed=1"])


def test_a_folder_of_options_of_ones_own(small, tmp_path):
    (tmp_path / "my conf" / "method").mkdir(parents=True)
    (tmp_path / "my conf" / "method" / "mine.yaml").write_text("_target_: iciia_exp.methods.adapt.heads.BackboneOnly\n")
    assert run_experiment("method=mine", *small, config_dir="my conf").results["method"] == "backbone"
    with pytest.raises(UserError, match="^--config-dir=x: is an option of the command line; .* config_dir=FOLDER"):
        run_experiment("method=mine", *small, "--config-dir=x")
    with pytest.raises(UserError, match="config_dir=nowhere: no such folder"):
        run_experiment(*small, config_dir="nowhere")


def test_an_experiment_without_its_first_line(small, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "own.yaml").write_text("defaults:\n  - override /method: backbone\n")
    with pytest.raises(UserError, match=r"^experiment/own: the first line of its file must be # @package _global_$"):
        run_experiment("+experiment=own", *small, config_dir=str(tmp_path / "conf"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tab", "a:\n\t- b\n", "my_conf/experiment/tab.yaml:2: is not YAML (found character"),
        (
            "dotted",
            "# @package _global_\noptimizer.lr: 0.1\n",
            "optimizer.lr: keys are nested in a file, optimizer: {lr: ...}",
        ),
        ("empty", "", "experiment: its file is empty, or its first line is not # @package _global_"),
        ("digits", "name: other\n", "my_conf/experiment/digits.yaml: is hidden by the package's option of this name"),
    ],
)
def test_files_of_ones_own_that_are_wrong(monkeypatch, capsys, small, name, text, message):
    folder = Path("my_conf/experiment")
    folder.mkdir(parents=True)
    (folder / f"{name}.yaml").write_text(text)
    assert call(monkeypatch, "--config-dir", "my_conf", f"+experiment={name}", *small) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    with pytest.raises(UserError, match=re.escape(message)):
        run_experiment(f"+experiment={name}", *small, config_dir="my_conf")


def test_options_of_ones_own_are_listed(monkeypatch, capsys):
    (Path("my_conf/method")).mkdir(parents=True)
    (Path("my_conf/method/own_one.yaml")).write_text("_target_: x\n")
    assert call(monkeypatch, "--config-dir=my_conf", "method=5") == 2
    assert "own_one" in capsys.readouterr().err


def test_the_version(monkeypatch, capsys):
    from iciia_exp import __version__

    assert call(monkeypatch, "--version") in (None, 0)
    assert capsys.readouterr().out == f"iciia_exp {__version__}\n"


def test_a_deleted_working_folder_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        assert call(monkeypatch) == 2
    finally:
        monkeypatch.chdir(tmp_path)
    assert capsys.readouterr().err == "error: the working folder has been deleted; change to one that exists\n"


def test_resolve_alone_is_one_line(monkeypatch, capsys):
    assert call(monkeypatch, "--resolve") == 2
    assert capsys.readouterr().err.startswith("error: The --resolve flag can only be used in conjunction")
