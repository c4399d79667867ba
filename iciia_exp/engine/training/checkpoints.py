"""Checkpoints that are complete or absent, and checked before training resumes from them."""

import io
import logging
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from iciia_exp.artifacts import atomic_write
from iciia_exp.errors import UserError, first_line
from iciia_exp.machine import process_rank

__all__ = ["AtomicCheckpoints", "resumable"]

log = logging.getLogger(__name__)


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint in its own folder and renames it.

    Lightning writes into the temporary folder of the system first. Where that is another file system, a kill leaves
    half a checkpoint (Lightning issue 21253). Before the first one, its content is checked: what cannot be
    loaded without executing stored code would be lost at the end of the training.
    """

    _readable = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; one on another machine (``s3://...``) as Lightning does."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()  # on a full disk, torch.save into a file raises a RuntimeError about positions
        if not self._readable:
            _check_readable(checkpoint)
            self._readable = True
        torch.save(checkpoint, content)
        with atomic_write(Path(path), "wb") as file:
            file.write(content.getbuffer())


def _check_readable(checkpoint: Mapping[str, Any]) -> None:
    """Raise a `UserError` that names what of a checkpoint cannot be written, or read without executing code."""
    if (problem := _stored_code(checkpoint)) is None:
        return
    states = checkpoint.get("callbacks", {})
    name = next((name for name, state in states.items() if _stored_code(state) is not None), None)
    what = "the checkpoint" if name is None else f"callbacks: the state of {name}"
    hint = "return tensors, numbers, texts, lists and dicts from state_dict"
    raise UserError(f"{what} has {problem}, which could not be loaded without executing stored code; {hint}")


def _stored_code(state: object) -> str | None:
    content = io.BytesIO()
    try:
        torch.save(state, content)
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # by the kind of object
        return f"an object that cannot be stored ({first_line(error)})"
    content.seek(0)
    return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(content)) or None


def resumable(folder: Path, best: ModelCheckpoint | None) -> Path | None:
    """Return the last checkpoint of a training that was killed, or None: then nothing is left of it.

    All checkpoints must be complete, with the content that was written (their CRC-32).

    Args:
        folder: with the checkpoints.
        best: keeps the best epoch, whose file must be there.
    """
    left, last = sorted(folder.glob("*.ckpt")), folder / "last.ckpt"
    if not left:
        return None
    problem = next((problem for path in left if (problem := _damage(path))), None) or _unusable(last, best)
    if problem is None:
        return last
    if process_rank() == 0:
        log.warning("%s; training starts again", problem)
        for path in left:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return None


def _damage(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        # the last: a damaged header asks for a compression that zipfile does not know
        damaged = str(error)
    return None if damaged is None else f"{path}: is damaged ({damaged})"


def _unusable(last: Path, best: ModelCheckpoint | None) -> str | None:
    """Return why a training cannot go on from a complete file."""
    if not last.is_file():
        return f"{last}: is missing"
    try:
        state = torch.load(last, weights_only=True, map_location="cpu", mmap=True)
        kept = state["callbacks"].get(best.state_key, {}).get("best_model_path") if best is not None else None
    except Exception as error:  # PyTorch raises several kinds
        return f"{last}: is not a checkpoint of this version ({first_line(error)})"
    if best is None or not kept or "://" in str(best.dirpath):  # the last on another machine: Lightning looks there
        return None
    file = Path(str(best.dirpath)) / Path(kept).name
    return None if file.is_file() else f"{file}: the best epoch is missing"
