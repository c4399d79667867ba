"""A kill in the middle."""

from contextlib import contextmanager

import pytest

from iciia_exp.data.store import FeatureWriter


class Killed(BaseException):
    """Not an Exception: nothing in between may handle it."""


@contextmanager
def killed_while_writing(monkeypatch, writes=5):
    """Expect the block to be killed after so many batches of an extraction, each of them on disk."""
    done, original = [], FeatureWriter.write

    def die_later(self, rows, values):
        self.flush_seconds = 0.0
        done.append(len(rows))
        if len(done) > writes:
            raise Killed
        original(self, rows, values)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "write", die_later)
        with pytest.raises(Killed):
            yield
