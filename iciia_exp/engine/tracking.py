"""Loggers of a run: Lightning's, from the group `logger`; a failing logger never stops a run.

Names in a wandb run:

- its summary: the figures of `iciia_exp.results.columns.summary_keys` (``test/accuracy``, ``backbone/accuracy``,
  ``cost/overhead_percent``, ...), and the best ``val/accuracy``;
- curves: ``train/loss``, ``val/accuracy``, ``val/log_loss`` over ``epoch``; ``history/client_accuracy``,
  ``history/worst_decile``, ``history/log_loss`` and the backbone's over ``history/images``; ``rounds/accuracy``,
  ``rounds/seen_accuracy``, ``rounds/unseen_accuracy``, ``rounds/down_bytes`` and ``rounds/up_bytes`` over
  ``rounds/round``;
- the chart ``accuracy_vs_overhead``, a point per run; images ``plots/...``; tables ``clients`` and ``attribution``;
- the artifact ``results-<digest>``, the files that `iciia_exp.report` reads, and with ``log_model`` the artifact
  ``model-<digest>``, the trained method.

Other loggers get the curves of training and the numbers of the summary.
"""

import logging
import netrc
import os
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from iciia_exp.config.build import build
from iciia_exp.config.check import check_keys, class_of, flatten, parameters_of
from iciia_exp.errors import ConfigError, check_bool, check_choice, first_line
from iciia_exp.results.columns import summary_keys

__all__ = ["METRICS", "MODES", "Tracker", "in_wandb_sweep", "wandb_logged_in", "wandb_mode"]

log = logging.getLogger(__name__)

#: Step and summary of each metric in wandb.
METRICS: dict[str, dict[str, str]] = {
    "epoch": {},
    "train/*": {"step_metric": "epoch"},
    "val/*": {"step_metric": "epoch"},
    "val/accuracy": {"step_metric": "epoch", "summary": "max"},
    "history/images": {},
    "history/*": {"step_metric": "history/images"},
    "rounds/round": {},
    "rounds/*": {"step_metric": "rounds/round"},
}

MODES = ("auto", "online", "offline", "disabled")

#: Arguments of Lightning's ``WandbLogger`` that are not arguments of ``wandb.init``.
_LOGGER_ALONE = ("prefix", "checkpoint_name", "add_file_policy")

#: Its arguments that ``wandb.init`` has under another name.
_OF_LIGHTNING = {"save_dir": "dir", "version": "id"}

#: Methods of a logger that Lightning calls.
_CALLED = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")


def in_wandb_sweep() -> bool:
    """Whether an agent of ``wandb sweep`` started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def wandb_logged_in() -> bool:
    """Whether wandb would find an API key (environment or netrc) without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "api.wandb.ai"
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in files:
        try:
            if netrc.netrc(os.path.expanduser(file)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def wandb_mode(mode: str) -> Any:
    """Return ``online``, ``offline`` or ``disabled``; none of them prompts the user.

    The environment variable WANDB_MODE takes precedence over ``mode``. ``auto`` is ``online`` if this machine is logged
    in, else ``disabled``; ``online`` without a login is ``offline``.
    """
    check_choice("logger.wandb.mode", mode, MODES)
    given = os.environ.get("WANDB_MODE", "")
    given = {"dryrun": "offline", "run": "online"}.get(given, given)
    mode = given if given in MODES[1:] else mode
    if mode == "auto":
        return "online" if wandb_logged_in() else "disabled"
    if mode == "online" and not wandb_logged_in():
        log.warning("wandb: no API key on this machine, logging offline (`wandb login`, then `wandb sync` uploads it)")
        return "offline"
    return mode


class Tracker:
    """The loggers of one run, built by `check`, opened on first use and closed by `close`.

    A failure inside a logger is reported once and turns that logger off; the run goes on.

    Args:
        nodes: configurations of the loggers, by name.
        run_dir: the run's folder, where loggers write by default.
        run_id, name, group, tags: of the wandb run.
        config: the whole configuration, which loggers record.
    """

    def __init__(
        self,
        nodes: dict[str, dict[str, Any]],
        run_dir: Path,
        *,
        run_id: str,
        name: str,
        group: str,
        tags: list[str],
        config: dict[str, Any],
    ) -> None:
        self.nodes, self.run_dir, self.config = nodes, run_dir, config
        self._init: dict[str, Any] = {"name": name, "group": group, "job_type": "train", "config": config}
        self._init |= {"dir": str(run_dir), "tags": tags}
        if not in_wandb_sweep():  # an agent of `wandb sweep` has an id from the server
            self._init |= {"id": run_id, "resume": "allow"}
        self._run: Any = None
        self._off: set[str] = set()

    def check(self) -> None:
        """Build the loggers and raise errors of their configuration; wandb starts on first use."""
        if (name := self.wandb) is not None:
            node = self.nodes[name]
            check_keys(node, f"logger.{name}")
            check_choice(f"logger.{name}.mode", node.get("mode", "auto"), MODES)
            check_bool(f"logger.{name}.log_model", node.get("log_model", False))
        _ = self._loggers

    @cached_property
    def _loggers(self) -> list[Any]:
        """All loggers but wandb's, guarded."""
        loggers = []
        for name, target in self._classes.items():
            if name != self.wandb:
                fill = {"save_dir": str(self.run_dir)} if "save_dir" in parameters_of(target) else {}
                logger = build(fill | self.nodes[name], f"logger.{name}")
                for method in _CALLED:
                    setattr(logger, method, partial(self._guard, name, "logging", getattr(logger, method)))
                loggers.append(logger)
        return loggers

    @cached_property
    def _classes(self) -> dict[str, type]:
        from lightning.pytorch.loggers import Logger

        what = "one of Lightning's loggers (lightning.pytorch.loggers)"
        return {name: class_of(node, f"logger.{name}", Logger, what) for name, node in self.nodes.items()}  # type: ignore[type-abstract]

    @cached_property
    def wandb(self) -> str | None:
        """Name of the wandb logger, if there is one."""
        from lightning.pytorch.loggers import WandbLogger

        names = [name for name, target in self._classes.items() if issubclass(target, WandbLogger)]
        if len(names) > 1:
            raise ConfigError(f"logger.{names[1]}", names[1], f"logger.{names[0]} logs to wandb already; leave one out")
        return names[0] if names else None

    def _guard(self, name: str, what: str, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name in self._off:
            return None
        try:
            return action(*args, **kwargs)
        except Exception as error:  # the results are on disk anyway
            self._off.add(name)
            why = f"{type(error).__name__}: {first_line(error)}"
            log.warning("%s: %s failed (%s); the run goes on without it", name, what, why)
            return None

    def _start(self) -> Any:
        """Return the wandb run, started if need be; None if wandb is disabled."""
        assert self.wandb is not None
        if self._run is None:
            import wandb

            node = {
                k: v for k, v in self.nodes[self.wandb].items() if k not in (*_LOGGER_ALONE, "_target_", "log_model")
            }
            offline, mode = node.pop("offline", False), node.pop("mode", "auto")
            mode = wandb_mode("offline" if offline else mode)
            if mode == "disabled":
                self._off.add(self.wandb)
                return None
            node = {_OF_LIGHTNING.get(k, k): v for k, v in node.items() if v is not None}
            init = self._init | node | {"tags": [*self._init["tags"], *node.get("tags", ())]}
            settings = wandb.Settings(silent=True, console="off", init_timeout=30)
            try:
                self._run = wandb.init(**init, mode=mode, settings=settings)
            except Exception as error:
                if mode != "online":
                    raise
                log.warning("wandb: no connection (%s), logging offline", first_line(error))
                self._run = wandb.init(**init, mode="offline", settings=settings)
            for name, options in METRICS.items():
                self._run.define_metric(name, **options)
        return self._run

    def loggers(self) -> list[Any]:
        """Return the Lightning loggers for a training."""
        loggers = list(self._loggers)  # CSV: a resumed training gets its next version
        name = self.wandb
        if name is not None and (run := self._guard(name, "start", self._start)) is not None:
            node = self.nodes[name]
            more = {key: node[key] for key in _LOGGER_ALONE if key in node}
            logger = self._guard(name, "start", self._classes[name], experiment=run, **more)
            if logger is not None:
                logger.log_metrics = partial(self._guard, name, "logging", logger.log_metrics)
                loggers.append(logger)
        return loggers

    def results(self, row: dict[str, Any], folder: Path) -> None:
        """Log the results: summary keys, curve by history, chart, plots, tables, and the files as an artifact.

        Args:
            row: of ``results.json``.
            folder: of the evaluation; the rest is read from it.
        """
        from lightning.pytorch.loggers import CSVLogger

        summary = {key: row[name] for key, name in summary_keys().items() if row.get(name) is not None}
        for logger in self._loggers:
            if not isinstance(logger, CSVLogger):  # the same numbers as in results.json
                logger.log_hyperparams(flatten(self.config))
                logger.log_metrics(summary)
                logger.finalize("success")
        if self.wandb is not None:
            self._guard(self.wandb, "logging the results", self._send, summary, row, folder)

    def _send(self, summary: dict[str, Any], row: dict[str, Any], folder: Path) -> None:
        from iciia_exp.engine.wandb_media import charts, history, media, model_artifact, results_artifact, rounds

        if (run := self._start()) is None:
            return
        run.summary.update(summary)
        for step in (*history(folder), *rounds(folder)):
            run.log(step)
        run.log({**charts(row), **media(folder)})
        run.log_artifact(results_artifact(folder, row))
        if self.wandb is not None and self.nodes[self.wandb].get("log_model"):
            run.log_artifact(model_artifact(self.run_dir, row))

    def close(self, failed: bool = False) -> None:
        """Finish the wandb run, if there is one."""
        if self._run is not None:
            run, self._run = self._run, None
            try:
                run.finish(exit_code=int(failed))
            except Exception as error:
                log.warning("wandb: finishing failed (%s: %s)", type(error).__name__, error)
