"""A file of classes, and a check that objects are freed."""

import contextlib
import gc

import pytest


@pytest.fixture
def classes(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("cat\ndog\n\n  emu \nfox\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def freed():
    """Return a context at whose end no new object of some types is left, without Python's collector of cycles."""

    def count(types):
        return [sum(type(each) is kind for each in gc.get_objects()) for kind in types]

    @contextlib.contextmanager
    def check(*types):
        gc.collect()
        before = count(types)
        gc.disable()
        try:
            yield
            assert count(types) == before
        finally:
            gc.enable()

    return check
