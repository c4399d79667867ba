"""Graph of artifacts: folders made once from other artifacts, and found again by a digest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from iciia_exp.artifacts import finished_folder, folder_name, make_folder
from iciia_exp.digest import digest
from iciia_exp.errors import UserError

__all__ = ["Artifact", "NotMade", "ensure"]

log = logging.getLogger(__name__)

#: Increased when the same configuration gives other numbers than before.
FORMAT = 2


@dataclass(frozen=True)
class Artifact:
    """A folder that a stage makes: ``<root>/<label>-<digest>``.

    Args:
        kind: such as ``features``; `ensure` selects by it.
        label: readable start of the folder's name; characters other than letters, digits, ``.``, ``_`` and ``-``
            become ``_``.
        science: plain values that can change a number in it, in addition to its needs' digests.
        needs: artifacts that it is made from.
        make: makes it in a folder, continues a killed attempt there, and writes ``last`` last.
        root: parent of the folder.
        last: last file; a folder without it is unfinished.
        in_place: whether it is made in the final folder, not in ``<folder>.partial``: its files have their own marks of
            completion, and loggers keep files open there.
        together: whether several processes make it together, with locks of its own for its parts.
        report: called with the folder, and whether it was made just now.
        shown: keys of ``science`` that add tables and plots, and change no figure.
    """

    kind: str
    label: str
    science: Any
    make: Callable[[Path], None]
    root: Path
    needs: tuple[Artifact, ...] = ()
    last: str = "manifest.json"
    in_place: bool = False
    together: bool = False
    report: Callable[[Path, bool], None] | None = None
    shown: Collection[str] = ()

    @cached_property
    def digest(self) -> str:
        """12 hexadecimal digits of everything that can change a number in it."""
        return digest([FORMAT, self.kind, self.science, [need.digest for need in self.needs]])

    @cached_property
    def setting(self) -> str:
        """12 hexadecimal digits, the same for artifacts that differ in seeds and in what is ``shown`` only."""
        science = _without({"seed", *self.shown}, self.science)
        return digest([FORMAT, self.kind, science, [need.setting for need in self.needs]])

    @property
    def folder(self) -> Path:
        """Its folder when it is finished."""
        return self.root / f"{folder_name(self.label)}-{self.digest}"

    @property
    def finished(self) -> bool:
        """Whether the folder is there and complete."""
        return finished_folder(self.folder, self.last, self.in_place)


class NotMade(UserError):
    """An artifact is missing whose kind may not be made now."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(f"{artifact.folder} is not there")
        self.artifact = artifact


def ensure(goal: Artifact, kinds: Collection[str]) -> Path:
    """Return the folder of ``goal``; make it, after its missing needs, if it is not finished.

    A finished artifact does not need the artifacts that it was made from.

    Args:
        goal: the artifact.
        kinds: kinds that may be made now; `NotMade` names the first missing artifact of another kind.
    """
    made = False
    if not goal.finished:
        if goal.kind not in kinds:
            raise NotMade(_first_missing(goal))
        for need in goal.needs:
            if not need.finished:
                ensure(need, kinds)
        what = f"{goal.kind} {goal.label}"
        made = make_folder(goal.folder, what, goal.make, goal.last, goal.in_place, goal.together)
    if goal.report is not None:
        goal.report(goal.folder, made)
    return goal.folder


def _without(keys: Collection[str], values: Any) -> Any:
    """Return nested plain values without some keys."""
    if isinstance(values, dict):
        return {key: _without(keys, value) for key, value in values.items() if key not in keys}
    return [_without(keys, value) for value in values] if isinstance(values, list | tuple) else values


def _first_missing(goal: Artifact) -> Artifact:
    missing = [need for need in goal.needs if not need.finished]
    return _first_missing(missing[0]) if missing else goal
