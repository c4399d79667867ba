"""Rounds: the network that cloud and devices train together, after every round.

0000.safetensors       before the first round; 0001: after it, and so on; each written at once, with plain facts
manifest.json          rounds, devices, payloads, seconds (written last)
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from iciia_exp.artifacts import save_tensors
from iciia_exp.checksums import verify
from iciia_exp.errors import UserError, first_line

__all__ = ["read_round", "round_path", "write_round"]


def round_path(folder: Path, number: int) -> Path:
    """Return the file of the network after a number of rounds."""
    return folder / f"{number:04d}.safetensors"


def read_round(folder: Path, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the network after a number of rounds, and the facts of the last. Raises a `UserError` if it is damaged."""
    from safetensors import safe_open

    path = round_path(folder, number)
    try:
        verify(path)
        with safe_open(str(path), "pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except UserError:
        raise
    except Exception as error:  # safetensors raises several kinds
        raise UserError(f"{path}: cannot be read ({first_line(error)}); delete it and repeat the command") from error


def write_round(folder: Path, number: int, weights: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Write the network after a number of rounds, and the facts of the last."""
    save_tensors(round_path(folder, number), {name: t.float() for name, t in weights.items()}, facts)
