"""Digests count what can change a number and nothing else; errors name the key that the user typed."""

import pytest

from iciia_exp.errors import ConfigError, UserError


def run_digest(plan, *overrides):
    return plan(*overrides).run_digest


@pytest.mark.parametrize(
    "override",
    [
        "logger=wandb",
        "trainer.accelerator=auto",
        "features.num_workers=2",
        "features.batch_size=7",
        "output_dir=elsewhere",
        "cache_dir=elsewhere",
        "name=other",
        "stage=train",
        "backbone.name=other",
        "method.shuffle=false",  # with one group it changes nothing
    ],
)
def test_what_changes_no_number_changes_no_digest(plan, override):
    assert run_digest(plan, override) == run_digest(plan)


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "partition.seed=1",
        "backbone.seed=1",
        "dataset.seed=1",
        "dataset.noise_std=0.3",
        "groups=2",
        "heads=2",
        "method.dropout=0",
        "protocol.images=8",
        "protocol.recipe.epochs=4",
        "backbone.recipe.epochs=3",
        "features.dtype=float16",
        "trainer.precision=bf16-mixed",
        "+trainer.max_epochs=1",
        "+trainer.limit_train_batches=1",
    ],
)
def test_what_changes_a_number_changes_the_digest(plan, override):
    assert run_digest(plan, override) != run_digest(plan)


def test_groups_max_and_d_are_one_run(plan):
    assert run_digest(plan, "groups=max") == run_digest(plan, "groups=32")


def test_keys_that_a_method_does_not_use_are_dropped(plan):
    assert run_digest(plan, "method=linear_head", "groups=4") == run_digest(plan, "method=linear_head")
    plain = run_digest(plan, "method=backbone")
    assert run_digest(plan, "method=backbone", "seed=5", "protocol.recipe.lr=1", "heads=8") == plain
    assert run_digest(plan, "method=linear_head", "seed=5") != run_digest(plan, "method=linear_head")


def test_backbone_and_features_are_shared_where_they_can_be(plan):
    one, other = plan(), plan("seed=3", "groups=8", "partition.seed=2", "protocol.recipe.lr=1")
    assert one.backbone_dir == other.backbone_dir
    assert one.features_dir == other.features_dir
    assert one.run_dir != other.run_dir
    assert plan("features.dtype=float16").backbone_dir == one.backbone_dir
    assert plan("features.dtype=float16").features_dir != one.features_dir


def test_no_path_needs_quoting(plan):
    for path in (plan().run_dir, plan().features_dir, plan().backbone_dir):
        assert "=" not in path.name
        assert " " not in path.name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("groups=3", "groups=3: must divide the feature width D=32; valid: 1, 2, 4, 8, 16, 32, or max"),
        ("heads=5", "heads=5: must divide"),
        ("method.heads=5", "method.heads=5: must divide"),
        ("method.num_layers=0", "method.num_layers=0: must be a whole number of at least 1"),
        ("partition.images_per_client=0", "partition.images_per_client=0: must be a whole number"),
        ("protocol.recipe.lr=0", "protocol.recipe.lr=0: must be a number above 0"),
        ("protocol.recipe.optimizer=sdg", "protocol.recipe.optimizer=sdg: .*did you mean sgd"),
        ("backbone.recipe.patience=3", "backbone.recipe.patience=3: must be 0|recipe.patience"),
        ("backbone.model.dim=0", "backbone.model.dim=0: must be a whole number"),
        ("dataset.sizes.test=1700", "dataset.sizes=.*asks for"),
        ("stage=trian", "stage=trian: .*did you mean train"),
        ("seed=-1", "seed=-1"),
        ("name=a/b", "name=a/b: is a folder's name"),
        ("features.dtype=float8", "features.dtype=float8: must be one of"),
    ],
)
def test_values_out_of_range_name_their_key(plan, override, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        plan(*([override] if not override.startswith("backbone.recipe.patience") else [f"+{override}"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+partition.clases=2", "partition.clases: no such key; did you mean partition.classes_per_client|valid"),
        ("+backbone.model.dims=2", "backbone.model.dims: no such key; did you mean backbone.model.dim"),
        ("+protocol.recipe.lrr=2", "protocol.recipe.lrr: no such key; did you mean protocol.recipe.lr"),
        ("+grups=2", r"grups: no such key; did you mean groups\?"),
        ("~method", "method: is missing"),
        ("dataset._target_=iciia_exp.data.nowhere.Digits", "dataset._target_=.*cannot be imported"),
        ("seed=???", "seed|Missing"),
        ("output_dir=${nothing}", ".*nothing"),
    ],
)
def test_structure_is_checked(plan, override, message):
    with pytest.raises(UserError, match=message):
        plan(override)


def test_errors_of_the_partition_name_the_group(plan):
    with pytest.raises(ConfigError, match=r"^partition\.classes_per_client=11: the dataset has 10 classes"):
        plan("partition.classes_per_client=11", "partition.images_per_client=11").clients  # noqa: B018
