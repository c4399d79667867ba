"""Sweeps: a record of every job, one table over all of them, and the exit status.

A job that fails is recorded and the others go on. Each job leaves one file ``jobs/<number>.json`` in the sweep's
folder, so that this works the same in one process, in several and on a cluster.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from iciia_exp.artifacts import read_json, write_json
from iciia_exp.config.hydra_errors import override_key
from iciia_exp.errors import UserError, printable

__all__ = ["SweepReport", "record_job", "take_exit_status"]

log = logging.getLogger(__name__)

_status = 0


def take_exit_status() -> int:
    """Return 1 if a job of this process's last sweep failed or none ran, else 0, and reset it."""
    global _status
    status, _status = _status, 0
    return status


def record_job(folder: Path, number: int, overrides: list[str], outcome: dict[str, Any]) -> None:
    """Write the outcome of job ``number``."""
    write_json(folder / "jobs" / f"{number:05d}.json", {"job": number, "overrides": overrides, **outcome})


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a sweep's jobs in their order; damaged ones are left out with a warning."""
    for path in sorted((folder / "jobs").glob("*.json")):
        try:
            record = read_json(path)
            missing = {"job", "overrides", "status", "evaluation_dir", "error"} - record.keys()
        except UserError as error:
            log.warning("%s", error)
            continue
        if missing:
            log.warning("%s: has no %s; the job is left out", path, ", ".join(sorted(missing)))
        else:
            yield record


def _best_of_search(folder: Path) -> str | None:
    """Return the best settings of a hyper-parameter search, from the sweeper's file; None without one."""
    path = folder / "optimization_results.yaml"
    if not path.is_file():
        return None
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings = " ".join(f"{key}={value}" for key, value in found["best_params"].items())
    return f"best on val clients, {100 * found['best_value']:.1f} %: {settings}"


def _without_effect(jobs: list[dict[str, Any]]) -> str:
    """Return the keys whose values differ between jobs that are one and the same run."""
    by_run: dict[str, list[set[Any]]] = {}
    for job in jobs:
        if job["evaluation_dir"]:
            by_run.setdefault(job["evaluation_dir"], []).append(set(job["overrides"]))
    differ = {o for given in by_run.values() for o in set.union(*given) - set.intersection(*given)}
    return " and ".join(sorted(set(map(override_key, differ))))


class SweepReport(Callback):
    """Prints a table over a sweep's runs at its end, draws accuracy against overhead, and lists jobs without a run."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the report."""
        global _status
        from iciia_exp.engine.terminal import console, result_table, setup_logging
        from iciia_exp.results.labels import base_of, grouped
        from iciia_exp.results.plots import accuracy_vs_overhead

        setup_logging()
        folder = Path(config.hydra.sweep.dir)
        jobs = list(_records(folder))
        without = [job for job in jobs if job["status"] != "done"]
        rows = []
        for path in dict.fromkeys(job["evaluation_dir"] for job in jobs if job["evaluation_dir"]):  # jobs may share one
            with contextlib.suppress(OSError, UserError):
                rows.append(read_json(Path(path) / "results.json"))
        out = console()
        out.print()
        by_base = grouped(rows, base_of)
        for number, (base, group) in enumerate(by_base.items()):
            plot = "accuracy_vs_overhead.png"
            if len(by_base) > 1:  # other clients or another backbone: their accuracies do not belong in one table
                plot = f"accuracy_vs_overhead-{number}.png"
                differs = [f"{k.removeprefix('config.')}={v}" for k, v in base if any((k, v) not in b for b in by_base)]
                out.print(printable(f"{' '.join(differs)} ({plot})", lines=False), style="bold", soft_wrap=True)
            out.print(result_table(group))
            out.print()
            accuracy_vs_overhead(group, folder / plot)
        done = len(jobs) - len(without)
        if idle := _without_effect(jobs):
            log.warning("different runs of %s jobs: %s; without an effect here: %s", done, len(rows), idle)
        summary = f"{done} of {len(jobs)} jobs done; plot and records in {folder}"
        out.print(printable(summary), style="dim", soft_wrap=True)
        if (best := _best_of_search(folder)) is not None:
            out.print(printable(best), soft_wrap=True)
        common = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
        for job in without:
            own = " ".join(o for o in job["overrides"] if o not in common)
            level = logging.ERROR if job["status"] == "failed" else logging.WARNING
            log.log(level, "job %s %s%s: %s", job["job"], job["status"], f" ({own})" if own else "", job["error"])
        _status = int(any(job["status"] == "failed" for job in without) or not done)
