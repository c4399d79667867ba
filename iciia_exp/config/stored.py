"""Stored objects: a class by its stable name and plain arguments; loading runs no code of a file's choosing.

Names are looked up among this package's classes, installed plug-ins (entry points), and plug-ins that the caller names.
Nothing is imported because a file says so.
"""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Iterable, Iterator
from functools import cache, partial
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, TypeVar

from hydra.utils import get_object

from iciia_exp.config.check import identity, parameters_of
from iciia_exp.errors import ConfigError, UserError, did_you_mean, first_line

__all__ = ["Plugins", "imported", "restore", "store"]

#: Classes, modules, or names of modules, whose classes may be loaded.
Plugins = Iterable[type | ModuleType | str]

_Base = TypeVar("_Base")

#: Entry-point group of plug-ins, by the package of their base class.
_ENTRY_POINTS = {"methods": "iciia_exp.methods", "models": "iciia_exp.backbones"}


def store(node: Any) -> Any:
    """Return a configuration as plain values: a node with a target becomes ``{"name": ..., "arguments": {...}}``."""
    if isinstance(node, list):
        return [store(v) for v in node]
    if not isinstance(node, dict):
        return node
    values = {k: store(v) for k, v in node.items() if not k.startswith("_")}
    return {"name": identity(get_object(node["_target_"])), "arguments": values} if "_target_" in node else values


def restore(stored: Any, base: type[_Base], plugins: Plugins = (), **runtime: Any) -> _Base:
    """Build the object that `store` described; raises `UserError`.

    Args:
        stored: its name and arguments.
        base: required base class. Arguments in its ``parts`` are stored objects as well, of the classes there, and are
            passed as ``functools.partial``.
        plugins: classes, modules or names of modules to search, in addition to the package and installed plug-ins.
        runtime: further arguments.
    """
    try:
        return _partial(stored, base, plugins, runtime)()
    except ConfigError as error:
        raise UserError(f"{stored['name']}: {error}") from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise UserError(f"{stored['name']}: its arguments do not fit ({first_line(error)})") from error


def _partial(stored: Any, base: type[_Base], plugins: Plugins, runtime: dict[str, Any]) -> partial[_Base]:
    """Return the constructor of a stored object with its arguments."""
    found = _class_of(stored, base, plugins)
    parts: dict[str, type] = getattr(found, "parts", {})
    arguments = {
        key: _partial(value, parts[key], plugins, {}) if key in parts and value is not None else _plain(value, key)
        for key, value in stored["arguments"].items()
    }
    parameters = parameters_of(found)
    if unknown := [key for key in arguments if key not in parameters or key in runtime]:
        raise UserError(f"{stored['name']}: has no argument {unknown[0]}; valid: {', '.join(parameters)}")
    return partial(found, **arguments, **runtime)


def _class_of(stored: Any, base: type[_Base], plugins: Plugins) -> type[_Base]:
    if not (isinstance(stored, dict) and set(stored) == {"name", "arguments"} and isinstance(stored["name"], str)):
        raise UserError(f"expected an object with name and arguments for a {base.__name__}")
    if not isinstance(stored["arguments"], dict):
        raise UserError(f"{stored['name']}: expected an object with its arguments")
    name = stored["name"]
    plugged = {identity(c): c for c in _named(base, plugins)}
    if (found := plugged.get(name) or _own(base, name)) is not None:  # type: ignore[arg-type]
        return found
    # entry points are searched last: it takes longer than loading a run
    classes = {identity(c): c for c in (*_all_own(base), *plugged.values(), *_installed(base))}
    if name not in classes:
        near = did_you_mean(name, classes, "")
        problem = f"no such {base.__name__} in this package or its plug-ins"
        hint = f"{near}{' Or ' * bool(near)}name the plug-in that it comes from: plugins=[...]"
        raise UserError(f"{name!r}: {problem}; {hint}")
    return classes[name]


def _classes(module: ModuleType, base: type[_Base]) -> Iterator[type[_Base]]:
    for value in vars(module).values():
        if inspect.isclass(value) and issubclass(value, base) and not inspect.isabstract(value):
            yield value


@cache
def _own(base: type[_Base], name: str) -> type[_Base] | None:
    """Return the subclass of a base in its subpackage with a stable name; None if there is none.

    Modules that are named like the class are searched first: importing all of them takes seconds.
    """

    def other(module: str) -> bool:
        return module.rpartition(".")[2].replace("_", "") != name.replace("_", "").lower()

    found = (c for module in sorted(_modules(base), key=other) for c in _classes(importlib.import_module(module), base))
    return next((c for c in found if identity(c) == name), None)


def _all_own(base: type[_Base]) -> list[type[_Base]]:
    return [found for module in _modules(base) for found in _classes(importlib.import_module(module), base)]


def _modules(base: type) -> list[str]:
    """Return the names of the modules in the subpackage of a base."""
    package = importlib.import_module(".".join(base.__module__.split(".")[:2]))
    return [i.name for i in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]


def _installed(base: type[_Base]) -> Iterator[type[_Base]]:
    group = _ENTRY_POINTS.get(base.__module__.split(".")[1])
    for entry in entry_points(group=group) if group else ():
        yield from _named(base, [entry.load()])


def _named(base: type[_Base], plugins: Plugins) -> Iterator[type[_Base]]:
    for plugin in imported(plugins):
        if isinstance(plugin, type):
            if issubclass(plugin, base):
                yield plugin
        else:
            yield from _classes(plugin, base)


def imported(plugins: Plugins) -> tuple[type | ModuleType, ...]:
    """Return plug-ins with modules in place of their names; raises a `UserError` for one that cannot be imported."""
    found: list[type | ModuleType] = []
    for plugin in plugins:
        try:
            found.append(importlib.import_module(plugin) if isinstance(plugin, str) else plugin)
        except Exception as error:  # of any kind: it is the user's code
            raise UserError(f"plug-in {plugin}: cannot be imported ({first_line(error)})") from error
    return tuple(found)


def _plain(value: Any, key: str) -> Any:
    """Return a number, text, or a flat list of them; raise for anything else."""
    if isinstance(value, list) and all(not isinstance(v, list | dict) for v in value):
        return [_plain(v, key) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}: must be finite")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"{key}: expected a plain value, not {type(value).__name__}")
