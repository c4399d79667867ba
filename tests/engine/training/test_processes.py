"""Training in two processes (gloo) against one."""

import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from iciia_exp.artifacts import load_tensors, read_json
from iciia_exp.config.experiment import Experiment
from iciia_exp.engine.execute import execute
from iciia_exp.engine.graph import Artifact
from iciia_exp.engine.stages import Stages
from iciia_exp.engine.terminal import setup_logging
from iciia_exp.engine.training.processes import join
from iciia_exp.errors import ConfigError
from tests.making.processes import together

#: Steps of plain SGD: those of Adam turn a gradient's last digit into a whole step where the gradient is zero.
ONE_EPOCH = ("optimizer=sgd", "optimizer.lr=0.1", "training.recipe.epochs=1", "training.recipe.batch_size=4")

METHODS = {
    "iciia": ("method.dropout=0",),
    "context_token": ("method.dropout=0",),
    "iciia_prior": ("method.image.perceptron=0", "method.encoder.feature_dropout=0"),
    "prompt_tuning": ("partition.split=within",),
}

GONE = [f"~backbone.model.{key}" for key in ("channels", "size", "width", "dim", "dropout", "mean", "std")]
PLAIN = ("backbone.model._target_=tests.making.processes.Plain", *GONE, "backbone.recipe.batch_size=16")
SGD = ("optimizer@backbone.recipe.optimizer=sgd", "backbone.recipe.optimizer.lr=0.1")


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one_and_resume(compose, small, tmp_path):
    def config(*overrides, devices=2):
        overrides = (*small, "backbone.train=head", *overrides, f"trainer.devices={devices}")
        return OmegaConf.to_container(compose(*overrides), resolve=True)

    def alone(*overrides):
        made = Stages(Experiment.from_config(OmegaConf.create(config(*overrides, devices=1))))
        execute(made)
        return made

    four = ("training.recipe.epochs=4", "training.recipe.batch_size=2")
    whole, killed = config(*four), config(*four, "+callbacks.kill={_target_: tests.making.processes.Kill, epoch: 2}")
    network = (*PLAIN, *SGD, "backbone.train=all", "stage=backbone")
    for split in ("client", "within"):
        alone("stage=backbone", f"partition.split={split}")
    single = {name: alone(f"method={name}", *more, *ONE_EPOCH, "stage=train") for name, more in METHODS.items()}
    jobs = [(config(f"method={name}", *more, *ONE_EPOCH), "run", tmp_path / name) for name, more in METHODS.items()]
    jobs += [(config(*network), "backbone", tmp_path / "backbone")]
    jobs += [
        (whole, "run", tmp_path / "whole"),
        (killed, "run killed", tmp_path / "again"),
        (whole, "run", tmp_path / "again"),
    ]
    diverging = config("optimizer=sgd", "optimizer.lr=1e12", "training.recipe.clip_norm=0")
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="training diverged, the loss is not finite"):
        together([*jobs, (diverging, "run", tmp_path / "diverging")])
    assert not (tmp_path / "diverging" / "checkpoints").exists()
    for name, made in single.items():
        got, want = (load_tensors(folder / "weights.safetensors") for folder in (tmp_path / name, made.run.folder))
        for key in want:
            if not key.startswith("method.log_"):  # fitted afterwards on val clients, by a line search
                torch.testing.assert_close(got[key], want[key], rtol=0, atol=1e-5, msg=f"{name} {key}")
        records = [read_json(folder / "training.json") for folder in (tmp_path / name, made.run.folder)]
        assert records[0]["val_accuracy"] == records[1]["val_accuracy"]
    trained = alone(*network).backbone
    got, want = (load_tensors(folder / "weights.safetensors") for folder in (tmp_path / "backbone", trained.folder))
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=0, atol=1e-5)
    again, first = (load_tensors(tmp_path / name / "weights.safetensors") for name in ("again", "whole"))
    assert all(torch.equal(again[key], first[key]) for key in first)
    assert not list((tmp_path / "again").rglob("*.ckpt"))


@pytest.mark.slow
def test_the_command_starts_the_processes(stages, undrawn):
    setup_logging()
    two = ("trainer.devices=2", "backbone.train=head", "backbone.model.dropout=0")
    made = stages(*two)
    assert made.run.digest != stages(*two[1:]).run.digest  # other dropout masks
    assert made.features.digest == stages(*two[1:]).features.digest
    row = execute(made)
    assert row["epochs"] == 3
    log = (made.run.folder / "run.log").read_text()
    assert log.index("run: 2 processes") < log.index("train: 3 epochs")


@pytest.mark.parametrize(("method", "together"), [("dc_ccl", True), ("iciia", True), ("finetune", False)])
def test_methods_that_call_fit_are_trained_by_all_processes(stages, method, together):
    """Else Lightning would start the whole command again, which waits for the run's lock."""
    assert stages(f"method={method}", "partition.split=within").experiment.method_class.trainable is together


def test_what_does_not_fit_is_refused_before_any_work(stages, monkeypatch):
    with pytest.raises(ConfigError, match="^trainer.num_nodes=2: start the same command on each machine with torchrun"):
        execute(stages("+trainer.num_nodes=2"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="^trainer.devices=2: torchrun or SLURM says 3 processes"):
        execute(stages("trainer.devices=2"))


TWO_GROUPS = """
import sys, time
from types import SimpleNamespace
import torch
from iciia_exp.engine.training.processes import join_group, leave_group
from iciia_exp.machine import process_rank
rank, total = process_rank(), torch.ones(1)
torch.distributed.init_process_group("gloo")  # as Lightning does
torch.distributed.all_reduce(total)
leave_group()
time.sleep(2 * (rank == int(sys.argv[1])))
device = SimpleNamespace(root_device=torch.device("cpu"))
join_group(SimpleNamespace(world_size=2, global_rank=rank, strategy=device))
torch.distributed.all_reduce(total)
assert total == 4
leave_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("late", ["0", "1"])
def test_torchrun_may_have_several_groups_after_each_other(tmp_path, late):
    """Features and method are each made by a group; torchrun's store has the addresses of the first when either waits."""
    (tmp_path / "two.py").write_text(TWO_GROUPS)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "two.py", late]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_process_leaves_alone_what_lacks_its_checksums(tmp_path):
    """The first process, which was killed before it wrote them, writes them alone now."""
    made = []
    goal = Artifact("kind", "label", {}, made.append, tmp_path, in_place=True)
    goal.folder.mkdir(parents=True)
    (goal.folder / goal.last).touch()
    join(goal)
    assert not made
    (goal.folder / goal.last).unlink()
    join(goal)
    assert made == [goal.folder]
