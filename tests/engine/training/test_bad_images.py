"""Extraction and training on folders of which some images cannot be read, killed in the middle or not."""

import pytest

from iciia_exp import Run
from iciia_exp.data.store import FeatureWriter
from iciia_exp.engine.execute import execute
from iciia_exp.engine.inputs import Inputs
from iciia_exp.engine.training.modules import BackboneModule
from iciia_exp.errors import UserError
from tests.making.extraction import (
    BAD,
    HEAD,
    ROLES,
    damage,
    repair,
    same_stores,
    store_of,
    store_of_finished,
)
from tests.making.kill import killed_while_writing

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.mark.slow
@pytest.mark.parametrize("train", ["all", "head"])
def test_bad_images_are_left_out_and_said(root, folder, train, capsys):
    whole = folder().clients
    damage(root)
    stages = folder(*(HEAD if train == "head" else ()))
    row = execute(stages)
    _, bad, listed = store_of(stages)
    assert [entry["what"] for entry in listed] == BAD == stages.table["path"][bad].tolist()
    for entry, problem in zip(listed, ("No such file", "runcated", "cannot identify"), strict=True):
        assert problem in entry["problem"]
        assert str(root) not in entry["problem"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "could not be read" in line]
    (line,) = lines
    assert line.startswith("warning: features: 3 of 81 images could not be read")
    assert BAD[0] in line
    # the clients lose exactly these
    run = Run.load(stages.run.folder)
    lost = 0
    for role in ROLES:
        for number in range(len(whole)):
            before, after = ([int(i) for i in c[role][number]] for c in (whole, run.partition))
            assert after == [i for i in before if not bad[i]]
            lost += len(before) - len(after)
    assert lost == 3
    assert run.clients.set_index("client")["images"].to_dict() == {"u0": 8, "u1": 9, "u2": 9}
    assert row["test_images"] == 26


def test_a_client_without_test_images_drops_out(root, folder):
    for path in root.glob("test/*/*.jpg"):
        if int(path.stem) % 3 == 2:
            path.write_bytes(b"")
    row = execute(folder())
    assert (row["test_clients"], row["test_images"]) == (2, 18)
    assert Run.load(folder().run.folder).clients["client"].tolist() == ["u0", "u1"]


def test_a_batch_without_any_image_trains_nothing_and_harms_nothing(root, folder, monkeypatch):
    for path in root.glob("train/*/*.jpg"):
        if int(path.stem) != 4:
            path.write_bytes(b"")
    steps = []
    original = BackboneModule.training_step

    def count(self, batch, index):
        steps.append(len(batch.images))
        return original(self, batch, index)

    monkeypatch.setattr(BackboneModule, "training_step", count)
    options = ("backbone.recipe.batch_size=2", "backbone.recipe.clip_norm=1", "trainer.precision=bf16-mixed")
    execute(folder("stage=backbone", *options))
    assert steps.count(0) > 10
    assert sum(steps) == 2 * 3  # every readable image in each of two epochs


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", ["backbone", "features"])
def test_on_request_a_bad_image_is_an_error(root, folder, workers, stage):
    damage(root)
    if stage == "features":
        execute(folder("stage=backbone"))
    stages = folder("features.on_bad_image=error", f"features.num_workers={workers}", f"stage={stage}")
    with pytest.raises(UserError) as error:
        execute(stages)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{BAD[0] if stage == 'features' else BAD[1]}: cannot be read (")
    assert "features.on_bad_image=skip" in line
    repair(root)
    assert execute(folder("features.on_bad_image=error"))["test_images"] == 27


def test_on_request_an_earlier_bad_image_is_an_error_too(root, folder):
    damage(root)
    execute(folder("stage=backbone"))
    execute(folder("stage=features"))
    with pytest.raises(UserError, match=rf"^3 of 81 images could not be read \({BAD[0]}: .*; .*delete .*features/"):
        execute(folder("features.on_bad_image=error"))
    assert not folder().run.folder.exists()


@pytest.mark.parametrize("train", ["all", "head"])
def test_no_image_at_all_is_one_error_and_repaired_it_works(root, folder, train, tmp_path):
    paths = [str(path.relative_to(root)) for path in root.rglob("*.jpg")]
    for path in paths:
        (root / path).write_bytes(b"")
    stages = folder(*(HEAD if train == "head" else ()))
    with pytest.raises(UserError, match=r"^none of the \d+ images tried could be read; the first: \w+/apple/000\.jpg"):
        execute(stages)
    files = [path for path in tmp_path.glob("cache/**/*") if path.is_file() and not path.name.endswith(".lock")]
    assert {path.parent.name for path in files} == {"datasets"}
    repair(root, paths)
    assert execute(folder(*(HEAD if train == "head" else ())))["test_images"] == 27


def test_a_disk_that_goes_away_is_no_bad_image(root, folder, monkeypatch, tmp_path):
    want = store_of_finished(folder, f"cache_dir={tmp_path}/whole")
    original = FeatureWriter.write

    def gone(self, rows, values):
        original(self, rows, values)
        if root.exists():
            root.rename(tmp_path / "elsewhere")

    stages = folder(*HEAD, "stage=features")
    stages.table  # noqa: B018
    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "write", gone)
        with pytest.raises(UserError, match=r"^test/apple/000\.jpg: could be read before, not any more .*same command"):
            execute(stages)
    (tmp_path / "elsewhere").rename(root)
    execute(stages)
    assert same_stores(store_of(stages), want)


# ---- interrupted


@pytest.mark.parametrize("workers", [0, 2])
def test_an_extraction_killed_with_bad_images_ends_as_if_it_had_not_been(root, folder, monkeypatch, tmp_path, workers):
    damage(root)
    want = store_of_finished(folder, f"cache_dir={tmp_path}/whole", f"features.num_workers={workers}")
    stages = folder(*HEAD, "stage=features", f"features.num_workers={workers}")
    with killed_while_writing(monkeypatch):
        execute(stages)
    partial = stages.features.folder.with_name(stages.features.folder.name + ".partial")
    assert len(FeatureWriter.remaining(partial)) < 81
    execute(stages)
    assert same_stores(store_of(stages), want)


def test_an_image_repaired_between_a_kill_and_its_repetition_is_read(root, folder, monkeypatch, tmp_path):
    want = store_of_finished(folder, f"cache_dir={tmp_path}/whole")
    damage(root)
    stages = folder(*HEAD, "stage=features")
    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            execute(stages)
    repair(root)
    monkeypatch.setattr(Inputs, "files", {})  # as if the disk had failed, and not the files
    execute(stages)
    got = store_of(stages)
    assert got[2] == []
    assert same_stores(got, want)
