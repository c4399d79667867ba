"""Options that the commands of this package share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iciia_exp.models.backbones.base import Backbone
    from iciia_exp.serving.run import Run

__all__ = ["WEIGHTS_HELP", "add_backbone", "add_run", "chosen_backbone", "chosen_run"]

WEIGHTS_HELP = "of the backbone, if it was loaded from a file"


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the run and ``--plugin``."""
    parser.add_argument("run", metavar="RUN", help="directory of a run")
    what = "module with the method or backbone, if they are yours (mine.mean_prior); several times for several"
    parser.add_argument("--plugin", action="append", default=[], metavar="MODULE", help=what)


def chosen_run(options: argparse.Namespace) -> Run:
    """Load the run."""
    from iciia_exp.serving.run import Run

    return Run.load(options.run, options.plugin)


def add_backbone(parser: argparse.ArgumentParser, why: str) -> None:
    """Add ``--with-backbone`` and ``--weights``."""
    parser.add_argument("--with-backbone", action="store_true", help=why)
    parser.add_argument("--weights", type=Path, metavar="FILE", help=WEIGHTS_HELP)


def chosen_backbone(run: Run, options: argparse.Namespace) -> Backbone | None:
    """Return the run's backbone if an option asks for it."""
    return run.load_backbone(options.weights) if options.with_backbone or options.weights else None
