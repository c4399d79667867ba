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

#: What `torch.save` raises for an object that cannot be pickled, by its kind.
_NOT_STORED = (pickle.PicklingError, AttributeError, TypeError)


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint in its own folder and renames it.

    Lightning writes into the temporary folder of the system first. Where that is another file system, a kill leaves
    half a checkpoint (Lightning issue 21253). The content of the first one is checked before it is written: what cannot
    be loaded without executing stored code would be lost at the end of the training.
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
            self._readable = "callbacks" in checkpoint  # else of weights alone
        torch.save(checkpoint, content)
        with atomic_write(Path(path), "wb") as file:
            file.write(content.getbuffer())


def _check_readable(checkpoint: Mapping[str, Any]) -> None:
    """Raise a `UserError` if a checkpoint cannot be stored, or not be loaded at the end of the training.

    The latter is done where a `ModelCheckpoint` has a ``monitor``; without one only an interrupted training is lost.
    """
    states = checkpoint.get("callbacks", {})
    hint = "return tensors, numbers, texts, lists and dicts from its state_dict"
    try:
        if not (found := _stored_code(checkpoint)):
            return
    except _NOT_STORED as error:
        problem = f"{_first_with(states, 'an object that cannot be stored')} ({first_line(error)})"
        raise UserError(f"{problem}; {hint}") from error
    problem = f"{_first_with(states, found[0])}, which cannot be loaded without executing stored code"
    kept = [state for state in states.values() if isinstance(state, Mapping) and "best_model_path" in state]
    if any(state.get("monitor") for state in kept):
        raise UserError(f"{problem}; {hint}")
    log.warning("%s: if the training is interrupted, it starts again", problem)


def _first_with(states: Mapping[str, Any], what: str) -> str:
    """Name the first callback whose state cannot be stored or loaded."""

    def fails(state: object) -> bool:
        try:
            return bool(_stored_code(state))
        except _NOT_STORED:
            return True

    name = next((name for name, state in states.items() if fails(state)), None)
    return f"the checkpoint has {what}" if name is None else f"callbacks: the state of {name} has {what}"


def _stored_code(state: object) -> list[str]:
    """Return the names of the code that loading would execute."""
    content = io.BytesIO()
    torch.save(state, content)
    content.seek(0)
    return torch.serialization.get_unsafe_globals_in_checkpoint(content)


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
