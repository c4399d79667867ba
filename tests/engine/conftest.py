"""A folder of images, and plans for it."""

import pytest

from iciia_exp.config.experiment import Experiment
from iciia_exp.engine.stages import Stages
from iciia_exp.engine.terminal import setup_logging
from tests.making.extraction import SMALL, owned_images


@pytest.fixture
def root(tmp_path):
    """Make a folder of 81 images of three owners."""
    return owned_images(tmp_path / "my data")


@pytest.fixture
def folder(compose, root):
    """Make a stages for it; what the console is told is printed."""
    setup_logging()

    def make(*overrides):
        return Stages(Experiment.from_config(compose(*SMALL, f"data_dir='{root}'", *overrides)))

    return make
