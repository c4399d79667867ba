"""Errors of the configuration name the key that the user typed."""

import pytest

from iciia_exp.config.build import with_path
from iciia_exp.config.check import check_keys
from iciia_exp.config.experiment import Experiment
from iciia_exp.config.paths import CONF_DIR
from iciia_exp.engine.stages import Stages
from iciia_exp.errors import ConfigError, UserError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cache_dir=5", "cache_dir=5: must be the path of a folder"),
        ("output_dir=null", "output_dir=None: must be the path"),
        ("output_dir=''", "output_dir=: must be the path"),
        ("training.recipe=1", "training.recipe=1: must be a node with a _target_"),
        ("backbone.recipe=3", "backbone.recipe=3: must be a node"),
        ("+method._partial_=true", "method._partial_=True: cannot be set here"),
        ("+dataset._partial_=true", "dataset._partial_=True: cannot be set here"),
        ("method._target_=builtins.dict", "method._target_=builtins.dict: must be a method"),
        ("partition.deals=100000", r"partition.deals=100000: must be .* 1 to 1000 \(deals of all images\)"),
        ("evaluation.history_orders=1000000000", "evaluation.history_orders=1000000000: must be .* 1 to 1000"),
        ("features.num_workers=100000", "features.num_workers=100000: must be .* 0 to 256"),
        ("dataset.noise_std=1e30", "dataset.noise_std=.*: must be a number at least 0, at most 100"),
        ("backbone.model.mean=1e23", "backbone.model.mean=.*: must be a number at least -1000"),
        ("+backbone.published_top1=abc", "backbone.published_top1=abc: must be a number"),
        ("client_mix.size=100000", "client_mix.size=100000: must be a number above 0, at most 1000"),
        ("backbone.name='..'", r"backbone\.name=\.\.: must be a text with a letter or digit"),
        ("backbone.name=''", "backbone.name=: must be a text"),
        ("backbone.name=null", "backbone.name=None: must be a text"),
        ("groups=3", "groups=3: must divide the feature width D=32; valid: 1, 2, 4, 8, 16, 32, or max"),
        ("heads=5", "heads=5: must divide"),
        ("method.heads=5", "method.heads=5: must divide"),
        ("method.num_layers=0", "method.num_layers=0: must be a whole number of 1 to 1000"),
        ("partition.images_per_client=0", "partition.images_per_client=0: must be a whole number"),
        ("optimizer.lr=-1", r"optimizer=AdamW\(lr=-1.*\): cannot be built \(Invalid learning rate"),
        ("training.recipe.optimizer=sdg", "training.recipe.optimizer=sdg: must be a node with a _target_"),
        ("+backbone.recipe.scheduler.total_steps=0", "backbone.recipe.scheduler=OneCycleLR.*: cannot be built"),
        ("callbacks.early_stopping=3", "callbacks.early_stopping=3: has no _target_"),
        ("+logger.mine.name=x", "logger.mine=.*: has no _target_"),
        ("training.prefetch_factor=2", "training.prefetch_factor=2: needs processes"),
        ("backbone.model.dim=10000000000", "backbone.model.dim=10000000000: must be a whole number of 1 to 65536"),
        ("backbone.model.dim=0", "backbone.model.dim=0: must be a whole number"),
        ("dataset.sizes.test=1700", "dataset.sizes=.*asks for"),
        ("stage=trian", "stage=trian: .*did you mean train"),
        ("seed=-1", "seed=-1"),
        ("name=a/b", "name=a/b: is a folder's name"),
        ("features.dtype=float8", "features.dtype=float8: must be one of"),
    ],
)
def test_values_out_of_range_name_their_key(stages, override, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        stages(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+partition.clases=2", "partition.clases: no such key; did you mean partition.classes_per_client|valid"),
        ("+backbone.model.dims=2", "backbone.model.dims: no such key; did you mean backbone.model.dim"),
        ("+training.recipe.epoch=2", "training.recipe.epoch: no such key; did you mean training.recipe.epochs"),
        ("+optimizer.lrr=2", "optimizer.lrr: no such key; did you mean optimizer.lr"),
        ("+scheduler.gama=2", "scheduler.gama: no such key"),
        ("+grups=2", r"grups: no such key; did you mean groups\?"),
        ("~method", "method: is missing"),
        ("dataset._target_=iciia_exp.data.nowhere.Digits", "dataset._target_=.*cannot be imported"),
        ("seed=???", "seed|Missing"),
        ("output_dir=${nothing}", ".*nothing"),
    ],
)
def test_structure_is_checked(stages, override, message):
    with pytest.raises(UserError, match=message):
        stages(override)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_what_does_not_fit_into_memory_is_said(error):
    def fail():
        raise error

    with pytest.raises(UserError, match="^backbone: does not fit into this machine's memory; choose smaller sizes$"):
        with_path("backbone", fail)
    with pytest.raises(RuntimeError, match="^other$"):
        with_path("backbone", lambda: (_ for _ in ()).throw(RuntimeError("other")))


def test_errors_of_the_partition_name_the_group(stages):
    with pytest.raises(ConfigError, match=r"^partition\.classes_per_client=11: the dataset has 10 classes"):
        stages("partition.classes_per_client=11", "partition.images_per_client=11").clients  # noqa: B018


FILES = sorted(
    path.stem for path in (CONF_DIR / "dataset").glob("*.yaml") if "root: ${data_dir}" in path.read_text("utf-8")
)


def test_every_dataset_with_files_is_here():
    assert len(FILES) == len(list((CONF_DIR / "dataset").glob("*.yaml"))) - 2  # digits and scenes have none


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("value", ["null", "/nonexistent"])
def test_a_missing_folder_is_that_of_data_dir(compose, name, value):
    overrides = [f"dataset={name}", f"data_dir={value}", "logger=csv"]
    with pytest.raises(ConfigError, match=rf"^data_dir={value}: ") as error:
        Stages(Experiment.from_config(compose(*overrides))).table  # noqa: B018
    assert error.value.key == "data_dir"


class Own:
    """A class of a user's, annotated as people write it."""

    def __init__(self, file: str = None, names: list[str] | None = None, sizes: "dict[str, int]" = {}, size: int = 1):  # noqa: B006, RUF013
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, None),
        ({"file": "a", "names": ["b"], "sizes": {"c": 1}, "size": 2}, None),
        ({"file": None, "names": None}, None),
        ({"size": "left to the class"}, None),
        ({"file": 3}, "own.file=3: must be a text"),
        ({"file": ["a"]}, r"own.file=\['a'\]: must be a text"),
        ({"names": "b"}, r"own.names=b: must be a list \[value, ...\] or null"),
        ({"sizes": None}, "own.sizes=None: must be a dictionary {key: value, ...}"),
    ],
)
def test_values_are_of_the_kind_that_the_signature_says(given, message):
    node = {"_target_": f"{__name__}.Own", **given}
    if message is None:
        check_keys(node, "own")
        return
    with pytest.raises(ConfigError, match=f"^{message}$"):
        check_keys(node, "own")
