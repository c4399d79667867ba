"""Source: the user's own code, which counts in digests as settings do."""

import ast
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeGuard

from iciia_exp.digest import digest

__all__ = ["source_digest"]

_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})

_ALL = "*"


class _Code(NamedTuple):
    """What is in a file."""

    lines: list[str]
    #: Statements that define each top-level name.
    nodes: dict[str, list[ast.stmt]]
    #: Modules that each imported name is of, and what it is there: a name, or all.
    imports: dict[str, list[tuple[str, str]]]


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


def _follow(module: ModuleType | None, name: str, parts: dict[tuple[str, str], str]) -> None:
    """Collect the text of a top-level name of a module, or of all of it, and of all that it names."""
    if not _own(module) or (module.__name__, name) in parts:
        return
    code = _read(module)
    if name == _ALL:
        parts[module.__name__, name] = _text(code.lines)
    elif name in code.nodes:
        nodes = code.nodes[name]
        parts[module.__name__, name] = "".join(_text(code.lines[_first(n) - 1 : n.end_lineno]) for n in nodes)
        found = {node.id for part in nodes for node in ast.walk(part) if isinstance(node, ast.Name)}
        for other in sorted(found | {_ALL}):  # what stars import may be named as well
            for place, there in code.imports.get(other, ()):
                inner = sys.modules.get(f"{place}.{there}")  # a module of a package
                _follow(*((sys.modules.get(place), there) if inner is None else (inner, _ALL)), parts)
            if other in code.nodes:
                _follow(module, other, parts)


def _own(module: ModuleType | None) -> TypeGuard[ModuleType]:
    """Whether a module is a file that is neither installed nor of this package."""
    file = getattr(module, "__file__", None)
    if module is None or file is None or not file.endswith(".py") or file.startswith(_INSTALLED):
        return False
    return module.__name__.partition(".")[0] != __name__.partition(".")[0] and Path(file).is_file()


def _read(module: ModuleType) -> _Code:
    path = Path(str(module.__file__))
    return _read_file(path, path.stat().st_mtime_ns, module.__package__ or "")


@lru_cache(64)
def _read_file(path: Path, changed: int, package: str) -> _Code:
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError):  # changed since it was imported
        return _Code([], {}, {})
    code = _Code(text.splitlines(), {}, {})
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            code.nodes.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}:
                    code.nodes.setdefault(name, []).append(node)
    for name, place, there in _imports(tree, package):
        code.imports.setdefault(name, []).append((place, there))
    return code


def _imports(tree: ast.Module, package: str) -> Iterator[tuple[str, str, str]]:
    """Yield names that are imported anywhere in a file, the modules that they are of, and what they are there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], alias.name, _ALL
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            place = importlib.util.resolve_name(relative, package) if node.level else relative
            for alias in node.names:
                yield alias.asname or alias.name, place, alias.name


def _first(node: ast.stmt) -> int:
    """Return the number of a statement's first line, that of decorators included."""
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])


def _text(lines: list[str]) -> str:
    """Return lines without blank ones and those that are comments."""
    return "\n".join(line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
