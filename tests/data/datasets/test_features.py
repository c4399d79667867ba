import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from iciia_exp.data.content import Content
from iciia_exp.data.datasets.features import Features
from iciia_exp.errors import ConfigError, UserError
from tests.making.vectors import make_safetensors, make_vectors

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


def test_vectors_with_labels_only(tmp_path):
    vectors, labels = make_vectors(tmp_path)
    dataset = Features(tmp_path, SHARES)
    assert dataset.class_names == ("ant", "bee", "cat")
    assert [dataset.class_names[label] for label in dataset.table["label"]] == labels
    assert dataset.backbone_arguments() == {"dim": 8}
    by_class = dataset.table.groupby("label")["split"].value_counts().unstack()
    assert (by_class[["train", "val", "test"]] == [24, 8, 8]).all(axis=None)
    assert dataset.table["owner"].isna().all()
    assert dataset[5].dtype == np.float32
    np.testing.assert_array_equal(np.stack([dataset[i] for i in range(120)]), vectors)
    dataset[5][:] = 0  # what is given out is a copy
    np.testing.assert_array_equal(dataset[5], vectors[5])


def test_all_columns(tmp_path):
    rng = np.random.default_rng(0)
    columns = {
        "split": rng.choice(["train", "val", "test", "backbone"], 120),
        "owner": rng.choice(["ann", "bob"], 120),
        "parent": ["animal"] * 120,
        "timestamp": [f"2024-02-{1 + i % 28:02d}T12:00:00" for i in range(120)],
    }
    make_vectors(tmp_path, classes=("10", "2", "0"), **columns)
    dataset = Features(tmp_path, SHARES)
    assert dataset.class_names == ("0", "2", "10")
    assert dataset.table["split"].tolist() == [{"val": "val"}.get(s, s) for s in columns["split"]]
    assert dataset.table["owner"].tolist() == list(columns["owner"])
    assert set(dataset.table["parent"]) == {"animal"}
    assert dataset.table["time"].diff().iloc[1:27].tolist() == [86400.0] * 26


def test_owners_are_kept_together(tmp_path):
    owners = np.random.default_rng(0).choice([f"user{i}" for i in range(10)], 120)
    make_vectors(tmp_path, owner=owners)
    table = Features(tmp_path, SHARES).table
    assert not Features(tmp_path, SHARES).has_backbone_images
    assert table.groupby("owner")["split"].first().value_counts().to_dict() == {"train": 6, "val": 2, "test": 2}
    assert (table.groupby("owner")["split"].nunique() == 1).all()


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4"])
def test_types_of_npy_files(tmp_path, dtype):
    vectors, _ = make_vectors(tmp_path, dtype=dtype)
    dataset = Features(tmp_path, SHARES)
    assert dataset[0].dtype == np.dtype("float32")
    np.testing.assert_array_equal(dataset[0], vectors[0].astype("float32"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_safetensors(tmp_path, dtype):
    vectors, _ = make_vectors(tmp_path)
    stored = torch.tensor(vectors).to(dtype)
    make_safetensors(tmp_path / "clip.safetensors", stored, scale=torch.ones(3))
    dataset = Features(tmp_path, SHARES, file="clip.safetensors")
    assert dataset.backbone_arguments() == {"dim": 8}
    assert dataset[7].dtype == np.float32
    np.testing.assert_array_equal(np.stack([dataset[i] for i in range(120)]), stored.float().numpy())


def test_the_tensor_of_a_safetensors_file_is_chosen_by_key(tmp_path):
    vectors, _ = make_vectors(tmp_path)
    path = tmp_path / "clip.safetensors"
    make_safetensors(path, vectors, text_embeds=torch.zeros(3, 8), scale=torch.ones(3))
    assert Features(tmp_path, SHARES, file=path.name, key="image_embeds")[3].tolist() == vectors[3].tolist()
    with pytest.raises(UserError, match=r"by dataset\.key; it has .*image_embeds \[120, 8\]"):
        Features(tmp_path, SHARES, file=path.name).table  # noqa: B018
    with pytest.raises(UserError, match=r"has no tensor image \(dataset\.key\), only .*image_embeds"):
        Features(tmp_path, SHARES, file=path.name, key="image").table  # noqa: B018
    with pytest.raises(UserError, match=r"\[images, features\], not \[3\]"):
        Features(tmp_path, SHARES, file=path.name, key="scale").table  # noqa: B018


def test_absolute_paths_need_no_folder(tmp_path):
    make_vectors(tmp_path / "a")
    file, csv = str(tmp_path / "a" / "features.npy"), str(tmp_path / "a" / "images.csv")
    assert len(Features(None, SHARES, file=file, csv=csv)) == 120
    assert len(Features(tmp_path / "a", SHARES, csv=csv)) == 120


def test_fingerprint_follows_the_content(tmp_path):
    vectors, _ = make_vectors(tmp_path / "a", owner=["x"] * 60 + ["y"] * 30 + ["z"] * 30)

    def fingerprint(**arguments):
        dataset = Features(tmp_path / "a", SHARES, **arguments)
        return dataset.fingerprint(), dataset.content(Content(tmp_path / "kept"))

    first = fingerprint()
    make_safetensors(tmp_path / "a" / "same.safetensors", vectors)
    assert fingerprint(file="same.safetensors") == first == fingerprint()
    csv = tmp_path / "a" / "images.csv"
    text = csv.read_text()
    csv.write_text(text.replace(",z\n", ",w\n"))
    assert fingerprint() != first
    csv.write_text(text.replace("ant", "ape"))
    assert fingerprint() != first
    csv.write_text(text)
    vectors[119, 7] += 1
    np.save(tmp_path / "a" / "features.npy", vectors)
    assert fingerprint() != first


def test_open_files_are_not_pickled(tmp_path):
    vectors, _ = make_vectors(tmp_path, images=2000, dim=64)
    for file in ("features.npy", "f.safetensors"):
        make_safetensors(tmp_path / "f.safetensors", vectors)
        dataset = Features(tmp_path, SHARES, file=file)
        assert len(dataset) == 2000
        dataset[0]
        data = pickle.dumps(dataset)
        assert len(data) < vectors.nbytes / 4
        assert pickle.loads(data)[9].tolist() == vectors[9].tolist()
        loader = DataLoader(dataset, batch_size=500, num_workers=1)
        np.testing.assert_array_equal(torch.cat(list(loader)).numpy(), vectors)


def test_numbers_of_rows_must_agree(tmp_path):
    make_vectors(tmp_path)
    csv = tmp_path / "images.csv"
    csv.write_text(csv.read_text() + "ant\n")
    with pytest.raises(UserError, match=r"images\.csv: has 121 rows, and .*features\.npy has 120 vectors"):
        Features(tmp_path, SHARES).table  # noqa: B018


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.zeros(120, "f4"), r"\[images, features\], not \[120\]"),
        (np.zeros((120, 2, 2), "f4"), r"not \[120, 2, 2\]"),
        (np.zeros((120, 0), "f4"), r"not \[120, 0\]"),
        (np.zeros((120, 8), "i8"), "must be float16, float32 or float64, not int64"),
        (np.full((120, 8), None), "cannot be read"),
    ],
)
def test_arrays_that_are_no_vectors(tmp_path, array, problem):
    make_vectors(tmp_path)
    np.save(tmp_path / "features.npy", array)
    with pytest.raises(UserError, match=problem) as error:
        Features(tmp_path, SHARES).table  # noqa: B018
    assert "features.npy" in str(error.value)


@pytest.mark.parametrize("file", ["features.npy", "features.safetensors"])
def test_files_that_are_something_else(tmp_path, file):
    make_vectors(tmp_path)
    for content in (b"", b"something else altogether"):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(UserError, match=rf"{file}: cannot be read"):
            Features(tmp_path, SHARES, file=file).table  # noqa: B018


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"root": None}, "root"),
        ({"root": "nowhere"}, "root"),
        ({"file": "features.pt"}, "file"),
        ({"file": "absent.npy"}, "file"),
        ({"csv": "absent.csv"}, "csv"),
        ({"key": "image_embeds"}, "key"),
        ({"shares": {"train": 0.5, "test": 0.4}}, "shares"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_bad_arguments_name_their_key(tmp_path, change, key):
    make_vectors(tmp_path)
    with pytest.raises(ConfigError) as error:
        Features(**{"root": tmp_path, "shares": SHARES} | change)
    assert error.value.key == key


def test_vectors_that_are_not_finite_are_bad_images(tmp_path):
    vectors, _ = make_vectors(tmp_path)
    vectors[3], vectors[50] = np.nan, np.inf
    np.save(tmp_path / "features.npy", vectors)
    dataset = Features(tmp_path, SHARES)
    assert np.isfinite(dataset[4]).all()
    for row in (3, 50):
        with pytest.raises(ValueError, match="has numbers that are not finite"):
            dataset[row]
