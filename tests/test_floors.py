"""A floor imports only from itself or below; the engine and the report do not know each other."""

import ast
from pathlib import Path

import iciia_exp

PACKAGE = Path(iciia_exp.__file__).parent

FLOORS = {
    **{"results": 1, "data": 1, "models": 2, "methods": 3, "config": 3, "serving": 4, "engine": 4, "report": 5},
    **{"__main__": 5, "cache": 5, "dashboard": 5},
}

#: Rooms of one floor, or of neighbouring ones, that may not import each other.
STRANGERS = {("engine", "report"), ("report", "engine"), ("serving", "engine"), ("methods", "config")}


def room(module):
    """Return the room of ``iciia_exp.<module>``."""
    return module.split(".")[0]


def floor(module):
    """Return the floor of ``iciia_exp.<module>``; a module outside of all rooms is a pure function: floor 0."""
    return FLOORS.get(room(module), 0)


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


def arrows():
    """Yield (module, imported module) of the whole package."""
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module != "__init__":  # it hands out names from everywhere, late
            yield from ((module, name) for name in imports(path))


def test_every_module_imports_from_its_own_floor_or_below():
    assert len(list(arrows())) > 300
    assert not [f"{module} -> {name}" for module, name in arrows() if floor(name) > floor(module)]


def test_strangers_do_not_import_each_other():
    assert not [f"{module} -> {name}" for module, name in arrows() if (room(module), room(name)) in STRANGERS]


def test_hydra_and_wandb_stay_above_the_methods():
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if floor(module) >= 4 or room(module) == "config":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] in ("hydra", "omegaconf", "wandb") for n in names), path
