"""Terminal: log lines and tables on standard output, progress bars on standard error."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from iciia_exp.errors import printable
from iciia_exp.output import robust_streams
from iciia_exp.results.columns import backbone_cell, cell, columns_of
from iciia_exp.results.tables import backbone_line, settings, unbalanced

__all__ = ["console", "fraction_bar", "log_file", "partition_table", "progress_bar", "result_table", "setup_logging"]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on: Rich would end the run if nobody reads its output any more."""


def console() -> Console:
    """Return a console on the current standard output, 120 columns wide where that is no terminal.

    Text is printed as it is, without Rich's markup.
    """
    robust_streams()
    out = _Console(highlight=False, markup=False, emoji=False)
    return out if out.is_terminal else _Console(highlight=False, markup=False, emoji=False, width=120)


class _Stdout(logging.StreamHandler):
    """Writes each record to the current standard output; warnings and errors begin with their level."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Go on if nobody reads the output any more."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def format(self, record: logging.LogRecord) -> str:
        warns = record.levelno >= logging.WARNING
        text = printable(super().format(record), lines=not warns)
        return f"{record.levelname.lower()}: {text}" if warns else text


class _RunLog(logging.FileHandler):
    """Keeps records until the folder of its file exists."""

    def __init__(self, path: Path, encoding: str, delay: bool) -> None:
        super().__init__(path, encoding=encoding, delay=delay)
        self._folder, self._waiting = path.parent, list[logging.LogRecord]()

    def emit(self, record: logging.LogRecord) -> None:
        self._waiting.append(record)
        if self._folder.is_dir():
            for waiting in self._waiting:
                super().emit(waiting)
            self._waiting.clear()


def setup_logging() -> None:
    """Send the package's log messages to standard output; may be called again."""
    robust_streams()
    logger = logging.getLogger("iciia_exp")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not any(isinstance(h, _Stdout) for h in logger.handlers):
        logger.addHandler(_Stdout())


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append the package's log messages to a file, with their time; an error that ends the block with its traceback.

    Nothing is written before the file's folder exists.
    """
    handler = _RunLog(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("iciia_exp")
    logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        trace = type(error), error, error.__traceback__
        handler.handle(logger.makeRecord(logger.name, logging.ERROR, __file__, 0, "stopped", (), trace))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


def partition_table(statistics: pd.DataFrame) -> Table:
    """Return a table of the numbers of clients, images and classes of each role."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("partition")
    for name in ("clients", "images", "distinct", "images per client", "classes per client"):
        table.add_column(name, justify="right")
    for row in statistics.to_dict("records"):
        spread = [f"{row[f'{k}_mean']:.1f} ± {row[f'{k}_sd']:.1f}" for k in ("images", "classes")]
        counts = [f"{row[k]:,}" for k in ("clients", "images", "distinct_images")]
        table.add_row(row["role"], *counts, *spread)
    return table


def result_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a table in percent: a line of the backbone, and a line per setting, averaged over seeds.

    Gains are over the backbone on the same images. The interval of one run is that over clients, 95 %; ``±`` of
    several runs is the standard error over runs. The share of harmed clients by chance alone is in brackets.

    Args:
        rows: results with the same `base_of`.
    """
    several = len({r["digest"] for r in rows}) > len({r["setting_digest"] for r in rows})
    columns = [column for column in columns_of(rows[0]["task"]) if column.console and (several or column.key != "runs")]
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")  # 91 columns of text
    table.caption_justify = "left"
    table.add_column("method", overflow="fold")
    for column in columns:
        spread = ("\n± s.e." if several else "\n[95 %]") if "low" in column.console_errors else ""
        table.add_column(column.console + spread, justify="right", overflow="fold")
    found = settings(list(rows))
    base = backbone_line(found)
    alone = {column.key: backbone_cell(base, column, column.console_errors) for column in columns}
    if several:
        alone["runs"] = str(base["runs"])
    table.add_row(printable(f"{rows[0]['backbone']} alone", lines=False), *alone.values())
    for _, row in found.sort_values("sequence_macs", kind="stable").iterrows():
        if row["method"] != "backbone":
            cells = (cell(row, c.key, c.form, c.console_errors) for c in columns)
            table.add_row(printable(row["label"], lines=False), *cells)
    table.caption = unbalanced(found) or None
    return table


def progress_bar(visible: bool = True) -> Progress:
    """Return a transient progress bar on standard error, hidden where that is no terminal."""
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
    """Show a bar; yield a function that sets the share of the work that is done."""
    with progress_bar() as bar:
        task = bar.add_task(title, total=100, note="%")
        yield lambda share: bar.update(task, completed=round(100 * share))
