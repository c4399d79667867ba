"""States of devices in shards: whole ones, and tables of which few rows change."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from iciia_exp.data.states import ClientStates, shard_path, write_shard
from iciia_exp.errors import UserError

SHAPES = {"bias": (3,), "table": (50, 4)}


@pytest.fixture
def table():
    return torch.randn(50, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def states(table):
    """Return the states of 7 clients; the third has the table as it was."""
    random = torch.Generator().manual_seed(1)
    tables = table.repeat(7, 1, 1)
    for client in (0, 1, 3, 4, 5, 6):
        tables[client, torch.randint(0, 50, (client + 1,), generator=random)] += 1
    tables[1, 49, 3] += 1e-6
    return {"bias": torch.randn(7, 3, generator=random), "table": tables}


@pytest.fixture
def folder(tmp_path, states, table):
    clients = np.array([11, 4, 9, 20, 3, 7, 8])
    for number, part in enumerate((slice(0, 4), slice(4, 7))):
        own = {name: value[part] for name, value in states.items()}
        write_shard(tmp_path, number, clients[part], own, {}, {"table": table})
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": 2}))
    return tmp_path


def test_changed_rows_give_the_whole_table_again(folder, states, table):
    found = ClientStates(folder, SHAPES, {"table": table})
    assert len(found) == 7
    for clients, rows in (([9, 4, 8, 4], [2, 1, 6, 1]), ([11], [0]), ([3, 7, 20], [4, 5, 3])):
        own = found.of(torch.tensor(clients))
        for name, value in own.items():
            assert torch.equal(value, states[name][rows])
    stored = load_file(shard_path(folder, 0))
    assert len(stored["table.rows"]) == int((states["table"][:4] != table).any(-1).sum()) < 15
    assert stored["table.values"].shape[1] == 4


def test_a_client_without_a_state_is_named(folder, table):
    with pytest.raises(UserError, match="no state of client number 5"):
        ClientStates(folder, SHAPES, {"table": table}).of(torch.tensor([4, 5]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop("table.rows"),
        lambda t: t.update({"table.values": t["table.values"][:, :2].clone()}),
        lambda t: t.update({"table.values": t["table.values"][1:].clone()}),
        lambda t: t.update({"table.ends": t["table.ends"].flip(0).contiguous()}),
        lambda t: t.update({"table.ends": torch.zeros(0, dtype=torch.int64)}),
        lambda t: t.update({"table.rows": t["table.rows"] + 50}),
    ],
)
def test_damaged_tables_are_named(folder, table, tmp_path_factory, damage):
    other = tmp_path_factory.mktemp("damaged")
    shutil.copytree(folder, other, dirs_exist_ok=True)
    path = shard_path(other, 0)
    tensors = load_file(path)
    damage(tensors)
    (other / "checksums.json").unlink(missing_ok=True)
    save_file(tensors, path, {"facts": "{}"})
    with pytest.raises(UserError, match="00000.safetensors: cannot be read"):
        ClientStates(other, SHAPES, {"table": table}).of(torch.tensor([11, 4]))
