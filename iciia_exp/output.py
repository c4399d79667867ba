"""Output of commands: no character, closed pipe or terminal ends a run, and errors are one line."""

import codecs
import contextlib
import os
import sys
from collections.abc import Callable

from iciia_exp.errors import UserError, printable

__all__ = ["discard_output", "exit_status", "os_error", "print_error", "robust_streams"]

#: What a terminal shows that does not know the character.
_PLAIN = {"±": "+-", "–": "-", "—": "-", "…": "...", "×": "x", "→": "->", "µ": "u", "“": '"', "”": '"', "’": "'"}


def _replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(char, char.encode("ascii", "backslashreplace").decode()) for char in text), error.end


codecs.register_error("iciia_exp", _replace)


def robust_streams() -> None:
    """Let standard output and error write every character, in another form where their encoding does not have it.

    Where they are closed, they write nowhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="iciia_exp")


def print_error(error: object) -> None:
    """Print an error for a user, without control characters; a layout of folders has several lines."""
    print(f"error: {printable(error)}", file=sys.stderr)


def os_error(error: OSError) -> str:
    """Return the file and the problem of an error of the system; without a file it is of the output, on a full disk.

    An error of neither is raised again.
    """
    if error.strerror is None:
        raise error
    if error.filename is None:
        discard_output()
    return f"{error.filename or 'output'}: {error.strerror}"


def discard_output() -> None:
    """Write what is still to be written to standard output nowhere, so that Python does not fail at its end."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_status(work: Callable[[], int], failed: int) -> int:
    """Do the work of a command and return its exit status; errors that a user can act on are printed.

    Args:
        work: returns the exit status.
        failed: exit status after an error.
    """
    robust_streams()
    try:
        status = work()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has read enough
        discard_output()
        return 0
    except OSError as error:
        print_error(os_error(error))
        return failed
    except UserError as error:
        print_error(error)
        return failed
