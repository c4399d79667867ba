"""Runs as repositories of the hub, in folders and by a stand-in for its server."""

import re
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from iciia_exp import ClientSession
from iciia_exp.config.experiment import Experiment
from iciia_exp.engine.execute import execute
from iciia_exp.engine.stages import Stages
from iciia_exp.errors import UserError
from iciia_exp.serving import hub
from iciia_exp.serving.hub import main
from iciia_exp.serving.run import Run
from tests.serving.test_session import D, make_run

pytestmark = pytest.mark.usefixtures("undrawn")


def test_a_folder_is_all_that_is_needed(finished, tmp_path, capsys):
    run = Run.load(finished.run.folder)
    features = torch.from_numpy(run.features.array()[:16].copy())
    wanted, accuracy = run.predict(features), run.results["accuracy"]
    backbone = run.load_backbone()
    picture = np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8)
    feature = backbone.features(backbone.transform(picture)[None])
    assert main([str(finished.run.folder), "--out", str(tmp_path / "my_model"), "--with-backbone"]) == 0
    shutil.rmtree(finished.experiment.cache_dir)
    shutil.rmtree(finished.run.folder)
    loaded = Run.from_pretrained(tmp_path / "my_model")
    assert torch.equal(loaded.predict(features), wanted)
    other = loaded.load_backbone()
    assert torch.equal(other.features(other.transform(picture)[None]), feature)
    assert loaded.results["accuracy"] == accuracy
    with pytest.raises(UserError, match="a repository has no clients"):
        loaded.partition  # noqa: B018
    text = "".join(path.read_text(errors="replace") for path in (tmp_path / "my_model").iterdir())
    assert str(tmp_path) not in text
    # once more, from what was loaded
    again = Run.from_pretrained(loaded.save_pretrained(tmp_path / "again"))
    assert torch.equal(again.predict(features), wanted)
    with pytest.raises(UserError, match=r"repeat the run's command|is not there"):
        again.load_backbone()


def test_the_card_is_one_of_the_hub(finished, tmp_path):
    run = Run.load(finished.run.folder)
    folder = run.save_pretrained(tmp_path / "digits-iciia")
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "iciia_exp"
    assert (card.data.license, card.data.datasets) == (None, None), "the weights are the user's"
    assert main([str(folder), "--out", str(tmp_path / "free"), "--license", "mit"]) == 0
    assert ModelCard.load(tmp_path / "free" / "README.md").data.license == "mit"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["accuracy"] == pytest.approx(100 * run.results["accuracy"], abs=0.01)
    assert found["gain"] == pytest.approx(100 * run.results["gain"], abs=0.01)
    assert "| accuracy |" in card.text
    macs, share = run.results["sequence_macs"], run.results["per_image_overhead_percent"]
    assert f"16 images together | {macs:,} ({share:.2f} % of the backbone's for them) |" in card.text
    assert 'Run.from_pretrained("digits-iciia")' in card.text


def shown(run, tmp_path, backbone=None):
    """Return the card of a run's repository, and its code."""
    card = ModelCard.load(run.save_pretrained(tmp_path / "my_model", backbone) / "README.md")
    (code,) = re.findall("```python\n(.*?)```", card.text, re.S)
    return card.text, code


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["miet_digits", "dc_ccl_digits"])
def test_the_code_of_a_card_gives_what_the_method_reads(experiment, compose, tmp_path, monkeypatch):
    rounds = ["method.rounds=1"] if experiment == "dc_ccl_digits" else ["method.epochs=1"]
    made = Stages(Experiment.from_config(compose(f"+experiment={experiment}", "trainer=smoke", *rounds)))
    execute(made)
    run = Run.load(made.run.folder)
    text, code = shown(run, tmp_path)
    assert ("Every image is classified by itself" in text) == (experiment == "dc_ccl_digits")
    assert "No client trains anything" not in text
    (name,) = run.method.reads - {"features"}
    monkeypatch.chdir(tmp_path)
    features, arrays = torch.randn(6, run.head.in_features), torch.rand(6, *run.info["arrays"][name])
    names = {"features": features, "labels": torch.tensor([0, 1, 0, 1, 0, 1]), name: arrays, "x": features, "a": arrays}
    if "session" in code:
        names |= {"x": features[0], "a": arrays[0]}
    exec(code.replace("predict(...", "predict(x").replace('": ...', '": a'), names)


@pytest.mark.slow
def test_what_needs_the_cloud_is_not_published(compose, tmp_path):
    made = Stages(Experiment.from_config(compose("+experiment=coda_digits", "trainer=smoke")))
    execute(made)
    run = Run.load(made.run.folder)
    with pytest.raises(UserError, match="coda: is not published; its devices learn with samples of other clients"):
        run.save_pretrained(tmp_path / "model")
    session, features = ClientSession(run, "new"), torch.randn(4, run.head.in_features)
    with pytest.raises(UserError, match="coda has no state of this client: .* partition$"):
        session.predict(features[0])
    with pytest.raises(UserError, match="coda: learns with samples of other clients, .* partition can be served"):
        session.learn(features, [0, 1, 0, 1])


@pytest.mark.parametrize("method", ["client_prior", "finetune"])
@pytest.mark.parametrize("with_backbone", [False, True])
def test_the_code_of_the_card_runs(method, with_backbone, stages, tmp_path, monkeypatch):
    more = ["method.epochs=1"] if method == "finetune" else []
    made = stages(f"method={method}", "partition.split=within", "evaluation.history_lengths=[]", *more)
    execute(made)
    run = Run.load(made.run.folder)
    backbone = run.load_backbone() if with_backbone else None
    _, code = shown(run, tmp_path, backbone)
    features = torch.from_numpy(run.features.array()[:6].copy())
    image = Image.new("L", (8, 8), 90) if with_backbone else features[0]
    monkeypatch.chdir(tmp_path)
    names = {"features": features, "labels": torch.tensor([0, 1, 0, 1, 0, 1]), "image": image}
    exec(code.replace("predict(...)", "predict(image)"), names)
    assert len(names["session"].predict(image)) == len(run.class_names)


def test_a_run_without_results(tmp_path):
    (tmp_path / "run").mkdir()
    run = make_run(tmp_path / "run")
    folder = run.save_pretrained(tmp_path / "out")
    assert "The run was not evaluated." in (folder / "README.md").read_text()
    x = torch.randn(3, D)
    assert torch.equal(Run.from_pretrained(folder).predict(x), run.predict(x))


def test_pushing(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    run, calls = make_run(tmp_path / "run"), []

    class Api:
        def __init__(self, **given):
            calls.append(given)

        def create_repo(self, repo_id, **given):
            from huggingface_hub import RepoUrl

            calls.append((repo_id, given))
            return RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, repo_id, folder_path, **given):
            from pathlib import Path

            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir()), given))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert run.push_to_hub("me/model", token="hf_x", private=True) == "https://huggingface.co/me/model"
    assert calls[0]["token"] == "hf_x"
    assert calls[1] == ("me/model", {"private": True, "exist_ok": True})
    assert calls[2][1] == ["README.md", "config.json", "model.safetensors"]
    for error in (OSError("no permission"), RuntimeError("no network")):
        monkeypatch.setattr(Api, "upload_folder", Mock(side_effect=error))
        with pytest.raises(UserError, match=rf"me/model: cannot be pushed \({error}\)"):
            run.push_to_hub("me/model")


def test_names_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no such folder, and not the name of a repository"):
        Run.from_pretrained("a/b/c")
    with pytest.raises(UserError, match="nobody/nothing: no such folder, and cannot be downloaded"):
        Run.from_pretrained("nobody/nothing", local_files_only=True, cache_dir=tmp_path)
    with pytest.raises(UserError, match="not a trained run"):
        Run.from_pretrained(tmp_path)


def test_nothing_of_others_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    run = make_run(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(UserError, match="is there, and is no repository"):
        run.save_pretrained(tmp_path / "mine")
    other = tmp_path / "other"  # a model of another library
    other.mkdir()
    (other / "config.json").write_text('{"architectures": ["ViT"]}')
    with pytest.raises(UserError, match="config.json: format None"):
        run.save_pretrained(other)
    run.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "notes.md").touch()
    with pytest.raises(UserError, match="out: has notes.md"):
        run.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "notes.md").unlink()
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(hub, "model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "out" / "README.md").is_file()
