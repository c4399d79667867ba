"""Extraction on folders of images: those that cannot be read, kills, several processes; and classifiers fitted on it."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from iciia_exp import Run
from iciia_exp.data.store import FeatureStore, FeatureWriter
from iciia_exp.engine import features, stages
from iciia_exp.engine.backbones import out_of_fold
from iciia_exp.engine.build import Plan
from iciia_exp.engine.console import setup_logging
from iciia_exp.engine.features import probes
from iciia_exp.engine.processes import plain_errors
from iciia_exp.engine.stages import execute
from iciia_exp.engine.training import BackboneModule
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.models import linear_probe
from tests.making.folder import CLASSES, make_folder, write_table
from tests.making.images import write_image

#: A random trunk on small pictures; what is random about it is the same in every process.
SMALL = (
    *("dataset=folder", "dataset.csv=images.csv", "partition=owner", "logger=csv", "trainer=cpu"),
    *("backbone.model.channels=3", "backbone.model.size=16", "backbone.model.width=4", "backbone.model.dim=16"),
    *("backbone.recipe.epochs=2", "protocol.recipe.epochs=2", "protocol.images=8", "features.batch_size=8"),
)
HEAD = ("backbone.train=head", "backbone.recipe=null")
SPLITS = ("train", "val", "test")
ROLES = ("train", "selection", "test")


@pytest.fixture(autouse=True)
def logged():
    setup_logging()


@pytest.fixture
def root(tmp_path):
    """A folder of 9 images of each class and split; three owners have 3 of each."""
    folder = make_folder(tmp_path / "my data", per_class=9, splits=SPLITS)
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    write_table(folder / "images.csv", path=paths, owner=[f"u{int(path[-7:-4]) % 3}" for path in paths])
    return folder


@pytest.fixture
def folder(compose, root):
    """Make a plan for it."""

    def make(*overrides):
        return Plan(compose(*SMALL, f"data_dir='{root}'", *overrides))

    return make


BAD = ["test/apple/003.jpg", "train/bread/004.jpg", "val/cup/005.jpg"]


def damage(root):
    """Delete an image, cut one short, put text in the place of another."""
    (root / BAD[0]).unlink()
    path = root / BAD[1]
    path.write_bytes(path.read_bytes()[:300])
    (root / BAD[2]).write_text("not an image")


def repair(root, paths=BAD):
    for path in paths:
        label, number = CLASSES.index(path.split("/")[1]), int(path[-7:-4])
        write_image(root / path, label, number, 16)


def store_of(plan):
    store = FeatureStore.open(plan.features_dir)
    return store.array().copy(), store.bad, store.manifest["bad_images"]


def same_stores(one, other):
    """Bit for bit."""
    return np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1]) and one[2] == other[2]


# ---- images that cannot be read


@pytest.mark.parametrize("train", ["all", "head"])
def test_bad_images_are_left_out_and_said(root, folder, train, capsys):
    whole = folder().clients
    damage(root)
    plan = folder(*(HEAD if train == "head" else ()))
    row = execute(plan)
    _, bad, listed = store_of(plan)
    assert [entry["what"] for entry in listed] == BAD == plan.table["path"][bad].tolist()
    for entry, problem in zip(listed, ("No such file", "runcated", "cannot identify"), strict=True):
        assert problem in entry["problem"]
        assert str(root) not in entry["problem"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "could not be read" in line]
    (line,) = lines
    assert line.startswith("warning: features: 3 of 81 images could not be read")
    assert BAD[0] in line
    # the clients lose exactly these
    run = Run.load(plan.run_dir)
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
    assert Run.load(folder().run_dir).clients["client"].tolist() == ["u0", "u1"]


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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", ["backbone", "features"])
def test_on_request_a_bad_image_is_an_error(root, folder, workers, stage):
    if stage == "features":
        execute(folder("stage=backbone"))
    damage(root)
    plan = folder("features.on_bad_image=error", f"features.num_workers={workers}", f"stage={stage}")
    with pytest.raises(UserError) as error:
        execute(plan)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{BAD[0] if stage == 'features' else BAD[1]}: cannot be read (")
    assert "features.on_bad_image=skip" in line
    repair(root)
    assert execute(folder("features.on_bad_image=error"))["test_images"] == 27


def test_on_request_an_earlier_bad_image_is_an_error_too(root, folder):
    damage(root)
    execute(folder("stage=backbone"))
    execute(folder("stage=features"))
    with pytest.raises(UserError, match=rf"^{BAD[0]}: could not be read .*one of 3 such images; .*delete .*features/"):
        execute(folder("features.on_bad_image=error"))
    assert not folder().run_dir.exists()


@pytest.mark.parametrize("train", ["all", "head"])
def test_no_image_at_all_is_one_error_and_repaired_it_works(root, folder, train, tmp_path):
    paths = [str(path.relative_to(root)) for path in root.rglob("*.jpg")]
    for path in paths:
        (root / path).write_bytes(b"")
    plan = folder(*(HEAD if train == "head" else ()))
    with pytest.raises(UserError, match=r"^none of the \d+ images tried could be read; the first: \w+/apple/000\.jpg"):
        execute(plan)
    assert not [path for path in tmp_path.glob("cache/**/*") if path.is_file() and not path.name.endswith(".lock")]
    repair(root, paths)
    assert execute(folder(*(HEAD if train == "head" else ())))["test_images"] == 27


def test_a_disk_that_goes_away_is_no_bad_image(root, folder, monkeypatch, tmp_path):
    want = store_of_finished(folder, f"cache_dir={tmp_path}/whole")
    original = FeatureWriter.write

    def gone(self, rows, values):
        original(self, rows, values)
        if root.exists():
            root.rename(tmp_path / "elsewhere")

    plan = folder(*HEAD, "stage=features")
    plan.table  # noqa: B018
    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "write", gone)
        with pytest.raises(UserError, match=r"^test/apple/000\.jpg: could be read before, not any more .*same command"):
            execute(plan)
    (tmp_path / "elsewhere").rename(root)
    execute(plan)
    assert same_stores(store_of(plan), want)


def test_probes_are_the_first_and_some_of_all():
    assert probes(np.arange(5)).tolist() == [0, 1, 2, 3, 4]
    some = probes(np.arange(10_000) * 2)
    assert some[:8].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert some[-1] == 19_998
    assert len(some) < 80


# ---- interrupted


class Killed(BaseException):
    """Not an Exception: nothing in between may handle it."""


def store_of_finished(folder, *overrides):
    plan = folder(*HEAD, *overrides, "stage=features")
    execute(plan)
    return store_of(plan)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_extraction_killed_with_bad_images_ends_as_if_it_had_not_been(root, folder, monkeypatch, tmp_path, workers):
    damage(root)
    want = store_of_finished(folder, f"cache_dir={tmp_path}/whole", f"features.num_workers={workers}")
    plan = folder(*HEAD, "stage=features", f"features.num_workers={workers}")
    writes = []
    original = FeatureWriter.write

    def die_later(self, rows, values):
        self.flush_seconds = 0.0
        writes.append(len(rows))
        if len(writes) > 5:
            raise Killed
        original(self, rows, values)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "write", die_later)
        with pytest.raises(Killed):
            execute(plan)
    partial = plan.features_dir.with_name(plan.features_dir.name + ".partial")
    assert len(FeatureWriter.remaining(partial)) < 81
    execute(plan)
    assert same_stores(store_of(plan), want)


def test_an_image_repaired_between_a_kill_and_its_repetition_is_read(root, folder, monkeypatch, tmp_path):
    want = store_of_finished(folder, f"cache_dir={tmp_path}/whole")
    damage(root)
    plan = folder(*HEAD, "stage=features")
    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            execute(plan)
    repair(root)
    execute(plan)
    got = store_of(plan)
    assert got[2] == []
    assert same_stores(got, want)


# ---- several processes


def run_command(root, *overrides, launcher=(), **environment):
    done = subprocess.run(
        [*(launcher or [sys.executable]), "-m", "iciia_exp", *SMALL, f"data_dir='{root}'", *HEAD, *overrides],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_devices_give_the_store_of_one(root, folder, tmp_path, one_thread):
    damage(root)
    want = store_of_finished(folder, f"cache_dir={tmp_path}/whole")
    code, out, err = run_command(root, "features.devices=2", "stage=features", OMP_NUM_THREADS="1")
    assert (code, err) == (0, "")
    assert out.count("81 images x 16 float32") == 1
    assert out.count("3 of 81 images could not be read") == 1
    assert same_stores(store_of(folder(*HEAD)), want)


def test_an_error_in_one_of_several_processes_is_one_line(root):
    damage(root)
    code, _, err = run_command(root, "features.devices=2", "stage=features", "features.on_bad_image=error")
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert "cannot be read (" in line


def test_errors_from_below_are_plain():
    wall = "\n\n-- Process 1 terminated:\nTraceback\niciia_exp.errors.UserError: Caught\niciia_exp.errors.{}: a=1: no\n"
    for kind in ("UserError", "ConfigError"):
        with pytest.raises(UserError, match="^a=1: no$"), plain_errors("devices"):
            raise RuntimeError(wall.format(kind))
    with pytest.raises(RuntimeError, match="^other$"), plain_errors("devices"):
        raise RuntimeError("other")
    with pytest.raises(ConfigError, match="^a=1: no$"), plain_errors("devices"):
        raise ConfigError("a", 1, "no")
    killed = torch.multiprocessing.ProcessExitedException(
        "process 1 terminated with signal SIGKILL", error_index=1, error_pid=1, exit_code=-9
    )
    message = "^features.devices=2: process 1 terminated with signal SIGKILL; "
    with pytest.raises(UserError, match=message), plain_errors("features.devices=2"):
        raise killed


@pytest.mark.parametrize(
    ("overrides", "started", "message"),
    [
        (("features.devices=2",), 4, "features.devices=2: 4 processes were started; devices times num_nodes must be"),
        ((), 2, "features.devices=1: 2 processes were started"),
        (("features.num_nodes=2",), 1, "features.num_nodes=2: start the same command on each machine with torchrun"),
    ],
)
def test_processes_and_devices_must_agree(folder, monkeypatch, overrides, started, message, tmp_path):
    if started > 1:
        monkeypatch.setenv("WORLD_SIZE", str(started))
        monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=f"^{message}"):
        execute(folder(*overrides))
    assert not (tmp_path / "cache").exists()


def test_more_devices_than_the_machine_has_is_one_line_before_any_work(folder, monkeypatch, tmp_path):
    from lightning.pytorch.accelerators import CUDAAccelerator

    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr("lightning.fabric.accelerators.cuda.num_cuda_devices", lambda: 1)
    with pytest.raises(ConfigError) as error:
        execute(folder("features.devices=3", "trainer=gpu"))
    assert str(error.value).startswith("features.devices=3: ")
    assert "machine only has: [0]" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


# ---- how long, how large


def test_the_estimate_leaves_out_the_slow_first_image(folder):
    plan = folder(*HEAD)
    backbone = plan.make_backbone().eval()
    calls = []

    def slow_at_first(images):
        calls.append(len(images))
        time.sleep(0.5 if len(calls) == 1 else 0.0)
        return torch.zeros(len(images), 16)

    backbone.features = slow_at_first
    assert features._estimate(plan.dataset, backbone, np.arange(81), 0) < 4.0  # 81 images, an eighth of 0.5 s each: 5 s
    assert calls == [1, 8]


@pytest.mark.parametrize(("accelerator", "asked"), [("cpu", True), ("auto", False), ("gpu", False)])
def test_the_processor_is_not_asked_where_a_gpu_works(folder, monkeypatch, accelerator, asked, tmp_path):
    class Asked(Exception):
        pass

    def raise_it(*_):
        raise Asked

    plan = folder(*HEAD)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(features, "_estimate", raise_it)
    monkeypatch.setattr(features, "extraction_trainer", lambda *_: 1 / 0)
    config = {**plan.config["trainer"], "accelerator": accelerator}
    with pytest.raises(Asked if asked else ZeroDivisionError):
        features.extract(
            plan.dataset, plan.table, plan.make_backbone(), plan.extraction, tmp_path, config, {}, with_head=False
        )


def test_features_too_large_for_float16_are_seen_in_the_first_batch(folder, monkeypatch):
    writes = []
    original = FeatureWriter.write

    def count(self, rows, values):
        writes.append(rows)
        original(self, rows, values * 1e6)

    monkeypatch.setattr(FeatureWriter, "write", count)
    with pytest.raises(UserError, match=r"does not fit float16; use features\.dtype=float32"):
        execute(folder(*HEAD, "features.dtype=float16"))
    assert len(writes) == 1


# ---- a classifier fitted on the features


def test_the_classifier_never_sees_selection_or_test_images(folder, monkeypatch):
    seen = []
    original = linear_probe.fit_linear_head

    def look(x_MD, labels, *rest):
        seen.append(x_MD.copy())
        return original(x_MD, labels, *rest)

    monkeypatch.setattr(linear_probe, "fit_linear_head", look)
    plan = folder(*HEAD)
    execute(plan)
    (x_MD,) = seen
    train = (plan.table["split"] == "train").to_numpy()
    assert np.array_equal(plan.backbone_rows, np.flatnonzero(train))
    assert np.array_equal(x_MD, FeatureStore.open(plan.features_dir).array()[train])
    manifest = json.loads((plan.backbone_dir / "manifest.json").read_text())
    assert manifest["images"] == 27
    assert set(manifest["accuracy"]) == {"fitted", *ROLES}


WITHIN = ("partition.split=within", "partition.seed=${seed}")


def test_partitions_share_features_and_not_classifiers(folder, monkeypatch):
    one, other = folder(*HEAD, *WITHIN), folder(*HEAD, *WITHIN, "seed=1")
    assert one.features_dir == other.features_dir
    assert one.backbone_dir != other.backbone_dir
    execute(one)
    monkeypatch.setattr(features, "extract", lambda *_, **__: 1 / 0)
    execute(other)
    assert set(one.backbone_rows) != set(other.backbone_rows)
    for plan in (one, other):
        assert not set(plan.backbone_rows) & {*plan.clients.test.values, *plan.clients.selection.values}


def test_the_stages_of_a_fitted_classifier(folder, monkeypatch):
    with pytest.raises(UserError, match="stage=evaluate: needs the features stage first"):
        execute(folder(*HEAD, "stage=evaluate"))
    assert execute(folder(*HEAD, "stage=features")) is None
    assert not folder(*HEAD).backbone_dir.exists()
    for stage in ("train", "evaluate"):
        with pytest.raises(UserError, match=f"stage={stage}: needs the backbone stage first .*backbones/"):
            execute(folder(*HEAD, f"stage={stage}"))
    shutil.rmtree(folder(*HEAD).features_dir)
    assert execute(folder(*HEAD, "stage=backbone")) is None  # extracts, and fits
    assert folder(*HEAD).features_dir.exists()
    with pytest.raises(UserError, match="stage=evaluate: needs the train stage first"):
        execute(folder(*HEAD, "stage=evaluate"))
    row = execute(folder(*HEAD))
    # without the classifier's folder, it alone is made again
    shutil.rmtree(folder(*HEAD).backbone_dir)
    shutil.rmtree(folder(*HEAD).run_dir)
    monkeypatch.setattr(features, "extract", lambda *_, **__: 1 / 0)
    again = execute(folder(*HEAD))
    assert {k: v for k, v in again.items() if not k.startswith("seconds") and k != "finished"} == {
        k: v for k, v in row.items() if not k.startswith("seconds") and k != "finished"
    }


@pytest.mark.parametrize("train", ["all", "head"])
def test_reserved_images_are_the_backbones_alone(root, folder, train):
    paths = pd.read_csv(root / "images.csv")["path"]
    write_table(root / "images.csv", path=paths)  # without owners
    options = ("backbone.reserve=0.3", "partition=classes_per_client", "partition.images_per_client=4")
    plan = folder(*(HEAD if train == "head" else ()), *options)
    own = set(plan.backbone_rows)
    assert len(own) == 9  # a third of 9 of each class, rounded
    assert not own & {i for role in ROLES for i in plan.clients[role].values}
    row = execute(plan)
    assert json.loads((plan.backbone_dir / "manifest.json").read_text())["images"] == 9
    assert row["test_images"] > 0


def test_methods_are_trained_on_logits_as_of_new_images(folder):
    plan = folder(*HEAD, "method=iciia_stream", "client_mix=all_kinds")
    execute(plan)
    logits, numbers = out_of_fold(plan)
    assert set(numbers) == set(plan.clients.train.values)
    assert logits.shape == (len(numbers), plan.num_classes)
    (batch, *_) = stages._loader(plan, FeatureStore.open(plan.features_dir), plan.clients, "train", 4)
    assert batch.backbone_CSK.shape == (*batch.mask_CS.shape, plan.num_classes)
    (batch, *_) = stages._loader(plan, FeatureStore.open(plan.features_dir), plan.clients, "test", 4)
    assert batch.backbone_CSK is None
