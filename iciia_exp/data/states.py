"""Client states: what devices have learned, in shards of some devices each.

    <number>.safetensors   numbers of the clients, int64 [C], and their states, float32 [C, ...]; written at once
    manifest.json          shards, devices, seconds, epochs, measured payloads (written last)

Of a large table of which a client changes few rows, a shard has the changed rows alone: NAME.values [R, w], their
numbers NAME.rows, int64 [R], one client after the other, and NAME.ends, int64 [C], where each client's rows end.

Legend: C clients, V rows of a table, w their width, R changed rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iciia_exp.artifacts import read_json, save_tensors
from iciia_exp.checksums import verify
from iciia_exp.errors import UserError, first_line

__all__ = ["ClientStates", "read_facts", "shard_clients", "shard_path", "write_shard"]

_CLIENTS = "client"  # in a shard, beside the states
_OPEN = 64  # shards that are kept open


def shard_path(folder: Path, number: int) -> Path:
    """Return the file of a shard."""
    return folder / f"{number:05d}.safetensors"


def write_shard(
    folder: Path,
    number: int,
    client_C: np.ndarray,
    states: Mapping[str, Tensor],
    facts: dict[str, Any],
    tables: Mapping[str, Tensor] = {},
) -> None:
    """Write the states of some clients, and plain facts about how they were made; absent or complete.

    ``tables`` are the states [V, w] of clients that change nothing, for states of which changed rows are written.
    """
    tensors = {name: state.detach().float().cpu().contiguous() for name, state in states.items()}
    for name, table_Vw in tables.items():
        state_CVw = tensors.pop(name)
        changed_CV = (state_CVw != table_Vw.cpu()).any(-1)
        tensors[f"{name}.values"] = state_CVw[changed_CV]
        tensors[f"{name}.rows"] = changed_CV.nonzero()[:, 1].contiguous()
        tensors[f"{name}.ends"] = changed_CV.sum(1).cumsum(0)
    tensors[_CLIENTS] = torch.from_numpy(np.ascontiguousarray(client_C, dtype=np.int64))
    save_tensors(shard_path(folder, number), tensors, facts)


def read_facts(folder: Path, number: int) -> dict[str, Any]:
    """Return the facts of a shard. Raises a `UserError` that names a damaged file."""
    path = shard_path(folder, number)
    try:
        facts = json.loads((_open(path).metadata() or {})["facts"])
    except (KeyError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    return facts


class ClientStates:
    """The states of the clients of a run, read from its shards when they are used.

    Args:
        folder: finished, with its manifest.
        shapes: of one client's state, by name; another raises a `UserError`.
        tables: see `write_shard`.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], tables: Mapping[str, Tensor] = {}) -> None:
        self.folder, self.shapes, self.tables = folder, dict(shapes), dict(tables)
        shards = read_json(folder / "manifest.json").get("shards")
        if not isinstance(shards, int) or shards < 0:
            raise UserError(
                f"{folder}/manifest.json: shards: expected a number; delete {folder} and repeat the command"
            )
        numbers = [_clients(shard_path(folder, shard)) for shard in range(shards)]
        joined = np.concatenate([np.empty(0, dtype=np.int64), *numbers])
        order = np.argsort(joined, kind="stable")
        self._client = joined[order]
        self._shard = np.repeat(np.arange(shards), [len(part) for part in numbers])[order]
        self._row = np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(len(part)) for part in numbers)])[order]

    def __len__(self) -> int:
        return len(self._client)

    @property
    def clients(self) -> np.ndarray:
        """Numbers of the clients that have a state, ascending, int64."""
        return self._client

    def has(self, client: int) -> bool:
        """Return whether a client has a state."""
        place = int(np.searchsorted(self._client, client))
        return place < len(self._client) and self._client[place] == client

    def of(self, client_C: Tensor) -> dict[str, Tensor]:
        """Return the states of some clients, float32 [C, ...] each; raises a `UserError` if one has none."""
        wanted = client_C.cpu().numpy()
        place = np.searchsorted(self._client, wanted)
        found = place < len(self._client)
        found[found] = self._client[place[found]] == wanted[found]
        if not found.all():
            raise UserError(f"{self.folder}: has no state of client number {wanted[~found][0]}")
        states = {name: torch.empty(len(wanted), *shape) for name, shape in self.shapes.items()}
        for shard in np.unique(self._shard[place]):
            rows = np.flatnonzero(self._shard[place] == shard)
            path = shard_path(self.folder, int(shard))
            for name, state in states.items():
                if name in self.tables:
                    state[rows] = _changed(path, name, self._row[place[rows]], self.tables[name])
                else:
                    state[rows] = _rows(path, name, self._row[place[rows]], self.shapes[name])
        return states


def _open(path: Path) -> Any:
    """Return an open shard, memory-mapped."""
    try:
        status = path.stat()
        return _opened(path, status.st_ino, status.st_mtime_ns)
    except UserError:
        raise
    except Exception as error:  # safetensors raises several kinds
        raise _damaged(path, error) from error


@lru_cache(_OPEN)
def _opened(path: Path, *identity: int) -> Any:
    from safetensors import safe_open

    verify(path)
    return safe_open(str(path), "pt")


def shard_clients(folder: Path, number: int) -> np.ndarray:
    """Return the numbers of the clients of a shard, int64 [C]. Raises a `UserError` that names a damaged file."""
    return _clients(shard_path(folder, number))


def _clients(path: Path) -> np.ndarray:
    file = _open(path)
    try:
        numbers = file.get_tensor(_CLIENTS).numpy()
    except Exception as error:
        raise _damaged(path, error) from error
    if numbers.dtype != np.int64 or numbers.ndim != 1:
        raise _damaged(path, f"numbers of clients are {numbers.dtype} {list(numbers.shape)}")
    return numbers


def _rows(path: Path, name: str, rows: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """Return some rows of a state, reading no more than from the first to the last."""
    first, last = int(rows.min()), int(rows.max()) + 1
    try:
        values = _open(path).get_slice(name)[first:last]
    except Exception as error:
        raise _damaged(path, error) from error
    if values.shape != (last - first, *shape) or values.dtype != torch.float32:
        raise _damaged(path, f"{name} is {values.dtype} {list(values.shape[1:])}, the method's is {list(shape)}")
    return values[torch.from_numpy(rows - first)]


def _changed(path: Path, name: str, clients: np.ndarray, table_Vw: Tensor) -> Tensor:
    """Return the tables of some clients of a shard, [C, V, w], from the rows that they have changed."""
    found = table_Vw.cpu().repeat(len(clients), 1, 1)
    try:
        file = _open(path)
        ends = file.get_tensor(f"{name}.ends").tolist()
        rows, values = (file.get_slice(f"{name}.{part}") for part in ("rows", "values"))
        shapes = [rows.get_shape(), values.get_shape()]
        if shapes != [[ends[-1]], [ends[-1], table_Vw.shape[1]]] or ends != sorted(ends):
            raise ValueError(f"{name} has {ends[-1]} changed rows, and arrays {shapes}")
        for number, client in enumerate(clients.tolist()):
            part = slice(ends[client - 1] if client else 0, ends[client])
            if part.stop > part.start:
                found[number, rows[part]] = values[part]
    except UserError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error
    return found


def _damaged(path: Path, problem: Any) -> UserError:
    return UserError(f"{path}: cannot be read ({first_line(problem)}); delete its folder and repeat the run's command")
