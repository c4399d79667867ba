"""Progress bars, on terminals only; nothing in log files and pipes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["TrainingProgress", "fraction_bar", "progress_bar"]


def progress_bar(visible: bool = True) -> Progress:
    """Return a rich progress bar on standard error that vanishes when stopped; silent where that is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(
        *columns, console=Console(file=sys.stderr), transient=True, disable=not (visible and sys.stderr.isatty())
    )


@contextmanager
def fraction_bar(title: str) -> Iterator[Callable[[float], None]]:
    """Show a bar for work that says which share of it is done."""
    with progress_bar() as bar:
        task = bar.add_task(title, total=100, note="%")
        yield lambda share: bar.update(task, completed=round(100 * share))


class TrainingProgress(pl.Callback):
    """A bar over the epochs of a training with its last metrics beside it; keeps the time that training took.

    The time is part of the checkpoint, so that a resumed training reports all of it.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.seconds = 0.0
        self._since = 0.0
        self._bar: Progress | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds so far."""
        self._tick()
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the seconds of an earlier attempt."""
        self.seconds = float(state_dict["seconds"])

    def _tick(self) -> None:
        now = time.monotonic()
        if self._since:
            self.seconds += now - self._since
        self._since = now

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        self._since = time.monotonic()
        self._bar = progress_bar()
        self._bar.start()
        self._task = self._bar.add_task(self.title, total=trainer.max_epochs, completed=trainer.current_epoch, note="")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Advance by one epoch."""
        names: Any = getattr(pl_module, "shown", ())
        shown = {n.rsplit("/", 1)[-1]: float(v) for n, v in trainer.callback_metrics.items() if n in names}
        note = "  ".join(f"{n} {v:.3f}" for n, v in shown.items())
        assert self._bar is not None
        self._bar.update(self._task, completed=trainer.current_epoch + 1, note=note)

    def _close(self) -> None:
        if self._bar is not None:
            self._tick()
            self._bar.stop()
            self._bar = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar before the error is shown."""
        self._close()
