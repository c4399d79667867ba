"""Golden numbers: a short run of every method on digits, which no refactoring may change.

``tests/golden/digits.json`` holds, for every method, each test client's counts, sums by history and by drawn client,
what was chosen on val clients, and the sums of its weights. On the machine that wrote it (same processor and PyTorch)
they are compared exactly; elsewhere other kernels round differently, and a trained method may take another turn, so
totals are compared with the tolerances below.

``python -m tests.test_golden METHOD ...`` writes the entries of some methods again, ``all`` those of every method. A
commit that does so says why.
"""

import json
import platform
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("undrawn")

FILE = Path(__file__).parent / "golden" / "digits.json"

#: Where the machine is another: share of test images whose answer may differ in total, and of a sum of log-losses.
OTHER_MACHINE = {"correct": 0.03, "loss": 0.05}

SETTING = (
    *("logger=csv", "trainer=cpu", "groups=4", "evaluation.examples=0"),
    *("backbone.model.dim=32", "backbone.model.width=4", "backbone.recipe.epochs=15"),
    "dataset.sizes={backbone: 500, train: 500, val: 160, test: 240}",
    *("partition.split=within", "partition.images_per_client=40", "partition.deals=2"),
    *(
        "training.recipe.epochs=4",
        "training.recipe.batch_size=2",
        "optimizer.lr=0.003",
        "training.train_images=20",
    ),
    *("evaluation.history_orders=2", "evaluation.history_lengths=[0,1,3]", "evaluation.drawn_clients=20"),
)

#: What is run of each: the method alone, and variants whose code differs.
RUNS = {
    **{
        name: (f"method={name}",)
        for name in (
            *("arm_cml", "backbone", "client_prior", "client_profile", "client_types", "coda", "context_token"),
            *(
                "conv_across_images",
                "dc_ccl",
                "fedavg",
                "feedforward",
                "finetune",
                "iciia",
                "iciia_prior",
                "iciia_stream",
                "lame",
                "linear_head",
            ),
            *(
                "linear_probe",
                "mpda",
                "oracle_classes",
                "prior_em",
                "prior_map",
                "prompt_tuning",
                "smoothed_prior",
                "stata",
                "t3a",
            ),
        )
    },
    **{
        name: (f"method={name}", "backbone=small_vit", "backbone.model.depth=2", "method.epochs=10")
        for name in ("full_finetune", "last", "last_block", "miet", "side_network")
    },
    # a sample of another client is none of the client's own
    **{name: (f"method={name}", "partition.deals=1") for name in ("coda", "mpda")},
    "iciia causal, 2 layers": ("method=iciia", "method.attention=causal", "num_layers=2", "groups=1"),
    "iciia, published protocol": ("method=iciia", "training=published", "training.recipe.epochs=2"),
    "iciia_prior, all client types": ("method=iciia_prior", "client_mix=all_types", "training=streaming"),
    "client_prior with changes": ("method=client_prior", "method.prior.change=0.1", "method.prior.iid_bonus=0.0"),
}


def machine():
    """Return what rounding depends on: the processor, with its generation, and the version of PyTorch."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        # in a virtual machine the name may be that of many generations
        processor = ", ".join(facts[key] for key in ("model name", "cpu family", "model", "stepping"))
        processor += f", {torch.backends.cpu.get_cpu_capability()}"
    except (OSError, KeyError):
        processor = platform.processor()
    return {"processor": processor, "torch": torch.__version__.split("+")[0]}


def sums(folder, name, keys):
    """Return the sums of counts and losses of one of a run's tables by some of its columns."""
    columns = ["backbone_correct", "method_correct", "both_correct", "backbone_loss", "method_loss"]
    frame = pd.read_parquet(folder / f"{name}.parquet").groupby(keys, sort=True)[columns].sum()
    return {" ".join(map(str, key)): list(row) for key, row in zip(frame.index, frame.to_numpy().tolist(), strict=True)}


def measure(overrides):
    """Run one setting and return its golden entry."""
    from iciia_exp import run_experiment

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order have other last digits
    try:
        other = any(override.startswith("backbone=") for override in overrides)  # without width
        run = run_experiment(*(s for s in SETTING if not (other and "width" in s)), *overrides)
    finally:
        torch.set_num_threads(threads)
    clients = run.clients.drop(columns=["client", "client_type"])
    weights = load_file(run.path / "weights.safetensors")
    training = json.loads((run.path / "training.json").read_text())
    entry = {
        "clients": {name: column.tolist() for name, column in clients.items()},
        "history": sums(run.evaluation, "history", ["protocol", "history"]),
        "training": {k: v for k, v in training.items() if k != "seconds"},
        # of what is trained or fitted; without names, which may change
        "weights": sorted(float(t.double().sum()) for t in weights.values() if t.is_floating_point() and t.numel() > 1),
    }
    for number, path in enumerate(sorted(run.path.glob("rounds-*/*.safetensors"))):
        entry.setdefault("rounds", {})[str(number)] = sum(float(t.double().sum()) for t in load_file(path).values())
    if shards := sorted(run.path.glob("states-*/*.safetensors")):
        states = [load_file(shard) for shard in shards]
        entry["states"] = {name: float(sum(s[name].double().sum() for s in states)) for name in states[0]}
    if (run.evaluation / "drawn_clients.parquet").is_file():
        entry["drawn"] = sums(run.evaluation, "drawn_clients", ["client_type", "history"])
    return entry


@pytest.fixture(scope="module")
def golden():
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


def test_every_method_has_an_entry(golden):
    """Routers need two models; their numbers are held by tests/methods/route."""
    from tests.making.config import methods

    names = {overrides[0].removeprefix("method=") for overrides in RUNS.values()}
    assert names == set(methods("adapt", "tune", "cotrain"))
    assert set(golden["runs"]) == set(RUNS)


#: Those that a short run of the tests has.
FAST = ("backbone", "client_profile", "coda", "dc_ccl", "iciia", "iciia_prior", "prior_em")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in RUNS])
def test_numbers_are_as_they_were(name, golden, shared, monkeypatch):
    monkeypatch.setenv("ICIIA_EXP_CACHE", str(shared / "cache"))  # one backbone for all of them
    got, want = json.loads(json.dumps(measure(RUNS[name]))), golden["runs"][name]
    if machine() == golden["machine"]:
        assert got == want
        return
    images, classes = sum(want["clients"]["images"]), want["clients"]["classes"]
    assert got["clients"]["images"] == want["clients"]["images"]
    assert got["clients"]["classes"] == classes
    for who in ("backbone", "method"):
        correct, loss = (f"{who}_{what}" for what in ("correct", "loss"))
        assert sum(got["clients"][correct]) == pytest.approx(
            sum(want["clients"][correct]), abs=OTHER_MACHINE["correct"] * images
        )
        assert sum(got["clients"][loss]) == pytest.approx(sum(want["clients"][loss]), rel=OTHER_MACHINE["loss"])
    assert set(got["history"]) == set(want["history"])
    assert set(got.get("rounds", ())) == set(want.get("rounds", ()))
    assert set(got.get("drawn", ())) == set(want.get("drawn", ()))
    assert len(got["weights"]) == len(want["weights"])


def main(names):
    """Write entries again."""
    import os
    import tempfile

    old = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"runs": {}}
    names = list(RUNS) if names == ["all"] else names
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ICIIA_EXP_CACHE"], os.environ["ICIIA_EXP_OUTPUT"] = f"{folder}/cache", f"{folder}/outputs"
        old["runs"] |= {name: measure(RUNS[name]) for name in names}
    runs = {name: old["runs"][name] for name in RUNS}
    lines = [f'{{\n"machine": {json.dumps(machine())},\n"runs": {{']
    for name, entry in runs.items():  # a line per type of number, so that a change shows where it is
        parts = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items())
        lines.append(f"{json.dumps(name)}: {{\n{parts}\n}}" + "," * (name != list(runs)[-1]))
    FILE.write_text("\n".join([*lines, "}\n}\n"]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
