"""No weight of any method depends on the label of a test image, but for oracles by name."""

import numpy as np
import pytest
from safetensors.torch import load_file

from iciia_exp.engine.execute import execute
from tests.making.cloud import ON_TOKENS
from tests.making.config import methods

ORACLES = {"oracle_classes"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def learned(folder):
    """Return the weights of a run, the states of its clients, and the network after every round, by name."""
    made = [*folder.glob("states-*/*.safetensors"), *folder.glob("rounds-*/*.safetensors")]
    files = {"": folder / "weights.safetensors", **{path.name: path for path in made}}
    return {f"{file} {name}": tensor for file, path in files.items() for name, tensor in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", methods("adapt", "tune", "cotrain"))
def test_labels_of_test_images_change_no_weight(stages, with_tokens, method, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("ICIIA_EXP_CACHE", str(cache))  # one backbone for all of them
    options = (f"method={method}", "training.recipe.epochs=1", "partition.split=within", "stage=train")
    if method in ON_TOKENS:
        stages, options = with_tokens, (*options, "method.epochs=2", "method.linear_epochs=1")
    one = stages(*options)
    if not one.features.folder.is_dir():
        for stage in ("backbone", "features"):
            execute(stages(*options, f"stage={stage}"))
    execute(one)
    other = stages(*options, f"output_dir={tmp_path}/permuted")
    # the same clients with the same images; behind them, other labels of the test images
    assert other.clients.test.values.tolist() == one.clients.test.values.tolist()
    labels = other.labels.copy()
    test = np.flatnonzero((other.table["split"] == "test").to_numpy())
    labels[test] = np.random.default_rng(0).permutation(labels[test])
    assert (labels != one.labels).mean() > 0.1
    other.__dict__["labels"] = labels
    execute(other)
    weights = [learned(made.run.folder) for made in (one, other)]
    same = [name for name in weights[0] if weights[0][name].numpy().tobytes() == weights[1][name].numpy().tobytes()]
    assert (set(same) == set(weights[0])) == (method not in ORACLES)
