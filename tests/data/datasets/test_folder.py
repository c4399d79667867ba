import logging
import pickle
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from iciia_exp.data.datasets.folder import Folder
from iciia_exp.errors import ConfigError, UserError
from tests.making.folder import CLASSES, make_folder, write_table
from tests.making.images import make_image, write_image


def counts(data):
    return data.table["split"].value_counts().to_dict()


def paths(per_class=10):
    return [f"{name}/{number:03d}.jpg" for name in CLASSES for number in range(per_class)]


# ---- layouts


def test_class_folders_are_split_by_shares_within_each_class(tmp_path):
    data = Folder(make_folder(tmp_path))
    assert data.class_names == CLASSES
    assert data.table.groupby(["label", "split"]).size().unstack().to_dict("list") == {
        "val": [2, 2, 2],
        "test": [2, 2, 2],
        "train": [6, 6, 6],
    }
    assert data.table["path"].tolist() == paths()
    assert data.table[["owner", "parent"]].isna().all(axis=None)
    assert "time" not in data.table
    expected = np.asarray(make_image(2, 5, 16)).mean((0, 1))
    np.testing.assert_allclose(np.asarray(data[25]).mean((0, 1)), expected, atol=15)  # JPEG
    assert data[0].mode == "RGB"
    assert data.describe(25) == "cup/005.jpg"


def test_the_split_is_fixed_by_its_seed(tmp_path):
    one, again, other = (Folder(make_folder(tmp_path), seed=seed).table["split"].tolist() for seed in (0, 0, 1))
    assert one == again != other


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train", "val"), {"train": 6, "test": 6}),
        (("train", "val", "test"), {"train": 6, "val": 6, "test": 6}),
        (("Train", "Validation", "Test"), {"train": 6, "val": 6, "test": 6}),
        (("train", "selection", "valid"), {"train": 6, "val": 6, "test": 6}),
        (("backbone", "train", "test"), {"backbone": 6, "train": 6, "test": 6}),
    ],
)
def test_split_folders(tmp_path, splits, expected):
    data = Folder(make_folder(tmp_path, per_class=2, splits=splits))
    assert counts(data) == expected
    assert data.class_names == CLASSES


def test_a_train_is_a_class_among_others(tmp_path):
    assert Folder(make_folder(tmp_path, classes=("bus", "train"))).class_names == ("bus", "train")


def test_deeper_images_belong_to_the_class_folder(tmp_path):
    make_folder(tmp_path, splits=("train", "test"), per_class=1)
    write_image(tmp_path / "train/cup/blue/large/1.PNG", 0)
    write_image(tmp_path / "train/cup/.cache/1.png", 0)
    table = Folder(tmp_path).table
    assert table[table["label"] == 2]["path"].tolist() == [
        "test/cup/000.jpg",
        "train/cup/000.jpg",
        "train/cup/blue/large/1.PNG",
    ]


def test_whole_numbers_are_sorted_by_value(tmp_path):
    assert Folder(make_folder(tmp_path, classes=("10", "9", "1"))).class_names == ("1", "9", "10")
    named = Folder(make_folder(tmp_path / "padded", classes=("010", "002", "001", "01"))).class_names
    assert named == ("001", "01", "002", "010")  # folders keep their names


# ---- tables


def test_a_table_decides_where_it_says_something(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    make_folder(tmp_path, per_class=4, splits=("train", "test"))
    write_table(
        tmp_path / "images.csv",
        path=["./train/cup/001.jpg", "train\\apple\\001.jpg", "test/bread/000.jpg", "train/bread/000.jpg"],
        label=["mug", None, "", "bread"],
        owner=["bob", "ann", None, None],
        split=["", None, "val", "test"],
        parent=["things", "food", "food", "food"],
        timestamp=["2020-01-01", "1970-01-01T00:01:00", None, "1970-01-01T01:00:00.5+01:00"],
    )
    data = Folder(tmp_path, csv="images.csv")
    assert data.class_names == ("apple", "bread", "mug")
    table = data.table
    assert table["path"].tolist() == [
        "test/bread/000.jpg",
        "train/apple/001.jpg",
        "train/bread/000.jpg",
        "train/cup/001.jpg",
    ]
    assert table["label"].tolist() == [1, 0, 1, 2]
    assert table["split"].tolist() == ["val", "train", "test", "train"]
    assert table["owner"].fillna("nobody").tolist() == ["nobody", "ann", "nobody", "bob"]
    assert table["parent"].tolist() == ["food", "food", "food", "things"]
    np.testing.assert_array_equal(table["time"], [np.nan, 60.0, 0.5, 1577836800.0])
    assert table["time"].dtype == np.float64
    assert "images.csv lacks 20 images" in caplog.text
    assert "no train images of bread" in caplog.text
    data[0].load()


def test_images_anywhere_with_labels_from_the_table(tmp_path):
    for number in range(10):
        write_image(tmp_path / "images" / f"{number}.png", number % 2)
    table = write_table(
        tmp_path / "t.csv", path=[f"images/{i}.png" for i in range(10)], label=["a", "b"] * 5, time=range(10)
    )
    data = Folder(tmp_path / "images" / "..", csv=table)
    assert data.class_names == ("a", "b")
    assert data.table["time"].tolist() == list(range(10))
    assert counts(data) == {"train": 6, "val": 2, "test": 2}


def test_the_order_of_rows_changes_nothing(tmp_path):
    make_folder(tmp_path)
    rows = pd.DataFrame({"path": paths(), "owner": [str(i % 7) for i in range(30)]})
    rows.to_csv(tmp_path / "one.csv", index=False)
    rows.sample(frac=1, random_state=0).to_csv(tmp_path / "two.csv", index=False)
    one, two = (Folder(tmp_path, csv=name) for name in ("one.csv", "two.csv"))
    pd.testing.assert_frame_equal(one.table, two.table)
    assert one.fingerprint() == two.fingerprint()


def test_no_owner_is_in_two_splits(tmp_path):
    make_folder(tmp_path, per_class=20)
    owners = [f"user{i % 12}" if i < 48 else None for i in range(60)]
    data = Folder(tmp_path, csv=write_table(tmp_path / "t.csv", path=paths(20), owner=owners))
    assert (data.table.groupby("owner")["split"].nunique() == 1).all()
    assert data.table["owner"].isna().sum() == 12
    shares = data.table["split"].value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.6, abs=0.1)
    assert shares["test"] == pytest.approx(0.2, abs=0.1)


def test_missing_images_stay_in_the_table(tmp_path, caplog):
    make_folder(tmp_path, per_class=2)
    table = write_table(tmp_path / "t.csv", path=[*paths(2), "cup/lost.jpg"])
    data = Folder(tmp_path, csv=table)
    assert len(data) == 7
    assert "1 of 7 images are missing (cup/lost.jpg)" in caplog.text
    with pytest.raises(FileNotFoundError):
        data[6]


def test_parents_of_classes(tmp_path):
    make_folder(tmp_path)
    parents = write_table(
        tmp_path / "parents.csv", **{"class": ["cup", "apple", "bread"], "parent": ["things", "food", "food"]}
    )
    data = Folder(tmp_path, parents=parents)
    assert data.table["parent"].unique().tolist() == ["food", "things"]
    own = write_table(tmp_path / "t.csv", path=paths(), parent=["fruit"] * 10 + [None] * 20)
    assert Folder(tmp_path, csv=own, parents=parents).table["parent"].unique().tolist() == ["fruit", "food", "things"]
    write_table(parents, **{"class": ["cup"], "parent": ["things"]})
    with pytest.raises(UserError, match=r"parents.csv: lacks 2 of the 3 classes \(apple, bread\)"):
        data = Folder(tmp_path, parents=parents).table


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    data = Folder(make_folder(tmp_path / "one"))
    before = data.fingerprint()
    assert pickle.loads(pickle.dumps(data)).fingerprint() == before
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert Folder(tmp_path / "two").fingerprint() == before
    assert Folder(tmp_path / "two", seed=1).fingerprint() != before
    (tmp_path / "two/cup").rename(tmp_path / "two/mug")
    assert Folder(tmp_path / "two").fingerprint() != before


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "key", "message"),
    [
        ({"root": None}, "root", "train/<class>"),
        ({"root": "nowhere"}, "root", "no such folder"),
        ({"csv": "nowhere.csv"}, "csv", "there is no such file; give a CSV table with a column path"),
        ({"parents": "nowhere.csv"}, "parents", "there is no such file"),
        ({"seed": -1}, "seed", "at least 0"),
        ({"shares": {"train": 0.5, "test": 0.4}}, "shares", "must add up to 1, not 0.9"),
        ({"shares": {"train": 0.5, "tets": 0.5}}, "shares.tets", "did you mean test"),
        ({"shares": {"train": 1.0}}, "shares", "gives nothing to test"),
        ({"shares": {"train": 0.5, "test": 0.6, "val": -0.1}}, "shares.val", "at least 0"),
    ],
)
def test_bad_arguments_name_their_key(tmp_path, arguments, key, message):
    with pytest.raises(ConfigError, match=message) as error:
        Folder(**{"root": tmp_path} | arguments)
    assert error.value.key == key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: [shutil.rmtree(r / s) for s in ("train", "test")], "has no images"),
        (lambda r: (r / "extras").mkdir(), "has extras beside the split folders test, train"),
        (lambda r: (r / "test/cup").rename(r / "test/cups"), r"1 classes without train images \(cups\)"),
        (
            lambda r: write_image(r / "train/loose.jpg", 0),
            r"1 images have no label \(train/loose.jpg\); use class folders",
        ),
        (lambda r: write_image(r / "loose.jpg", 0), "1 images have no label"),
        (lambda r: shutil.rmtree(r / "test"), r"has a single class \(train\), at least 2"),
        (lambda r: (r / "test").rename(r / "backbone"), "the split folders backbone, train and none for test"),
    ],
)
def test_wrong_folders_are_named(tmp_path, change, message):
    change(make_folder(tmp_path, per_class=1, splits=("train", "test")))
    with pytest.raises(UserError, match=message):
        Folder(tmp_path).table  # noqa: B018


@pytest.mark.parametrize("form", ["absolute", "through a link", "beside the table", "backslashes"])
def test_paths_as_tables_have_them(tmp_path, form):
    root = make_folder(tmp_path / "data" / "images")
    write_table(root / "t.csv", path=paths())
    want = Folder(root, csv="t.csv").table
    file = tmp_path / "data" / "t.csv"
    (tmp_path / "link").symlink_to(root)
    given = {
        "absolute": [str(root / path) for path in paths()],
        "through a link": [str(tmp_path / "link" / path) for path in paths()],
        "beside the table": [f"images/{path}" for path in paths()],
        "backslashes": [path.replace("/", "\\") for path in paths()],
    }[form]
    write_table(file, path=given)
    assert Folder(root, csv=file).table.equals(want)
    if form == "absolute":
        assert Folder(tmp_path / "link", csv=file).table.equals(want)


def test_columns_of_other_names(tmp_path):
    make_folder(tmp_path)
    write_table(tmp_path / "t.csv", image=paths(), user=[str(i % 6) for i in range(30)])
    table = Folder(tmp_path, csv="t.csv", columns={"path": "image", "owner": "user"}).table
    assert set(table["owner"]) == set("012345")


@pytest.mark.parametrize("names", [("training", "testing"), ("Train", "dev", "Test"), ("TRAINING", "valid")])
def test_split_folders_by_any_name(tmp_path, names):
    make_folder(tmp_path, per_class=1, splits=names)
    splits = {"dev": "val", "valid": "test"}
    expected = {splits.get(name, name.lower().removesuffix("ing")) for name in names}
    assert set(Folder(tmp_path).table["split"]) == expected


def test_a_folder_around_the_classes_is_a_hint(tmp_path):
    make_folder(tmp_path / "images")
    with pytest.raises(
        UserError, match=rf"single class \(images\).*; the .* are the classes with data_dir={tmp_path}/images"
    ):
        Folder(tmp_path).table  # noqa: B018


def test_a_folder_around_the_classes_is_a_hint_beside_a_loose_picture(tmp_path):
    make_folder(tmp_path / "images")
    Image.new("RGB", (4, 4)).save(tmp_path / "logo.png")
    hint = f"the folders in it are the classes with data_dir={tmp_path}/images"
    with pytest.raises(UserError, match=rf"1 images have no label \(logo.png\).*; {hint}"):
        Folder(tmp_path).table  # noqa: B018


def test_a_long_listing_says_how_far_it_is(tmp_path, caplog, monkeypatch):
    from iciia_exp.data.readers import files

    make_folder(tmp_path)
    monkeypatch.setattr(logging.getLogger("iciia_exp"), "propagate", True)
    caplog.set_level(logging.INFO)
    len(Folder(tmp_path))
    assert "listed so far" not in caplog.text
    monkeypatch.setattr(files, "_PATIENCE", -1.0)
    len(Folder(tmp_path))
    assert re.search(rf"{tmp_path}: \d+ files listed so far", caplog.text)


def test_what_is_passed_over_is_counted_and_named(tmp_path, caplog):
    make_folder(tmp_path, per_class=1, splits=("train", "test"))
    whole = Folder(tmp_path).table
    (tmp_path / "train/plum").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    for name in ("train/cup/a.heic", "train/cup/b.HEIC", "notes.txt", ".DS_Store"):
        (tmp_path / name).touch()
    with caplog.at_level("WARNING"):
        assert Folder(tmp_path).table.equals(whole)
    assert [record.getMessage().removeprefix(f"{tmp_path}: ") for record in caplog.records] == [
        "passing over 3 files that Pillow does not read as images: 2 .heic, 1 .txt (notes.txt, train/cup/a.heic, train/cup/b.HEIC)",
        "passing over 1 folder without images (train/plum)",
    ]


def test_the_users_table_is_no_file_that_is_passed_over(tmp_path, caplog):
    make_folder(tmp_path)
    write_table(tmp_path / "t.csv", path=paths())
    with caplog.at_level("WARNING"):
        Folder(tmp_path, csv="t.csv").table  # noqa: B018
    assert not caplog.records


def test_images_are_upright_and_without_hidden_colours(tmp_path):
    make_folder(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "cup/z.jfif", "JPEG", exif=exif)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "cup/z.gif")
    dataset = Folder(tmp_path)
    images = {path: dataset[i] for i, path in enumerate(dataset.table["path"]) if "/z." in path}
    assert images["cup/z.jfif"].size == (40, 80)
    assert images["cup/z.gif"].getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"file": ["a"]}, "has no column 'path'; the header is 'file'; dataset.columns.path=NAME reads another"),
        ({"path": ["apple/000.jpg", "apple/../apple/000.jpg"]}, r"1 paths are listed twice \(apple/000.jpg\)"),
        ({"path": ["apple/000.jpg", "../other.jpg"]}, r"every path must lie in .* \(../other.jpg\)"),
        ({"path": ["apple/000.jpg", None]}, "path is empty in 1 of 2 rows"),
        ({"label": ["a", "b"]}, "has no column 'path'"),
        ({"path": ["/data/000.jpg"]}, "every path must lie in"),
        ({"path": []}, "t.csv: has a header and no rows"),
        ({"path": ["x/000.jpg", "y/000.jpg"]}, r"none of its 2 images is in .* \(x/000.jpg, y/000.jpg\)"),
        ({"path": ["apple/000.jpg"]}, r"t.csv: has a single class \(apple\)"),
        (
            {"path": paths(), "split": ["train", "tset"] * 15},
            "unknown split 'tset'; did you mean test",
        ),
        ({"path": paths(), "split": ["train", None, "test"] * 10}, "10 images have no split"),
        ({"path": paths(), "split": ["train"] * 30}, "no test images: the column split has only train"),
        ({"path": paths(), "owner": ["ann"] * 30}, "no test images: too few images"),
        ({"path": paths(), "time": ["1.5", "yesterday", "3"] * 10}, "t.csv: time must be numbers .* row 1 has"),
        ({"path": paths(), "time": [1] * 30, "timestamp": [1] * 30}, "two columns for time"),
    ],
)
def test_bad_tables_are_named_with_what_is_wrong(tmp_path, columns, message):
    make_folder(tmp_path)
    table = write_table(tmp_path / "t.csv", **columns)
    with pytest.raises(UserError, match=message) as error:
        Folder(tmp_path, csv=table).table  # noqa: B018
    assert str(table) in str(error.value)
