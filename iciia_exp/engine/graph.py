"""Graph of artifacts: each is made once from those that it needs, and found again by a digest of what made it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from iciia_exp.artifacts import make_folder
from iciia_exp.digest import digest
from iciia_exp.errors import UserError

__all__ = ["Artifact", "NotMade", "ensure"]

log = logging.getLogger(__name__)

#: Bumped when the same configuration would give other numbers than before.
FORMAT = 2


@dataclass(frozen=True)
class Artifact:
    """A folder that a stage makes: ``<root>/<label>-<digest>``.

    Args:
        kind: what it is (``features``), for messages; one of the names that `ensure` is given.
        label: readable start of its folder's name; changes nothing else.
        science: plain values that can change a number in it, beside what its needs say.
        needs: artifacts that it is made from.
        make: makes it in a folder, continuing what a killed attempt left there; writes ``last`` last.
        root: the folder that it lies in.
        last: file that it ends with; a folder without it is unfinished.
        in_place: it is made in its own folder, not aside in ``<folder>.partial``: what is inside has its own marks of
            being whole, and loggers keep files open there.
        report: called with the folder, and whether it was made just now.
    """

    kind: str
    label: str
    science: Any
    make: Callable[[Path], None]
    root: Path
    needs: tuple[Artifact, ...] = ()
    last: str = "manifest.json"
    in_place: bool = False
    report: Callable[[Path, bool], None] | None = None

    @cached_property
    def digest(self) -> str:
        """Names the artifact: 12 hexadecimal digits of all that can change a number in it."""
        return digest([FORMAT, self.kind, self.science, [need.digest for need in self.needs]])

    @property
    def folder(self) -> Path:
        """Where it lies when it is finished."""
        return self.root / f"{self.label}-{self.digest}"

    @property
    def finished(self) -> bool:
        """Whether it is there and whole."""
        return (self.folder / self.last).is_file()


class NotMade(UserError):
    """An artifact that is needed, and that the stages asked for do not make."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(f"{artifact.folder} is not there")
        self.artifact = artifact


def ensure(goal: Artifact, kinds: Collection[str]) -> Path:
    """Return the folder of ``goal``, made now if it is not finished; what it needs comes first.

    A finished artifact asks for nothing that it was made from.

    Args:
        goal: the artifact.
        kinds: kinds that may be made now. Where another one is missing, `NotMade` names the first to make.
    """
    if goal.finished:
        _report(goal, made=False)
        return goal.folder
    if goal.kind not in kinds:
        raise NotMade(_first_missing(goal))
    for need in goal.needs:
        if not need.finished:
            ensure(need, kinds)
    what = f"{goal.kind} {goal.label}"
    _report(goal, make_folder(goal.folder, what, goal.make, goal.last, goal.in_place))
    return goal.folder


def _report(goal: Artifact, made: bool) -> None:
    if goal.report is not None:
        goal.report(goal.folder, made)


def _first_missing(goal: Artifact) -> Artifact:
    missing = [need for need in goal.needs if not need.finished]
    return _first_missing(missing[0]) if missing else goal
