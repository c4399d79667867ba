"""Source: the user's own code, which counts in digests as settings do."""

import ast
import inspect
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

from iciia_exp.digest import digest

__all__ = ["source_digest"]

_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


@cache
def source_digest(target: Any) -> str | None:
    """Return a digest of the code of a class or function, without comments and blank lines.

    All that the code names counts: base classes, functions and constants of its module, and what that module imports
    from other files of the user's. Data files do not count. None for what is installed, or of this package, and where
    there is no file.
    """
    parts: dict[tuple[str, str], str] = {}
    if _own(module := sys.modules.get(target.__module__)):
        _follow(module, target.__qualname__.partition(".")[0], parts)
    # without the modules' names: a class may move
    return digest(sorted([name, text] for (_, name), text in parts.items())) if parts else None


def _follow(module: ModuleType, name: str, parts: dict[tuple[str, str], str]) -> None:
    """Collect the text of a top-level name of a module, and of all that it names, by module and name."""
    if (module.__name__, name) in parts:
        return
    nodes, lines = _top_level(module)
    for node in nodes.get(name, ()):
        text = "\n".join(_code(lines[_first_line(node) - 1 : node.end_lineno]))
        parts[module.__name__, name] = parts.get((module.__name__, name), "") + text
    if name in nodes:
        found = {node.id for part in nodes[name] for node in ast.walk(part) if isinstance(node, ast.Name)}
        for other in sorted(found - {name}):
            _follow(module, other, parts)
        return
    value = vars(module).get(name)
    if isinstance(value, ModuleType):
        if _own(value):
            parts[value.__name__, ""] = "\n".join(_code(_top_level(value)[1]))
    elif inspect.isclass(value) or inspect.isfunction(value):
        place = sys.modules.get(value.__module__)
        if place is not module and _own(place):
            _follow(place, value.__qualname__.partition(".")[0], parts)


def _own(module: ModuleType | None) -> TypeGuard[ModuleType]:
    """Whether a module is a file that is neither installed nor of this package."""
    file = getattr(module, "__file__", None)
    if module is None or file is None or not file.endswith(".py") or file.startswith(_INSTALLED):
        return False
    return module.__name__.partition(".")[0] != __name__.partition(".")[0] and Path(file).is_file()


def _top_level(module: ModuleType) -> tuple[dict[str, list[ast.stmt]], list[str]]:
    """Return the statements that define each top-level name of a module, and its lines."""
    text = Path(str(module.__file__)).read_text(encoding="utf-8")
    nodes: dict[str, list[ast.stmt]] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            nodes.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for part in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for named in ast.walk(part):
                    if isinstance(named, ast.Name):
                        nodes.setdefault(named.id, []).append(node)
    return nodes, text.splitlines()


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])


def _code(lines: list[str]) -> list[str]:
    """Return lines without comments of their own and blank ones."""
    return [line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
