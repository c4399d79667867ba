"""Build: instantiate checked configurations. No other module instantiates."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from iciia_exp.config.check import check_keys
from iciia_exp.errors import ConfigError, UserError, first_line, within

__all__ = ["build", "no_memory", "with_path"]

_Made = TypeVar("_Made")

_TOO_LARGE = "does not fit into this machine's memory; choose smaller sizes"


def with_path(path: str, function: Callable[[], _Made]) -> _Made:
    """Call a constructor; errors name the path of its configuration."""
    try:
        return within(path, function)
    except (RuntimeError, MemoryError) as error:
        if not no_memory(error):
            raise
        raise UserError(f"{path}: {_TOO_LARGE}") from error
    except InstantiationException as error:
        cause = error.__cause__
        inner = re.search(r"full_key: (\S+)", str(error))
        where = path if inner is None else f"{path}.{inner.group(1)}"
        if isinstance(cause, ConfigError):
            raise cause.at(f"{where}.{cause.key}") from error
        if isinstance(cause, UserError):
            raise cause from error
        if missing := re.search(r"missing \d+ required [\w -]*argument[^']*'(\w+)'", str(cause)):
            raise UserError(f"{where}.{missing[1]}: is missing; give it a value") from error
        raise UserError(f"{where}: {_TOO_LARGE if no_memory(cause) else first_line(cause or error)}") from error


def no_memory(error: BaseException | None) -> bool:
    """Return whether an error says that memory is full: NumPy's, or PyTorch's of CPU or GPU."""
    return isinstance(error, MemoryError) or re.search("allocate memory|out of memory", str(error)) is not None


def build(node: dict[str, Any], path: str, **runtime: Any) -> Any:
    """Instantiate a group's resolved configuration; ``runtime`` are arguments that the engine provides."""
    check_keys(node, path)
    return with_path(path, lambda: instantiate(node, **runtime, _convert_="all"))
