"""Several processes of one command: those that torchrun or srun started, and those that this one starts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from iciia_exp.errors import UserError, first_line

__all__ = ["plain_errors", "process_count", "process_rank"]

# what a traceback says of an error of ours
_OURS = re.compile(r"iciia_exp\.errors\.(?:User|Config)Error: ")


def _started() -> tuple[int, int]:
    for rank, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if (number := int(os.environ.get(count) or 1)) > 1:
            return int(os.environ.get(rank) or 0), number
    return 0, 1


def process_rank() -> int:
    """Return the number of this process where torchrun or srun started several, else 0."""
    return _started()[0]


def process_count() -> int:
    """Return how many processes torchrun or srun started, else 1."""
    return _started()[1]


@contextmanager
def plain_errors(what: str) -> Iterator[None]:
    """Raise an error of ours from a process below as itself: torch hands it up inside its own, as tracebacks.

    ``what`` names, for other errors, the key that asked for the processes.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        if found := list(_OURS.finditer(text)):
            raise UserError(text[found[-1].end() :].strip()) from error
        if type(error).__name__ == "ProcessExitedException":  # killed, by the system for its memory say
            raise UserError(f"{what}: {first_line(error)}; the same command goes on from here") from error
        raise
