"""A file of classes."""

import pytest


@pytest.fixture
def classes(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("cat\ndog\n\n  emu \nfox\n", encoding="utf-8")
    return str(path)
