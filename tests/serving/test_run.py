import os
import shutil
import warnings

import numpy as np
import pytest
import torch

from iciia_exp import ClientSession, Run
from iciia_exp.artifacts import read_json, write_json
from iciia_exp.engine.execute import execute
from iciia_exp.errors import UserError
from tests.making.damage import unchecked

pytestmark = pytest.mark.usefixtures("undrawn")


def test_from_the_run_directory_alone(finished, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.move(finished.run.folder, moved)
    store = Run.load(moved).features
    features = torch.from_numpy(store.array()[:16].copy())
    shutil.rmtree(finished.experiment.cache_dir)
    run = Run.load(moved)
    assert run.method.name == "iciia"
    assert run.method.groups == 4
    assert run.results["groups"] == 4
    assert run.config["seed"] == 0
    assert len(run.partition) > len(run.clients)
    assert not run.method.training
    one = run.predict(features)
    assert one.shape == (16, 10)
    torch.testing.assert_close(one.sum(-1), torch.ones(16))
    torch.testing.assert_close(run.predict(features[None])[0], one)
    with pytest.raises(UserError, match="no feature store"):
        run.features  # noqa: B018


def test_it_is_the_method_that_was_evaluated(finished):
    """Predictions from the loaded run give the correct decisions that the evaluation counted."""
    run = Run.load(finished.run.folder)
    labels = torch.tensor(run.features.table["label"].tolist())
    features = torch.from_numpy(run.features.array().copy())
    correct = {}
    for i, rows in ((i, torch.from_numpy(run.partition.test[i].copy())) for i in range(len(run.partition))):
        if len(rows):
            right = sum(int((run.predict(features[c]).argmax(-1) == labels[c]).sum()) for c in rows.split(run.images))
            correct[run.partition.ids[i]] = right
    assert correct == dict(zip(run.clients["client"], run.clients["method_correct"], strict=True))


def test_mixed_precision_trains_and_the_evaluation_is_in_float32(stages):
    made = stages("method=iciia_prior", "method.image.perceptron=4", "trainer.precision=bf16-mixed")
    execute(made)
    run = Run.load(made.run.folder)
    first = made.clients.test[int(np.flatnonzero(made.clients.test.lengths)[0])]
    assert 0 < len(first) <= run.images
    x, y = torch.from_numpy(run.features.array()[first].copy()), torch.from_numpy(made.labels[first])
    want = run.method.task.log_loss(run.method(x[None])[0], y).sum()
    assert run.clients["method_loss"][0] == pytest.approx(float(want), rel=1e-4)


def test_wrong_features_are_refused(finished):
    run = Run.load(finished.run.folder)
    for shape in ((16, 7), (32,), (1, 0, 32)):
        with pytest.raises(UserError, match=r"features are \[S, 32\]"):
            run.predict(torch.zeros(shape))
    for wrong, message in (
        (torch.full((2, 32), float("inf")), "features are not finite"),
        (torch.full((2, 32), 1e30), "the answer is not finite"),
        (["a.jpg"], "expected features, numbers .* got list of str; for images"),
        ([object()], "got list of object"),
        (None, "got NoneType"),
    ):
        with pytest.raises(UserError, match=f"^predict: .*{message}"):
            run.predict(wrong)
    with pytest.raises(UserError, match=r"mask is \[2\], the images are \[1, 2\]"):
        run.predict(torch.zeros(2, 32), mask=torch.ones(2, dtype=torch.bool))
    for mask in ([["a", "b"]], object()):
        with pytest.raises(UserError, match=r"predict: mask is \w+, the images are"):
            run.predict(torch.zeros(2, 32), mask=mask)
    with pytest.raises(UserError, match="mask is True where an image is real"):
        run.predict(torch.zeros(2, 32), mask=[[0.5, 1]])
    with pytest.raises(UserError, match=r"clients have names, texts as in run.partition.ids; got 3"):
        run.client_number(3)


def test_features_of_any_layout(finished):
    run = Run.load(finished.run.folder)
    x = np.array(run.features.array()[:4])
    want = run.predict(torch.from_numpy(x))
    for same in (
        x,
        x.astype(">f4"),
        x[::-1][::-1],
        np.asfortranarray(x),
        x.astype(np.float64),
        x.tolist(),
        list(torch.tensor(x)),
    ):
        torch.testing.assert_close(run.predict(same), want)
    torch.testing.assert_close(run.predict((10 * x).astype(np.int16)), run.predict(np.trunc(10 * x)))
    fixed = x.copy()
    fixed.flags.writeable = False
    with warnings.catch_warnings(action="error"):
        assert torch.equal(run.predict(fixed), run.predict(x))
        with pytest.raises(UserError, match="are not finite numbers"):
            run.predict(np.full_like(x, 1e200, dtype=np.float64))
    padded = np.concatenate([x, np.full_like(x, np.nan)])[None]
    mask = torch.arange(8)[None] < 4
    zeros, forms = np.nan_to_num(padded), (mask, mask.numpy(), mask.int(), mask.tolist())
    for form in forms:
        assert torch.equal(run.predict(zeros, mask=form), run.predict(zeros, mask=mask))
    torch.testing.assert_close(run.predict(np.nan_to_num(padded), mask=mask)[0, :4], want)


@pytest.mark.slow
def test_it_is_read_from_another_working_directory_and_as_a_copy(stages, undrawn, tmp_path, monkeypatch):
    """A copy has other times; the newest evaluation is that which says so."""
    for orders in (1, 2):
        execute(made := stages("method=prior_map", f"evaluation.history_orders={orders}"))
    shutil.copytree(made.run.folder, tmp_path / "copy")
    results = sorted((tmp_path / "copy").glob("evaluation-*/results.json"))
    for path, year in zip(results, (2031, 2030), strict=True):
        unchecked(path.parent)
        write_json(path, read_json(path) | {"finished": f"{year}-01-01T00:00:00+00:00"})
    os.utime(results[0], (1, 1))
    monkeypatch.chdir(tmp_path)
    run = Run.load("copy")
    assert run.evaluation == results[0].parent
    monkeypatch.chdir("/")
    assert run.results["finished"].startswith("2031")
    assert len(run.clients) == run.results["test_clients"]
    assert run.config["method"]
    assert not run.is_repository


def test_missing_and_damaged_runs_are_named(finished, tmp_path):
    with pytest.raises(UserError, match="no such run directory"):
        Run.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a trained run"):
        Run.load(tmp_path / "empty")
    with pytest.raises(UserError, match=r"^plug-in nowhere: cannot be imported \(No module named"):
        Run.load(finished.run.folder, plugins="nowhere")
    with pytest.raises(UserError, match=r"^ClientSession: expected a run, Run.load\(path\), got str"):
        ClientSession(str(finished.run.folder))
    info = Run.load(finished.run.folder).info
    unchecked(finished.run.folder)
    write_json(finished.run.folder / "run.json", info | {"format": 99})
    with pytest.raises(UserError, match="format 99"):
        Run.load(finished.run.folder)
    write_json(finished.run.folder / "run.json", info)
    (finished.run.folder / "weights.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match="cannot be read"):
        Run.load(finished.run.folder)
