"""Options that the commands of this package share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iciia_exp.models.backbones.base import Backbone
    from iciia_exp.serving.run import Run

__all__ = ["WEIGHTS_HELP", "add_backbone", "chosen_backbone"]

WEIGHTS_HELP = "of the backbone, if it was loaded from a file"


def add_backbone(parser: argparse.ArgumentParser, why: str) -> None:
    """Add ``--with-backbone`` and ``--weights``."""
    parser.add_argument("--with-backbone", action="store_true", help=why)
    parser.add_argument("--weights", type=Path, metavar="FILE", help=WEIGHTS_HELP)


def chosen_backbone(run: Run, options: argparse.Namespace) -> Backbone | None:
    """Return the run's backbone if an option asks for it."""
    return run.load_backbone(options.weights) if options.with_backbone or options.weights else None
