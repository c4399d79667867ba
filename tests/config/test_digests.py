"""Digests count what can change a number and nothing else; tables show it."""

import shutil
import sys
import types

import pandas as pd
import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from iciia_exp.config.experiment import Experiment
from iciia_exp.engine.stages import Stages
from iciia_exp.errors import ConfigError
from iciia_exp.methods.route.fixed_router import FixedRouter
from iciia_exp.methods.route.route_t2i import RouteT2I
from iciia_exp.results.labels import base_of, varying
from tests.making.folder import make_folder, write_table


def run_digest(stages, *overrides):
    return stages(*overrides).run.digest


SAME = (
    *("logger=wandb", "trainer.accelerator=auto", "features.num_workers=2", "features.batch_size=7", "stage=train"),
    *("output_dir=elsewhere", "cache_dir=elsewhere", "name=other", "backbone.name=other"),
    *("+backbone.dim=32", "+backbone.published_top1=70.5", "training.num_workers=2"),
    "+callbacks.lr._target_=lightning.pytorch.callbacks.LearningRateMonitor",
    "method.shuffle=false",  # with one group it changes nothing
    *(
        "+dataset._recursive_=false",
        "~method.attention",
        "~backbone.model.channels",
        "~client_mix.pool",
    ),  # the defaults
    "~partition.by",
)
SEEDS = ("seed=1", "partition.seed=1", "backbone.seed=1", "dataset.seed=1")
OTHER = (
    *("dataset.noise_std=0.3", "groups=2", "heads=2", "method.dropout=0"),
    *("training.images=8", "training.train_images=8", "training.recipe.epochs=4", "training.shuffle_images=false"),
    *("optimizer.lr=1", "optimizer=sgd", "scheduler=constant", "callbacks.early_stopping.patience=3"),
    *("~callbacks.early_stopping", "client_mix.size=3"),
    *("backbone.recipe.epochs=3", "backbone.reserve=0.2", "backbone.model.width=8", "+backbone.weights=weights.pt"),
    *("features.dtype=float16", "features.precision=bf16-mixed", "partition.classes_per_client=3"),
    *("trainer.precision=bf16-mixed", "trainer=smoke", "+trainer.max_epochs=1", "+trainer.limit_train_batches=1"),
)
EVALUATED = ("evaluation.images=8", "evaluation.cost_images=8", "evaluation.site=cloud")
SHOWN = ("evaluation.history_orders=3", "evaluation.examples=0", "evaluation.drawn_clients=4")


@pytest.mark.parametrize("override", SAME)
def test_what_changes_no_number_changes_no_digest(stages, override):
    assert run_digest(stages, override) == run_digest(stages)


@pytest.mark.parametrize("override", [*SEEDS, *OTHER])
def test_what_changes_a_number_changes_the_digest(stages, override, weights_file):
    assert run_digest(stages, override) != run_digest(stages)


@pytest.fixture
def weights_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"a")


def row_of(made):
    """Return what labels see of a row of results."""
    attention = {key: made.settings.get(f"method.{key}") for key in ("groups", "heads", "num_layers")}
    config = {f"config.{k}": v for k, v in made.settings.items()}
    return {"method": made.experiment.method_class.name, **attention, **config}


ALL = [*SAME, *SEEDS, *OTHER, *EVALUATED, *SHOWN]
#: What methods without training by gradients tell apart from what they do not.
FEW = ("seed=1", "optimizer.lr=1", "training.images=8", "trainer=smoke", "client_mix.size=3", "features.dtype=float16")
CASES = [(o, "iciia") for o in ALL] + [(o, method) for method in ("linear_head", "backbone") for o in FEW]


@pytest.mark.parametrize(("override", "method"), CASES)
def test_a_table_separates_and_shows_exactly_what_changes_a_number(stages, override, method, weights_file):
    one, other = stages(f"method={method}"), stages(f"method={method}", override)
    same = one.evaluation.setting == other.evaluation.setting
    if method == "iciia":
        assert same == (override in {*SAME, *SEEDS, *SHOWN})
    if override not in (*SEEDS, *SHOWN):
        assert same == (one.evaluation.digest == other.evaluation.digest)
    rows = [row_of(one), row_of(other)]
    shown = varying(rows)[method]
    in_the_label_anyway = override in ("groups=2", "heads=2") and method == "iciia"
    assert bool(shown) == (not same and not in_the_label_anyway)


def test_groups_max_and_d_are_one_run(stages):
    assert run_digest(stages, "groups=max") == run_digest(stages, "groups=32")


def test_keys_that_a_method_does_not_use_are_dropped(stages):
    assert run_digest(stages, "method=linear_head", "groups=4") == run_digest(stages, "method=linear_head")
    plain = run_digest(stages, "method=backbone")
    assert run_digest(stages, "method=backbone", "seed=5", "optimizer.lr=1", "heads=8") == plain
    assert run_digest(stages, "method=linear_head", "seed=5") != run_digest(stages, "method=linear_head")


def test_what_a_method_is_not_trained_with_names_no_run(stages):
    """`client_profile` has recipes of its own, routers train on single prompts, and some methods draw nothing."""
    one = stages("method=client_profile")
    for override in ("training.recipe.epochs=4", "optimizer.lr=1", "client_mix=all_types", "training.train_images=8"):
        other = stages("method=client_profile", override)
        assert (other.run.digest, other.settings) == (one.run.digest, one.settings)
    assert run_digest(stages, "method=client_profile", "seed=1") != one.run.digest
    own = ("partition.split=within", "partition.deals=1")
    for method, drawn in (("mpda", "method.matching=random"), ("coda", "method.keep=0.5")):
        for more, digests in (((), 1), ((drawn,), 2)):
            found = {run_digest(stages, f"method={method}", *own, *more, f"seed={seed}") for seed in (0, 1)}
            assert len(found) == digests
    for rule, kept in (("edge", {"rule": "edge"}), ("random", {"rule": "random", "seed": 3})):
        assert FixedRouter.canonical({"rule": rule, "seed": 3}, 8) == kept
    assert RouteT2I.trained_with == {"recipe"}


def test_backbone_and_features_are_shared_where_they_can_be(stages):
    one, other = stages(), stages("seed=3", "groups=8", "partition.seed=2", "optimizer.lr=1")
    assert one.backbone.folder == other.backbone.folder
    assert one.features.folder == other.features.folder
    assert one.run.folder != other.run.folder
    assert stages("features.dtype=float16").backbone.folder == one.backbone.folder
    assert stages("features.dtype=float16").features.folder != one.features.folder


def test_no_path_needs_quoting(stages):
    for path in (stages().run.folder, stages().features.folder, stages().backbone.folder):
        assert "=" not in path.name
        assert " " not in path.name


@pytest.mark.parametrize("name", ["../../../esc", "..a", "/abs", "hf-hub:timm/vit", "a b", "[red]x", "=1"])
def test_no_name_leaves_its_folder(stages, name):
    made = stages(f"backbone.name='{name}'")
    for part in (made.backbone, made.features):
        assert part.folder.parent == part.root
        assert part.folder.resolve().parent == part.root.resolve()
        assert not part.folder.name.startswith(".")
        assert part.folder.name.endswith(f"-digits-{part.digest}")


# ---- datasets on disk, features, and weights from files

IMAGES = (
    *("dataset=folder", "dataset.csv=images.csv", "partition=classes_per_client", "partition.images_per_client=2"),
    *("backbone.model.channels=3", "backbone.model.size=16", "backbone.recipe.epochs=1"),
)
HEAD = ("backbone.train=head", "backbone.recipe=null")


def write_images(root):
    make_folder(root, per_class=6, splits=("train", "val", "test"))
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*.jpg"))
    write_table(root / "images.csv", path=paths, owner=[path[-5] for path in paths])
    return root


@pytest.fixture
def on_disk(compose, tmp_path):
    """Make the stages of an experiment on a folder of images."""
    write_images(tmp_path / "data")

    def make(*overrides):
        places = [] if any(o.startswith("data_dir=") for o in overrides) else [f"data_dir={tmp_path}/data"]
        return Stages(Experiment.from_config(compose("logger=csv", *IMAGES, *places, *overrides)))

    return make


def digests(stages):
    """Return the digests of the artifacts that there are."""
    return [part.digest for part in (stages.backbone, stages.features, stages.head, stages.run) if part is not None]


@pytest.mark.parametrize("train", [(), HEAD], ids=["all", "head"])
def test_a_folder_may_move(on_disk, tmp_path, train):
    before = digests(on_disk(*train))
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert digests(on_disk(*train, f"data_dir={tmp_path}/elsewhere")) == before


def test_tables_do_not_compare_other_bytes_or_weights(on_disk, tmp_path):
    def row(*overrides):
        return row_of(on_disk(*overrides)) | {"name": "x", "backbone": "y"}

    first = row()
    (tmp_path / "data" / "train/cup/000.jpg").write_bytes(b"other")
    assert base_of(row()) != base_of(first)
    for name in ("one.pt", "other.pt"):
        (tmp_path / name).write_bytes(name.encode())
    weights = [row(f"+backbone.weights={tmp_path}/{name}") for name in ("one.pt", "other.pt")]
    assert base_of(weights[0]) != base_of(weights[1])


def rewrite(root, change):
    table = pd.read_csv(root / "images.csv", dtype=str)
    write_table(root / "images.csv", **change(table))


CHANGES = {
    "add": lambda t: pd.concat([t, pd.DataFrame({"path": ["train/cup/new.jpg"], "owner": ["1"]})]),
    "remove": lambda t: t.iloc[1:],
    "rename": lambda t: t.assign(path=t["path"].str.replace("train/cup/000.jpg", "train/cup/0.jpg")),
    "owner": lambda t: t.assign(owner=["other", *t["owner"][1:]]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_in_a_folder_counts(on_disk, tmp_path, change):
    root = tmp_path / "data"
    before = digests(on_disk())
    if change == "add":
        shutil.copy(root / "train/cup/000.jpg", root / "train/cup/new.jpg")
    if change == "rename":
        (root / "train/cup/000.jpg").rename(root / "train/cup/0.jpg")
    rewrite(root, CHANGES[change])
    assert not set(digests(on_disk())) & set(before)


@pytest.mark.parametrize("train", [(), HEAD], ids=["all", "head"])
@pytest.mark.parametrize(
    "override",
    [
        *("features.devices=2", "features.num_nodes=2", "features.on_bad_image=error", "features.num_workers=2"),
        *("features.batch_size=7", "+backbone.published_top1=70.5", "+backbone.dim=512"),
    ],
)
def test_how_the_work_is_done_changes_no_digest(on_disk, override, train):
    assert digests(on_disk(*train, override)) == digests(on_disk(*train))


@pytest.mark.parametrize("override", ["features.precision=bf16-mixed", "features.dtype=float16"])
def test_precision_changes_the_features_and_not_the_backbone(on_disk, override):
    before, after = digests(on_disk()), digests(on_disk(override))
    assert before[0] == after[0]
    assert not set(before[1:]) & set(after[1:])


def test_the_trainers_precision_is_that_of_the_features(on_disk):
    same = on_disk(*HEAD, "features.precision=bf16-mixed", "trainer.precision=bf16-mixed")
    assert same.features.digest == on_disk(*HEAD, "trainer.precision=bf16-mixed").features.digest
    assert on_disk(*HEAD, "features.precision=32-true").features.digest == on_disk(*HEAD).features.digest


@pytest.mark.parametrize("train", ["all", "head", "none"])
def test_weights_are_their_files_content(on_disk, tmp_path, train):
    recipe = () if train == "all" else ("backbone.recipe=null",)

    def made(path):
        return digests(on_disk(f"+backbone.weights={path}", f"backbone.train={train}", *recipe))

    one, copy, other = (tmp_path / name for name in ("one.pt", "copy.pt", "other.pt"))
    for path, content in ((one, b"a"), (copy, b"a"), (other, b"b")):
        path.write_bytes(content)
    assert made(one) == made(copy)
    assert not set(made(one)) & set(made(other))
    other.unlink()
    with pytest.raises(ConfigError, match=rf"^backbone\.weights={other}: no such file"):
        made(other)


@pytest.mark.parametrize("train", ["all", "none"])
def test_names_of_known_classes_are_their_files_content(on_disk, tmp_path, train):
    recipe = () if train == "all" else ("backbone.recipe=null",)
    (tmp_path / "weights.pt").write_bytes(b"a")

    def made(path):
        given = (f"+backbone.weights={tmp_path}/weights.pt", f"+backbone.classes={path}")
        return on_disk(*given, f"backbone.train={train}", *recipe).features.digest

    for name, content in (("one.txt", "apple\ncup"), ("copy.txt", "apple\ncup"), ("other.txt", "cup\napple")):
        (tmp_path / name).write_text(content)
    assert made(tmp_path / "one.txt") == made(tmp_path / "copy.txt") != made(tmp_path / "other.txt")


@pytest.mark.parametrize(
    ("overrides", "own"),
    [
        ((), False),
        (HEAD, False),
        (("backbone.reserve=0.3",), True),
        ((*HEAD, "backbone.reserve=0.3"), True),
        (("backbone.train=none", "backbone.recipe=null", "+backbone.weights=w.pt"), True),
    ],
    ids=["all", "head", "all with a reserve", "head with a reserve", "none"],
)
def test_the_backbone_knows_the_partition_where_it_learns_from_the_clients(on_disk, tmp_path, overrides, own):
    (tmp_path / "w.pt").write_bytes(b"a")
    one, other = (on_disk(*overrides, f"partition.seed={seed}") for seed in (0, 1))
    assert (one.base.digest == other.base.digest) is own
    if one.backbone is not None:
        assert (one.backbone.folder == other.backbone.folder) is own
    if one.head is not None:
        assert (one.head.folder == other.head.folder) is own
        assert one.features.folder == other.features.folder
    assert one.run.digest != other.run.digest


def test_images_of_the_backbones_own_make_it_the_partitions_stranger(stages):
    assert stages("partition.seed=1").backbone.folder == stages().backbone.folder  # digits has some


@pytest.mark.parametrize(
    "key",
    [
        *("dataset", "backbone", "backbone.model", "backbone.recipe", "features", "partition", "method"),
        *("client_mix", "training", "training.recipe", "evaluation"),
    ],
)
def test_a_class_that_moves_to_another_module_renames_nothing(stages, key, monkeypatch):
    node = OmegaConf.select(OmegaConf.create(stages().experiment.config), key)
    here = get_object(node["_target_"])
    moved = type(here.__name__, (here,), {"__module__": "iciia_exp.elsewhere"})
    module = types.ModuleType("iciia_exp.elsewhere")
    setattr(module, here.__name__, moved)
    monkeypatch.setitem(sys.modules, "iciia_exp.elsewhere", module)
    there = stages(f"{key}._target_=iciia_exp.elsewhere.{here.__name__}")
    assert get_object(OmegaConf.select(OmegaConf.create(there.experiment.config), key)["_target_"]) is moved
    assert there.evaluation.folder == stages().evaluation.folder
    assert there.features.folder == stages().features.folder
    assert there.backbone.folder == stages().backbone.folder


def test_classes_of_the_same_name_are_told_apart(stages):
    """timm has optimisers with the names of other ones of PyTorch, and passes on PyTorch's own."""
    less = ("~optimizer.fused", "~optimizer.weight_decay")

    def digest(target):
        return stages("method=iciia", f"optimizer._target_={target}", *less).run.digest

    assert digest("torch.optim.Adafactor") != digest("timm.optim.Adafactor")
    assert digest("torch.optim.AdamW") == digest("timm.optim.AdamW")


def test_another_class_is_another_run(stages, monkeypatch):
    """One that inherits its name, one of another package with the same name, and one with a name of its own."""
    from iciia_exp.methods.adapt.iciia import IciiaMethod

    digests = {run_digest(stages)}
    for package in ("one.parts", "other.parts", "other.more"):
        module = types.ModuleType(package)
        for key in ("inherited", "iciia"):
            own = {"__module__": package, **({"name": key} if key == "iciia" else {})}
            setattr(module, key.title(), type(key.title(), (IciiaMethod,), own))
        monkeypatch.setitem(sys.modules, package.partition(".")[0], types.ModuleType(package.partition(".")[0]))
        monkeypatch.setitem(sys.modules, package, module)
        digests |= {run_digest(stages, f"method._target_={package}.{key}") for key in ("Inherited", "Iciia")}
    # a class with a name of its own may move within its package
    assert len(digests) == 1 + 3 + 2
