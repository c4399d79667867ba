"""What the tests of a trained run share."""

import pytest

from iciia_exp.engine.execute import execute


@pytest.fixture
def finished(stages, undrawn):
    """Return the stages of a small run of ICIIA on digits, which is trained and evaluated."""
    made = stages("groups=4")
    execute(made)
    return made
