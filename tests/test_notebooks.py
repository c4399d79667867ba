"""Every notebook runs from the first cell to the last on a small setting, and is kept without outputs."""

import json
import os
import socket
from pathlib import Path

import nbformat
import numpy as np
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from safetensors.torch import save_file

from tests.making.images import write_image

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
FILES = sorted(NOTEBOOKS.glob("*.ipynb"))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def own_images(root, small):
    """Nine owners with images of two of three classes each, and weights that no network has to fetch."""
    import timm

    rng = np.random.default_rng(0)
    lines = ["path,label,owner"]
    for number in range(180):
        owner = number % 9
        label = [owner % 3, (owner + 1) % 3][int(rng.integers(2))]
        write_image(root / "my_images" / f"{number}.jpg", label, number, 32)
        lines.append(f"{number}.jpg,{'abc'[label]},owner {owner}")
    (root / "my_images" / "images.csv").write_text("\n".join(lines))
    save_file(timm.create_model("mobilenetv3_small_050", pretrained=False).state_dict(), root / "w.safetensors")
    model = ["backbone=timm", "backbone.model.model=mobilenetv3_small_050", "backbone.model.image_size=32"]
    return {
        "images": "my_images",
        "table": "my_images/images.csv",
        "overrides": [
            "logger=csv",
            "trainer=cpu",
            "training.recipe.epochs=2",
            "backbone.weights=w.safetensors",
            *model,
        ],
        "methods": ["linear_head", "client_prior", "iciia"],
    }


#: Two models that draw noise: they differ in it.
SCENES = (
    *("logger=none", "trainer=cpu", "training.recipe.epochs=1", "backbone.recipe.epochs=1"),
    *("dataset.sizes={backbone: 32, train: 40, val: 20, test: 20}", "backbone.model.pictures=1"),
    *("backbone.model.device_channels=[8,8,8]", "backbone.model.cloud_channels=[8,8,16]"),
    *("backbone.model.device_steps=1", "backbone.model.cloud_steps=4"),
)

PARAMETERS = {
    "quickstart": lambda root, small: {"overrides": ["method=iciia", "groups=4", *small]},
    "accuracy_vs_overhead": lambda root, small: {
        "groups": [1, "max"], "seeds": [0], "rivals": ["client_prior"], "overrides": list(small),
    },
    "attribution": lambda root, small: {"overrides": ["method=iciia", "groups=4", *small]},
    "own_images": own_images,
    "routing": lambda root, small: {"overrides": list(SCENES), "methods": ["route_t2i", "fixed_router"]},
    "take_home": lambda root, small: {"overrides": ["groups=4", *small], "port": free_port()},
}  # fmt: skip

#: What somebody who runs it must see.
SEEN = {
    "quickstart": ("harmed_share", "one after the other", "image/png"),
    "accuracy_vs_overhead": ("iciia N=1 H=4 G=32", "client_prior", "image/png", "of the backbone for each image"),
    "attribution": ("corrected", "influence", "image/png", "even attention: "),
    "own_images": ("9 owners", "image/png", "of the clients lose"),
    "routing": ("standard_error", "delta_p_at_half", "decided by", "image/png"),
    "take_home": ("accuracy_int8", " with the past:", "library_name: iciia_exp", '\\"seen\\": 2', "204"),
}


def test_all_are_known():
    assert {file.stem for file in FILES} == set(PARAMETERS) == set(SEEN)


@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_it_is_kept_without_outputs(file):
    notebook = nbformat.read(file, 4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in notebook.cells) == 1


def test_own_images_reaches_its_verdict_in_ten_cells():
    assert len(nbformat.read(NOTEBOOKS / "own_images.ipynb", 4).cells) == 10


@pytest.fixture(scope="module")
def kernel():
    """One kernel for all notebooks: what they import takes longer than what they compute."""
    manager = AsyncKernelManager(kernel_name="python3")
    run_sync(manager.start_kernel)()
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own client
@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_it_runs(file, tmp_path, small, kernel):
    notebook = nbformat.read(file, 4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    given = PARAMETERS[file.stem](tmp_path, small)
    for name in given:
        assert f"{name} = " in cell.source
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    own = {name: value for name, value in os.environ.items() if name.startswith(("ICIIA_EXP_", "WANDB_", "NETRC"))}
    fresh = f"%reset -f\nimport os\nos.chdir({str(tmp_path)!r})\nos.environ.update({own})"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(fresh))
    client = NotebookClient(notebook, timeout=240, km=kernel)
    client.execute()
    client.kc.stop_channels()
    shown = json.dumps([cell.get("outputs") for cell in notebook.cells])
    for text in SEEN[file.stem]:
        assert text in shown, text
    assert '"output_type": "error"' not in shown
