import hashlib
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader
from torchvision import datasets

from iciia_exp.data.content import Content
from iciia_exp.data.datasets.omniglot import Omniglot
from iciia_exp.errors import ConfigError, UserError
from tests.making.omniglot import SMALL2, drawing, make_omniglot

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"

DRAWERS = {"backbone": 8, "train": 6, "val": 2, "test": 4}


@pytest.fixture
def small_sets(tmp_path):
    make_omniglot(tmp_path, "images_background_small1", zipped=True, prefix="omniglot_")
    make_omniglot(tmp_path, "images_background_small2", SMALL2, zipped=True)
    return tmp_path


def assert_protocol(dataset):
    """Every class is in every split with its drawers, no writer in two, nobody in two alphabets."""
    table = dataset.table
    counts = table.groupby(["label", "split"]).size().unstack()
    for split, number in DRAWERS.items():
        assert (counts[split] == number).all()
    assert (table.groupby("owner")["split"].nunique() == 1).all()
    assert (table.groupby("owner")["parent"].nunique() == 1).all()
    assert (table.groupby("label")["owner"].nunique() == 20).all()
    assert (table.groupby("label")["parent"].nunique() == 1).all()


def test_both_small_sets_are_one_dataset_without_doubles(small_sets):
    dataset = Omniglot(small_sets, DRAWERS)
    assert len(dataset) == 7 * 20
    assert dataset.class_names == (
        *("Balinese/character01", "Balinese/character02"),
        *("Greek/character01", "Greek/character02", "Greek/character03"),
        *("Japanese_(hiragana)/character01", "Japanese_(hiragana)/character02"),
    )
    assert_protocol(dataset)
    assert dataset.describe(0) == (
        "omniglot_images_background_small1.zip/images_background_small1/Balinese/character01/0108_01.png"
    )
    for i in range(len(dataset)):
        row = dataset.table.iloc[i]
        alphabet, character = dataset.class_names[row["label"]].split("/character")
        assert row["owner"].startswith(f"{alphabet}/drawer")
        pixels, _ = drawing(alphabet, int(character), int(row["owner"][-2:]))
        assert dataset[i].mode == "L"
        np.testing.assert_array_equal(np.asarray(dataset[i]), pixels * np.uint8(255))


def test_subsets(small_sets):
    assert len(Omniglot(small_sets, DRAWERS, subset="small1")) == 100
    assert len(Omniglot(small_sets, DRAWERS, subset=["small2"])) == 100
    one, both = Omniglot(small_sets, DRAWERS, subset=["small2", "small1"]), Omniglot(small_sets, DRAWERS)
    assert one.fingerprint() == both.fingerprint() != Omniglot(small_sets, DRAWERS, subset="small1").fingerprint()
    with pytest.raises(UserError, match=r"evaluation \(images_evaluation\) is not there"):
        Omniglot(small_sets, DRAWERS, subset=["small1", "evaluation"]).table  # noqa: B018


def test_zip_file_and_folder_are_the_same_dataset(tmp_path):
    make_omniglot(tmp_path / "zip", zipped=True)
    make_omniglot(tmp_path / "folder" / "omniglot-py")
    packed, plain = Omniglot(tmp_path / "zip", DRAWERS), Omniglot(tmp_path / "folder", DRAWERS)
    assert packed.fingerprint() == plain.fingerprint()
    assert packed.table.drop(columns="path").equals(plain.table.drop(columns="path"))
    assert packed[7].tobytes() == plain[7].tobytes()
    assert packed.content(Content(None)) == plain.content(Content(None))
    assert (tmp_path / "folder" / plain.describe(7)).is_file()
    (tmp_path / "folder" / plain.describe(7)).unlink()
    assert Omniglot(tmp_path / "folder", DRAWERS).fingerprint() != packed.fingerprint()


def test_the_deal_follows_the_seed_and_each_alphabet_has_its_own(small_sets):
    table = Omniglot(small_sets, DRAWERS).table
    assert table.equals(Omniglot(small_sets, DRAWERS).table)
    assert (table["split"] != Omniglot(small_sets, DRAWERS, seed=1).table["split"]).any()
    by_drawer = (
        table.assign(drawer=table["owner"].str[-2:])
        .drop_duplicates("owner")
        .pivot(index="drawer", columns="parent", values="split")
    )
    assert (by_drawer["Greek"] != by_drawer["Balinese"]).any()
    alone = Omniglot(small_sets, DRAWERS, subset="small2").table  # other alphabets change nothing
    greek = table[table["parent"] == "Greek"]
    assert alone[alone["parent"] == "Greek"]["split"].tolist() == greek["split"].tolist()


def test_splits_may_be_empty(small_sets):
    dataset = Omniglot(small_sets, {"backbone": 0, "train": 16, "val": 0, "test": 4})
    assert dataset.table["split"].value_counts().to_dict() == {"train": 7 * 16, "test": 7 * 4}


def test_zip_files_are_opened_by_each_process_for_itself(small_sets):
    dataset = Omniglot(small_sets, DRAWERS)
    want = [dataset[i].tobytes() for i in range(len(dataset))]
    again = pickle.loads(pickle.dumps(dataset))
    assert again[3].tobytes() == want[3]
    loader = DataLoader(dataset, batch_size=None, collate_fn=lambda image: image.tobytes(), num_workers=2)
    assert list(loader) == want


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"root": None}, "root"),
        ({"root": None, "download": True}, "root"),
        ({"root": "nowhere"}, "root"),
        ({"subset": "smal1"}, "subset"),
        ({"subset": []}, "subset"),
        ({"subset": ["all", "small1"]}, "subset"),
        ({"download": True, "subset": "small1"}, "download"),
        ({"drawers": DRAWERS | {"test": 5}}, "drawers"),
        ({"drawers": DRAWERS | {"test": 0, "train": 10}}, "drawers.test"),
        ({"drawers": {"train": 10, "test": 10}}, "drawers"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_name_their_key(tmp_path, change, key):
    with pytest.raises(ConfigError) as error:
        Omniglot(**{"root": tmp_path, "drawers": DRAWERS} | change)
    assert error.value.key == key


def test_folders_and_files_that_are_not_omniglot(tmp_path):
    with pytest.raises(UserError, match="Omniglot is not there") as error:
        Omniglot(tmp_path, DRAWERS).table  # noqa: B018
    assert "<alphabet>/<character>/<id>_<drawer>.png" in str(error.value)
    assert "dataset.download=true" in str(error.value)
    (tmp_path / "images_background" / "Greek").mkdir(parents=True)
    with pytest.raises(UserError, match="images_background has no images"):
        Omniglot(tmp_path, DRAWERS).table  # noqa: B018
    (tmp_path / "images_background.zip").write_bytes(b"PK broken off")
    with pytest.raises(UserError, match=r"images_background\.zip: cannot be read"):
        Omniglot(tmp_path, DRAWERS).table  # noqa: B018


def test_download(tmp_path, monkeypatch):
    """Torchvision's own steps, with the zip file lying where it would have been downloaded to."""
    folder = tmp_path / "data" / "omniglot-py"
    path = make_omniglot(folder, "images_evaluation", zipped=True)
    sums = {"images_evaluation": hashlib.md5(path.read_bytes()).hexdigest(), "images_background": "0"}
    monkeypatch.setattr(datasets.Omniglot, "zips_md5", sums)
    monkeypatch.setattr(datasets.Omniglot, "download_url_prefix", "file:///nowhere")
    assert len(Omniglot(tmp_path / "data", DRAWERS, download=True, subset="evaluation")) == 100
    with pytest.raises(UserError, match="could not be downloaded") as error:
        Omniglot(tmp_path / "data", DRAWERS, download=True).table  # noqa: B018
    assert "file:///nowhere/images_background.zip" in str(error.value)
    assert str(folder / "images_background.zip") in str(error.value)


@pytest.mark.skipif(
    not (REAL / "omniglot_images_background_small1.zip").is_file(),
    reason="Omniglot's small sets are not on this machine",
)
def test_the_real_small_sets(tmp_path):
    for name in ("omniglot_images_background_small1.zip", "omniglot_images_background_small2.zip"):
        shutil.copy(REAL / name, tmp_path)
    dataset = Omniglot(tmp_path, DRAWERS)
    assert (len(dataset), dataset.num_classes) == (4840, 242)
    assert dataset.table["parent"].nunique() == 8
    assert dataset.table["owner"].nunique() == 160
    assert_protocol(dataset)
    image = np.asarray(dataset[0])
    assert image.shape == (105, 105)
    assert set(np.unique(image)) == {0, 255}
    assert image.mean() > 200  # mostly paper


def test_a_zip_bomb_is_a_bad_image(tmp_path):
    make_omniglot(tmp_path, "images_background_small1", zipped=True, prefix="omniglot_")
    dataset = Omniglot(tmp_path, DRAWERS)
    inside = dataset.table["path"][0].split("/", 1)[1]
    with zipfile.ZipFile(tmp_path / "omniglot_images_background_small1.zip") as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "omniglot_images_background_small1.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in packed.items():
            archive.writestr(name, bytes(1 << 20) if name == inside else content)
    dataset = Omniglot(tmp_path, DRAWERS)
    with pytest.raises(ValueError, match=r"would be unpacked to 1,048,576 bytes"):
        dataset[0]
    assert dataset[1].size == (105, 105)
