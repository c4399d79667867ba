"""Exported programs: every method with free numbers of clients and images, and whole exports of runs."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from iciia_exp.config.paths import CONF_DIR
from iciia_exp.engine.execute import execute
from iciia_exp.errors import UserError
from iciia_exp.report.text import summary
from iciia_exp.results.tables import load_runs, settings
from iciia_exp.serving import export as exporting
from iciia_exp.serving.export import export, main
from iciia_exp.serving.programs import check_program, exported, onnx_session, open_program, programs_of, write_program
from iciia_exp.serving.run import Run
from tests.making.cloud import ARRAYS, studied
from tests.making.config import methods
from tests.methods.test_methods import make


def programs(name):
    """Return the programs of a method of the configuration that has learned."""
    torch.manual_seed(0)
    method, _ = studied(make(CONF_DIR / "method" / f"{name}.yaml"))
    method.eval().requires_grad_(False)
    if hasattr(method, "iterations"):
        method.iterations = 2  # they are unrolled
    head = nn.Linear(method.dim, method.num_classes)
    return programs_of(SimpleNamespace(method=method, head=head, info={"arrays": ARRAYS}))


@pytest.mark.slow
@pytest.mark.parametrize("name", methods("adapt", "tune"))
def test_every_method_with_free_sizes(name):
    first = programs(name)[0]
    module = exported(first).module()

    def call(*arrays):
        found = module(*(torch.from_numpy(array) for array in arrays))
        return [t.numpy() for t in (found if isinstance(found, tuple) else (found,))]

    assert check_program(first, call, {}) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["client_prior", "client_profile", "finetune"])
def test_onnx_and_torch_files(name, tmp_path):
    for program in programs(name)[:1]:
        for to, ending in (("onnx", "onnx"), ("torch", "pt2")):
            path = tmp_path / f"{program.name}.{ending}"
            write_program(program, path, to)
            assert check_program(program, open_program(path, program), {}) <= 1e-4
        free = {
            a for shape in [*program.inputs.values(), *program.outputs.values()] for a in shape if isinstance(a, str)
        }
        session = onnx_session(tmp_path / f"{program.name}.onnx")
        named = {
            a for value in [*session.get_inputs(), *session.get_outputs()] for a in value.shape if isinstance(a, str)
        }
        assert named == free


def test_wrong_numbers_are_refused():
    (program,) = programs("finetune")
    right = programs("finetune")[0].module
    with pytest.raises(UserError, match="classify: logits differ by"):
        check_program(program, lambda *a: [right(*map(torch.from_numpy, a)).numpy() + 0.01], {})
    with pytest.raises(UserError, match="classify: does not run with 1 clients, 1 images"):
        check_program(program, lambda *a: 1 / 0, {})


@pytest.mark.slow
def test_a_run_with_its_backbone(finished, capsys, tmp_path):
    finished = finished.run.folder
    level = logging.getLogger().level
    assert main([str(finished), "--with-backbone", "--int8", "--images", "float"]) == 0
    printed = capsys.readouterr().out
    assert logging.getLogger().level == level
    folder, run = finished / "export", Run.load(finished)
    assert "step: features [clients, 32]" in printed
    facts = json.loads((folder / "export.json").read_text())
    assert set(facts["programs"]) == {"step", "together", "backbone", "image_step"}
    assert all(entry["difference"] <= 1e-4 for entry in facts["programs"].values())
    assert facts["class_names"] == run.class_names
    # the stages of a device, one after the other
    backbone, step, whole = (onnx_session(folder / f"{name}.onnx") for name in ("backbone", "step", "image_step"))
    pixels = np.random.default_rng(0).random((6, 1, 8, 8), dtype=np.float32)
    features, _ = backbone.run(None, {"images": pixels})
    past, mask = np.zeros((1, 1, run.method.state_width), np.float32), np.zeros((1, 1), bool)
    for i in range(6):
        logits, keep = step.run(None, {"features": features[i : i + 1], "past": past, "mask": mask})
        same, _ = whole.run(None, {"images": pixels[i : i + 1], "past": past, "mask": mask})
        np.testing.assert_allclose(logits, same, atol=1e-4)
        past, mask = np.concatenate([past, keep[None]], 1), np.pad(mask, ((0, 0), (0, 1)), constant_values=True)
    probabilities = run.predict(features)[-1].numpy()
    np.testing.assert_allclose(torch.from_numpy(logits).softmax(-1)[0].numpy(), probabilities, atol=1e-4)
    # accuracy of both kinds of weights, and the time of a request
    clients = run.clients
    assert facts["int8"]["accuracy"] == pytest.approx(clients["method_correct"].sum() / clients["images"].sum())
    assert abs(facts["int8"]["accuracy_int8"] - facts["int8"]["accuracy"]) < 0.1
    latency = json.loads((folder / "latency.json").read_text())
    assert latency["milliseconds"]["step"]["1"]["median"] > 0
    table = settings(load_runs([finished]))
    assert table["latency_percent"].tolist() == [latency["added_percent"]["1"]]
    assert "time of one more image" in summary(table)
    (folder / "latency.json").write_text("[]")
    assert "time of one more image" not in summary(settings(load_runs([finished])))
    row = run.results
    assert latency["added_macs_percent"] == pytest.approx(row["streaming_overhead_percent"])


@pytest.mark.slow
def test_states_are_exported_for_methods_whose_devices_learn(stages, undrawn, tmp_path):
    made = stages("method=finetune", "partition.split=within", "evaluation.history_lengths=[]", "method.epochs=1")
    execute(made)
    run = Run.load(made.run.folder)
    export(run, tmp_path / "out", latency=False, int8=True)
    from safetensors.numpy import load_file

    states = load_file(tmp_path / "out" / "states.safetensors")
    names = json.loads((tmp_path / "out" / "clients.json").read_text())["clients"]
    session = onnx_session(tmp_path / "out" / "classify.onnx")
    x = run.features.array()[:3].astype(np.float32)
    given = {name: np.repeat(state[:1], 3, 0) for name, state in states.items()}
    (logits,) = session.run(None, {"features": x, **given})
    expected = run.predict(x, clients=names[0]).numpy()
    np.testing.assert_allclose(torch.from_numpy(logits).softmax(-1).numpy(), expected, atol=1e-5)
    int8 = json.loads((tmp_path / "out" / "export.json").read_text())["int8"]
    assert int8["accuracy"] == pytest.approx(run.clients["method_correct"].sum() / run.clients["images"].sum())


@pytest.mark.slow
def test_nothing_is_left_of_a_failed_export(finished, tmp_path, monkeypatch):
    finished = finished.run.folder
    run, out = Run.load(finished), tmp_path / "out"
    export(run, out, "torch")
    before = (out / "export.json").read_bytes()
    monkeypatch.setattr(exporting, "check_program", lambda *_: (_ for _ in ()).throw(UserError("step: logits differ")))
    with pytest.raises(UserError, match="logits differ"):
        export(run, out, "torch")
    assert (out / "export.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


def test_wrong_arguments(finished, tmp_path):
    finished = finished.run.folder
    run = Run.load(finished)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there, and is no export"):
        export(run, tmp_path / "full")
    with pytest.raises(UserError, match="int8: is of ONNX alone"):
        export(run, tmp_path / "out", "torch", int8=True)
    with pytest.raises(UserError, match="to=tflite"):
        export(run, tmp_path / "out", "tflite")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
