"""Errors that a user can act on: one line that names the key or file, what is wrong and what would be right."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, TypeVar

__all__ = [
    *("ConfigError", "NotApplicable", "UserError", "check_bool", "check_choice", "check_float", "check_int"),
    *("did_you_mean", "first_line", "nearest", "printable", "within"),
]

_Made = TypeVar("_Made")


class UserError(Exception):
    """Something the user can put right. The command line prints it as one line, without a traceback."""


class ConfigError(UserError):
    """A configuration value that cannot be used.

    Constructors name their own argument (``key="groups"``); `within` adds what it is a part of in front. An empty key
    is that group itself (``key="", value="owner"`` becomes ``partition=owner``).
    """

    def __init__(self, key: str, value: Any, problem: str) -> None:
        self.key, self.value, self.problem = key, value, problem
        super().__init__(key, value, problem)  # the arguments, so that the error survives pickling between processes

    def __str__(self) -> str:
        key = f"{self.key}=" if self.key else ""
        return f"{key}{printable(self.value, lines=False)}: {self.problem}"

    def at(self, key: str) -> ConfigError:
        """Return the same error with another key."""
        return type(self)(key, self.value, self.problem)


class NotApplicable(ConfigError):
    """A method that cannot run on these clients, this task or this backbone. A sweep leaves it out."""


def within(path: str, function: Callable[[], _Made]) -> _Made:
    """Call ``function``; its `ConfigError` gets ``path`` in front of the key."""
    try:
        return function()
    except ConfigError as error:
        raise error.at(f"{path}.{error.key}" if error.key else path) from error


def first_line(text: object) -> str:
    """Return the first line of a text or an error that says something; "unknown error" where none does.

    >>> first_line(ValueError("  too big\\nby far"))
    'too big'
    """
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[0] if lines else "unknown error"


def printable(text: object, lines: bool = True) -> str:
    """Return a text with escapes for control characters, which could change what a terminal shows.

    Args:
        text: the text, or an object with one.
        lines: whether line breaks and tabs stay.

    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(
        char if char.isprintable() or (lines and char in "\n\t") else char.encode("unicode_escape").decode()
        for char in shown
    )


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice most like ``word``, another one than it, or None when nothing is close.

    >>> nearest("grups", ["groups", "heads", "seed"])
    'groups'
    >>> nearest("xyz", ["groups", "heads"]) is None
    True
    """
    choices = [choice for choice in choices if choice != word]
    found = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if not found and "." not in word:  # `lr` for `training.recipe.lr`: compare with the last part alone
        by_leaf: dict[str, str] = {}
        for choice in choices:
            by_leaf.setdefault(choice.rsplit(".", 1)[-1], choice)
        leaf = difflib.get_close_matches(word, list(by_leaf), n=1, cutoff=0.7)
        found = [by_leaf[leaf[0]]] if leaf else []
    return found[0] if found else None


def did_you_mean(word: str, choices: Iterable[str], otherwise: str) -> str:
    """Return a question with the choice most like ``word``, or ``otherwise`` when nothing is close."""
    near = nearest(word, choices)
    return f"did you mean {near}?" if near else otherwise


def check_int(key: str, value: Any, low: int, high: int | None = None, why: str = "") -> int:
    """Return ``value`` as an integer of ``low..high``, or raise a `ConfigError` that says the range.

    >>> check_int("heads", 4, 1)
    4
    >>> check_int("heads", 0, 1)
    Traceback (most recent call last):
    iciia_exp.errors.ConfigError: heads=0: must be a whole number of at least 1
    """
    wrong = isinstance(value, bool) or not isinstance(value, Integral)
    value = value if wrong else int(value)  # of NumPy, too
    if not wrong and high is None and value >= 2**63:
        high = 2**63 - 1
    span = f"at least {low}" if high is None else f"{low} to {high}"
    if wrong or value < low or (high is not None and value > high):
        raise ConfigError(key, value, f"must be a whole number of {span}" + (f" ({why})" if why else ""))
    return value


def check_float(key: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """Return ``value`` as a finite float in [low, high], or (low, high] with ``open_low``."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < low or value > high or (open_low and value == low):
        span = (f"above {low:g}" if open_low else f"at least {low:g}") + (
            "" if high == math.inf else f", at most {high:g}"
        )
        raise ConfigError(key, value, f"must be a number {span}")
    return float(value)


def check_bool(key: str, value: Any) -> bool:
    """Return ``value`` if it is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(key, value, "must be true or false")
    return value


def check_choice(key: str, value: Any, choices: Sequence[Any]) -> Any:
    """Return ``value`` if it is one of ``choices``; the error names them all and the nearest."""
    if value not in choices:
        near = nearest(str(value), [str(c) for c in choices])
        hint = f"; did you mean {near}?" if near else ""
        raise ConfigError(key, value, f"must be one of {', '.join(map(str, choices))}{hint}")
    return value
