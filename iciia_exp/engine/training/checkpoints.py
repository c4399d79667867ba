"""Checkpoints that are complete or absent, and checked before training resumes from them."""

import io
import logging
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from iciia_exp.artifacts import atomic_write
from iciia_exp.machine import process_rank

__all__ = ["AtomicCheckpoints", "intact"]

log = logging.getLogger(__name__)


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint in its own folder and renames it.

    Lightning writes into the temporary folder of the system first. Where that is another file system, a kill leaves
    half a checkpoint (Lightning issue 21253).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; one on another machine (``s3://...``) as Lightning does."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()  # on a full disk, torch.save into a file raises a RuntimeError about positions
        torch.save(checkpoint, content)
        with atomic_write(Path(path), "wb") as file:
            file.write(content.getbuffer())


def intact(*paths: Path) -> bool:
    """Return whether checkpoints are complete and have the content that was written (their CRC-32); else log a line."""
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            # the last: a damaged header asks for a compression that zipfile does not know
            damaged = str(error)
        if damaged is not None:
            if process_rank() == 0:
                log.warning("%s: is damaged (%s); training starts again", path, damaged)
            return False
    return True
