"""Prompts of text files and tables."""

import logging

import pytest
import torch

from iciia_exp.data.datasets.prompts import PAIRS, Prompts
from iciia_exp.data.prompts import LENGTH, as_bytes, as_text
from iciia_exp.errors import ConfigError, UserError
from tests.conftest import SHARED

MANY = [f"prompt {number}" for number in range(20)]


def test_prompts_keep_their_characters(caplog):
    prompts = ["a café in 東京", "x" * 600, "é" * 300]
    with caplog.at_level(logging.WARNING):
        given = torch.stack([as_bytes(prompt) for prompt in prompts])
    assert as_text(given) == [prompts[0], "x" * LENGTH, "é" * (LENGTH // 2)]
    assert as_text(given.float()) == as_text(given)
    assert sum("is cut to 512" in message for message in caplog.messages) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_text_file_has_a_prompt_a_line(tmp_path, encoding, caplog):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(["a café", "", *MANY, "  ", "prompt 3"]), encoding=encoding)
    with caplog.at_level(logging.WARNING):
        dataset = Prompts(file)
        table = dataset.table
    assert table["path"].tolist() == ["a café", *MANY]
    assert "1 prompts are there twice" in caplog.text
    assert table["split"].value_counts().to_dict() == {"train": 10, "test": 6, "val": 5}
    assert dataset.class_names == tuple(PAIRS)
    assert set(table["owner"]) == {"all"}


def test_a_table_has_owners_and_splits(tmp_path):
    file = tmp_path / "prompts.tsv"
    splits = ["training", "dev", "test", "test"]
    rows = [f"{p}\tkind {i % 2}\t{splits[i % 4]}" for i, p in enumerate(MANY)]
    file.write_text("\n".join(["Caption\tCategory\tsplit", *rows]))
    dataset = Prompts(file, {"prompt": "Caption", "owner": "Category"}, alignment=True)
    table = dataset.table
    assert table["owner"].tolist() == [f"kind {i % 2}" for i in range(20)]
    assert table["split"].value_counts().to_dict() == {"test": 10, "train": 5, "val": 5}
    assert dataset.class_names[-1] == "alignment"
    assert dataset.backbone_arguments()["alignment"] is True


def test_another_letter_is_another_dataset_and_another_place_is_not(tmp_path):
    text = "\n".join(MANY)
    prints = []
    for name, content in (("one.txt", text), ("two.txt", text), ("three.txt", text.replace("19", "91"))):
        (tmp_path / name).write_text(content)
        prints.append(Prompts(tmp_path / name).fingerprint())
    assert prints[0] == prints[1] != prints[2]
    assert Prompts(tmp_path / "one.txt", alignment=True).fingerprint() != prints[0]


def test_the_prompts_of_parti():
    if not (file := SHARED / "data" / "prompts_parti.tsv").is_file():
        pytest.skip("the prompts are not on this machine")
    dataset = Prompts(file, {"prompt": "Prompt", "owner": "Category"})
    assert len(dataset.table) > 1500
    assert "Animals" in set(dataset.table["owner"])


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({}, "", "has no prompts"),
        ({}, "one\n", "no prompts for train and test, of 1 in all"),
        ({"columns": {"prompt": "Caption"}}, "one\n", "has no columns: it is read line by line"),
        ({"shares": {"train": 0.5, "test": 0.5}}, "one\n", "must be of train, val"),
        ({"metrics": {"sharp": ["a"]}}, "one\n", "must be two texts"),
        ({"metrics": {}}, "one\n", "must have at least one"),
    ],
)
def test_wrong_files_and_settings(tmp_path, options, text, message):
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    with pytest.raises((UserError, ConfigError), match=message):
        Prompts(file, **options).table  # noqa: B018
