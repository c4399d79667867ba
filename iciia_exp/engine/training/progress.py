"""Progress bars, on terminals only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["fraction_bar", "progress_bar"]


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
