"""The user's own code counts in digests: what changes it, and what does not."""

import importlib
import sys

import pytest

from iciia_exp.config.source import source_digest
from iciia_exp.methods.adapt.iciia import IciiaMethod
from iciia_exp.results.labels import varying

METHOD = """
import torch
from iciia_exp.methods.adapt.heads import BackboneOnly
from other_code_of_a_test import FACTOR as factor, shift

SCALE = 2.0
UNUSED = 1


class Unused:
    value = 1


def scaled(x):
    return SCALE * x


class Own(BackboneOnly):
    name = "own"

    # adds a constant
    def forward(self, x_CSD, mask_CS=None):
        return factor * shift(scaled(super().forward(x_CSD, mask_CS)))
"""
OTHER = "FACTOR = SHIFT = 1.0\nNOTHING = 1\n\n\ndef shift(x):\n    return x + SHIFT\n"


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Write the two modules, changed, and return the class of the first."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(*change, name="code_of_a_test"):
        for module, text in ((name, METHOD), ("other_code_of_a_test", OTHER)):
            (tmp_path / f"{module}.py").write_text(text.replace(*change) if change else text)
            sys.modules.pop(module, None)
        importlib.invalidate_caches()
        return importlib.import_module(name).Own

    yield write
    for module in ("code_of_a_test", "moved_code_of_a_test", "other_code_of_a_test"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize(
    "change",
    [
        ("shift(scaled", "scaled(shift"),
        ("SCALE * x", "SCALE / x"),
        ("SCALE = 2", "SCALE = 3"),
        ("x + SHIFT", "x"),
        ("FACTOR = SHIFT = 1", "FACTOR = SHIFT = 2"),
    ],
)
def test_code_that_counts(code, change):
    assert source_digest(code(*change)) != source_digest(code())


@pytest.mark.parametrize(
    "change",
    [
        ("adds a constant", "says nothing"),
        ("UNUSED = 1", "UNUSED = 2"),
        ("NOTHING = 1", "NOTHING = 2"),
        ("value = 1", "value = 2"),
        ("\n\n\n", "\n\n"),
    ],
)
def test_code_that_does_not(code, change):
    assert source_digest(code(*change)) == source_digest(code())


def test_a_class_may_move(code):
    assert source_digest(code(name="moved_code_of_a_test")) == source_digest(code())


def test_code_of_packages_has_versions_instead():
    assert source_digest(IciiaMethod) is source_digest(pytest.MonkeyPatch) is source_digest(dict) is None


def test_changed_code_is_another_run(code, stages):
    found = []
    for change in ((), (), ("SCALE = 2", "SCALE = 3")):
        code(*change)
        made = stages("method=backbone", "method._target_=code_of_a_test.Own")
        found.append((made.run.folder, made.features.folder, made.settings))
    one, same, other = found
    assert one == same
    assert (one[0] == other[0], one[1] == other[1]) == (False, True)
    rows = [{"method": "own", **{f"config.{k}": v for k, v in made[2].items()}} for made in (one, other)]
    assert varying(rows) == {"own": ["config.method.source_code"]}
