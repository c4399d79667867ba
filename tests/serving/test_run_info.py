"""Arguments of a backbone in run.json: whole numbers, lists of them, and pairs of texts, nothing else."""

from pathlib import Path

import pytest

from iciia_exp.errors import UserError
from iciia_exp.serving.run_info import checked_info

BACKBONE = {
    "name": "recommender", "train": "all", "model": {"name": "recommender"}, "pretrained": False, "classes": None,
    "folder": "recommender-1", "weights": None,
}  # fmt: skip
INFO = {
    "format": 2, "dim": 82, "num_classes": 2, "images": 16, "task": "click", "class_names": ["no", "yes"],
    "features": "features-1", "method": {"name": "ctr_head", "arguments": {}}, "backbone": BACKBONE,
}  # fmt: skip


def with_arguments(arguments):
    return INFO | {"backbone": BACKBONE | {"arguments": arguments}}


def test_arguments_of_a_click_model():
    given = with_arguments({"users": 3, "items": 2, "item_categories": [[0, 1], []]})
    assert checked_info(given, Path("run.json")) == given
    assert checked_info(INFO, Path("run.json")) == INFO


def test_arguments_of_a_text_to_image_pair():
    given = with_arguments({"pairs": {"clarity": ["Clear photo", "Hazy photo"]}, "alignment": True})
    assert checked_info(given, Path("run.json")) == given


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        {"users": "3"},
        {"users": -1},
        {"users": 10**9},
        {"users": True},
        {"users": False},
        {"x": [[{}]]},
        {"pairs": "a"},
        {"pairs": {"x": ["a"]}},
        {"pairs": {"x": ["a", 1]}},
        {"alignment": 1},
    ],
)
def test_other_arguments_are_refused(arguments):
    with pytest.raises(UserError, match=r"run.json: backbone.arguments: expected whole numbers of 0 to 1,000,000"):
        checked_info(with_arguments(arguments), Path("run.json"))


def test_other_keys_are_refused():
    with pytest.raises(UserError, match="backbone: expected an object with classes, folder, model, name"):
        checked_info(INFO | {"backbone": BACKBONE | {"code": 1}}, Path("run.json"))
