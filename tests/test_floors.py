"""A floor imports only from itself or below."""

import ast
from pathlib import Path

import iciia_exp

PACKAGE = Path(iciia_exp.__file__).parent

FLOORS = {"data": 1, "models": 2, "methods": 2, "engine": 3, "report": 3}
TOP = {"__main__": 4, "cache": 4, "dashboard": 4}


def floor(module):
    """Return the floor of ``iciia_exp.<module>``."""
    first = module.split(".")[0]
    if first in FLOORS:
        return FLOORS[first]
    return TOP.get(first, 0)


def imports(path):
    """Yield the modules of this package that a file imports, late imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("iciia_exp"):
            rest = node.module.removeprefix("iciia_exp").lstrip(".")
            if rest:
                yield rest
            else:
                yield from (alias.name for alias in node.names if (PACKAGE / f"{alias.name}.py").exists())
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("iciia_exp.") for a in node.names if a.name.startswith("iciia_exp."))
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"


def test_every_module_imports_from_its_own_floor_or_below():
    files = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"]
    assert len(files) > 25
    wrong = []
    for path in files:
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        wrong += [f"{module} -> {name}" for name in imports(path) if floor(name) > floor(module)]
    assert not wrong


def test_hydra_and_wandb_stay_in_the_engine():
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if floor(module) >= 3:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] in ("hydra", "omegaconf", "wandb") for n in names), path
