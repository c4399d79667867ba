"""Images that only the backbone learns from: which they are, and which they never are."""

import numpy as np
import pandas as pd
import pytest

from iciia_exp.data.backbone_split import reserve_for_backbone
from iciia_exp.errors import ConfigError


def table(images=400, classes=5, owners=None, multi=False, splits=("train", "val", "test")):
    rng = np.random.default_rng(0)
    label = rng.integers(0, classes, images)
    owner = [f"u{i}" for i in rng.integers(0, owners, images)] if owners else [None] * images
    return pd.DataFrame(
        {
            "label": [[int(v)] for v in label] if multi else label,
            "split": rng.choice(splits, images),
            "owner": owner,
            "parent": None,
        }
    )


def reserved(before, share):
    """Return which rows moved, after checking that nothing else did."""
    copy = before.copy()
    after = reserve_for_backbone(before, share)
    pd.testing.assert_frame_equal(before, copy)
    moved = (after["split"] != before["split"]).to_numpy()
    assert (after.loc[moved, "split"] == "backbone").all()
    assert (before.loc[moved, "split"] == "train").all()
    pd.testing.assert_frame_equal(after.drop(columns="split"), before.drop(columns="split"))
    return moved


def test_nothing_is_reserved_by_default():
    before = table()
    assert reserve_for_backbone(before, 0.0) is before


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_same_share_of_every_class(share):
    before = table()
    moved = reserved(before, share)
    train = (before["split"] == "train").to_numpy()
    for k in range(5):
        of_class = train & (before["label"] == k).to_numpy()
        assert abs(moved[of_class].sum() - share * of_class.sum()) <= 0.5


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_owners_stay_together(share):
    before = table(owners=20)
    moved = reserved(before, share)
    train = (before["split"] == "train").to_numpy()
    sides = before[train].assign(moved=moved[train]).groupby("owner")["moved"].agg(["min", "max"])
    assert (sides["min"] == sides["max"]).all()
    assert sides["max"].sum() == round(share * len(sides))


@pytest.mark.parametrize("owners", ["one", "some"])
def test_without_owners_for_all_images_the_classes_count(owners):
    before = table(owners=20)
    before.loc[before.index[::7] if owners == "some" else before.index, "owner"] = None if owners == "some" else "u0"
    moved, train = reserved(before, 0.5), (before["split"] == "train").to_numpy()
    for k in range(5):
        of_class = train & (before["label"] == k).to_numpy()
        assert abs(moved[of_class].sum() - 0.5 * of_class.sum()) <= 0.5


def test_multi_label_images_are_reserved_one_by_one():
    before = table(multi=True)
    moved = reserved(before, 0.3)
    assert moved.sum() == round(0.3 * (before["split"] == "train").sum())


def test_the_images_are_always_the_same():
    np.testing.assert_array_equal(reserved(table(), 0.4), reserved(table(), 0.4))


def test_a_larger_share_keeps_what_a_smaller_one_took():
    for owners in (None, 20):
        small, large = (reserved(table(owners=owners), share) for share in (0.2, 0.6))
        assert (large | ~small).all()
        assert large.sum() > small.sum()


def test_too_few_images_to_share():
    few = table(images=3, classes=3, splits=("train",))
    with pytest.raises(ConfigError, match=r"reserve=0\.1: leaves the backbone 0 of 3 train images"):
        reserve_for_backbone(few, 0.1)
    with pytest.raises(ConfigError, match=r"reserve=0\.9: leaves the backbone 3 of 3 train images"):
        reserve_for_backbone(few, 0.9)
    with pytest.raises(ConfigError, match="leaves the backbone 0 of 0 train images"):
        reserve_for_backbone(table(splits=("test",)), 0.5)


def test_images_are_set_aside_once():
    with pytest.raises(ConfigError, match=r"reserve=0\.5: the dataset sets images aside for the backbone itself"):
        reserve_for_backbone(table(splits=("train", "backbone")), 0.5)
