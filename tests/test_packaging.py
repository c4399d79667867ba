"""What is declared: every import is a dependency, every dependency has its lowest version, files are listed."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import iciia_exp

ROOT = Path(__file__).parents[1]
PACKAGE = Path(iciia_exp.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

#: Needed by name, not by import: pandas writes Markdown with it.
NOT_IMPORTED = {"tabulate"}

#: Extras whose packages this package imports, where they are needed.
OPTIONAL = ("video", "dashboard", "faiss", "flower", "route", "export", "serve")


def names(requirements):
    return {canonicalize_name(Requirement(text).name) for text in requirements}


CORE = names(PROJECT["project"]["dependencies"])
EXTRAS = {name: names(found) for name, found in PROJECT["project"]["optional-dependencies"].items()}


def imported(source, late=True):
    """Return the distributions that a module imports; ``late=False`` leaves out imports within functions and types."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree)) if late else tree.body
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    tops = {module.split(".")[0] for module in modules} - {*sys.stdlib_module_names, "iciia_exp"}
    return {canonicalize_name(name) for top in tops for name in DISTRIBUTIONS.get(top, [top])}


DISTRIBUTIONS = packages_distributions()
SOURCES = {path.relative_to(PACKAGE): path.read_text() for path in PACKAGE.rglob("*.py")}


def test_every_import_is_declared():
    optional = set().union(*(EXTRAS[name] for name in OPTIONAL))
    for path, source in SOURCES.items():
        assert imported(source) <= CORE | optional, path
        assert imported(source, late=False) <= CORE, path


def test_everything_declared_is_imported():
    assert set().union(*map(imported, SOURCES.values())) >= CORE - NOT_IMPORTED


def test_an_import_is_found():
    source = (
        "import os, PIL.Image\nfrom iciia_exp import Run\ndef f():\n    from yaml.nodes import Node\n    import nowhere"
    )
    assert imported(source) == {"pillow", "pyyaml", "nowhere"}
    assert imported(source, late=False) == {"pillow"}


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_every_dependency_has_its_lowest_version(extra):
    project = PROJECT["project"]
    for text in project["dependencies"] if extra is None else project["optional-dependencies"][extra]:
        needed = Requirement(text)
        lowest = [s for s in needed.specifier if s.operator == ">="]
        stubs = needed.name.startswith("types-") or needed.name.endswith("-stubs")  # those of the package's version
        assert len(lowest) == 1 or stubs or needed.name == project["name"], text


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_files_of_the_source_distribution_are_there():
    for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert (ROOT / name).exists(), name


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == iciia_exp.__version__
    assert citation["preferred-citation"]["volume"] == 260
