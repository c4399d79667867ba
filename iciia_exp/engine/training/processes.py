"""Processes: several devices train together (DDP), each in a process of its own.

Every process runs the same function on the same inputs; Lightning averages the gradients. The processes are started
here, on one machine, or by torchrun or srun on several. The first one writes the artifact.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.constants import default_pg_timeout

from iciia_exp.artifacts import partial_folder
from iciia_exp.checksums import changed
from iciia_exp.engine.graph import Artifact
from iciia_exp.engine.terminal import log_file, setup_logging
from iciia_exp.machine import plain_errors, process_count, process_rank

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from iciia_exp.engine.inputs import Inputs

__all__ = [
    *("in_processes", "join", "join_group", "leave_group", "only_first_logs", "spawn", "training_processes"),
]

log = logging.getLogger(__name__)

#: Number of process groups that this process has left.
_left = 0


def training_processes(config: dict[str, Any]) -> int:
    """Return the number of processes that the `trainer` group asks for, over all machines."""
    devices, num_nodes = config.get("devices", 1), config.get("num_nodes", 1)
    if isinstance(devices, list) or (isinstance(devices, int) and devices > 0):
        return num_nodes * (len(devices) if isinstance(devices, list) else devices)
    from iciia_exp.engine.training.trainer import make_trainer, quiet_lightning

    with quiet_lightning():
        return make_trainer(config).world_size


def in_processes(inputs: "Inputs", kind: str, make: Callable[["Inputs", Path], None], folder: Path) -> None:
    """Call ``make(inputs, folder)``, in several processes if the `trainer` group has several devices.

    Args:
        inputs: of the experiment.
        kind: of the artifact that is made; ``stages.<kind>`` in the other processes.
        make: makes it; called in every process.
        folder: where it is made.
    """
    if inputs.processes == 1 or process_count() > 1:
        make(inputs, folder)
        return
    e = inputs.experiment
    log.info("%s: %s processes", kind, inputs.processes)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # names each process that it ends
    with plain_errors(f"trainer.devices={e.config['trainer']['devices']}"):
        spawn(_make_together, inputs.processes, e.config, e.overrides, kind, folder)


def spawn(function: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Call ``function(*arguments)`` in several processes of this machine, which find each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_enter, (processes, port, function, arguments), nprocs=processes)


def _enter(rank: int, processes: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    counts = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "iciia_exp"}
    os.environ.update({name: str(value) for name, value in (ranks | counts | address).items()})
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    function(*arguments)


def _make_together(config: dict[str, Any], overrides: Sequence[str], kind: str, folder: Path) -> None:
    """Make an artifact together with the other processes."""
    from iciia_exp.config.experiment import Experiment
    from iciia_exp.engine.stages import Stages

    setup_logging()
    only_first_logs()
    stages = Stages(Experiment.from_config(OmegaConf.create(config), overrides))
    with log_file(folder / "run.log") if kind == "run" and process_rank() == 0 else nullcontext():
        try:
            getattr(stages, kind).make(folder)
        finally:
            stages.tracker.close()


def leave_group() -> None:
    """End the process group, if there is one: what follows is the first process's alone, and metrics wait for all."""
    global _left
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        _left += 1


def join_group(trainer: "pl.Trainer") -> None:
    """Make another process group than the first that a job has had; Lightning makes the first one.

    torchrun's store keeps the addresses of a group that has ended, at which nobody answers.
    """
    again = _left and trainer.world_size > 1 and not torch.distributed.is_initialized()
    if not again or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # else the store ends with the group
        return
    strategy, size = trainer.strategy, trainer.world_size
    timeout = getattr(strategy, "_timeout", None) or default_pg_timeout
    backend = getattr(strategy, "_process_group_backend", None)
    backend = backend or ("nccl" if strategy.root_device.type == "cuda" else "gloo")  # as Lightning chooses
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keys = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')} group {_left}"
    store = PrefixStore(keys, TCPStore(host, port, size, is_master=False, timeout=timeout))
    torch.distributed.init_process_group(
        backend, store=store, rank=trainer.global_rank, world_size=size, timeout=timeout
    )


def only_first_logs() -> None:
    """Silence the log lines of all processes but the first."""
    if process_rank() > 0:
        logging.getLogger("iciia_exp").setLevel(logging.ERROR)


def join(goal: Artifact) -> None:
    """Take part in making an artifact, in another process than the first, which holds its lock."""
    for need in goal.needs:
        while not need.finished:  # the first process makes it alone
            time.sleep(0.2)
    if goal.finished:
        return
    folder = goal.folder if goal.in_place else partial_folder(goal.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / goal.last).is_file() or changed(folder):  # else its checksums alone are missing
        goal.make(folder)
