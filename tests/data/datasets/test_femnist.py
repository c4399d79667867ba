import json
import logging
import pickle
import shutil

import numpy as np
import pytest

from iciia_exp.data.datasets import femnist
from iciia_exp.data.datasets.femnist import Femnist
from iciia_exp.data.partitions import Owner
from iciia_exp.errors import ConfigError, UserError
from tests.conftest import SHARED
from tests.making.femnist import draw, make_femnist


@pytest.fixture
def root(tmp_path):
    return make_femnist(tmp_path / "femnist")


def first_file(root, split="train"):
    return sorted((root / "data" / split).glob("*.json"))[0]


def edit(root, change, split="train"):
    """Change the first file's content in place and return its path."""
    path = first_file(root, split)
    content = json.loads(path.read_text())
    change(content, content["user_data"][content["users"][0]])
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("below", ["", "data"])
def test_images_labels_writers_and_splits_are_leaf_s(root, below):
    data = Femnist(root / below)
    table = data.table
    assert table["split"].value_counts().to_dict() == {"train": 72, "test": 8}
    assert table.groupby("owner").size().to_dict() == {f"f000{w}_0{w}": 20 for w in range(4)}
    assert table["parent"].isna().all()
    row = 0
    for split in ("train", "test"):
        for path in sorted((root / "data" / split).glob("*.json")):
            content = json.loads(path.read_text())
            for user in content["users"]:
                for x, y in zip(*content["user_data"][user].values(), strict=True):
                    assert table.loc[row, ["label", "split", "owner"]].tolist() == [y, split, user]
                    assert data[row].shape == (1, 28, 28)
                    assert data[row].dtype == np.float32
                    np.testing.assert_array_equal(data[row].ravel(), np.float32(x))
                    row += 1
    assert row == len(data) == 80


def test_class_names_are_in_leaf_s_order(root):
    names = Femnist(root).class_names
    assert len(names) == 62
    assert (names[0], names[9], names[10], names[35], names[36], names[61]) == ("0", "9", "A", "Z", "a", "z")


def test_an_image_in_two_files_is_seen(root):
    """A file of another preprocessing with another user's name; the check of the data compares the digests."""
    digests = Femnist(root).image_digests()
    assert len(set(digests)) == len(digests) == 80
    path = first_file(root)
    content = json.loads(path.read_text())
    user = content["users"][0]
    renamed = {"users": ["another"], "num_samples": [len(content["user_data"][user]["y"])]}
    renamed["user_data"] = {"another": content["user_data"][user]}
    (path.parent.parent / "test" / "old.json").write_text(json.dumps(renamed))
    data = Femnist(root)
    rows = data.table.index[data.table["owner"] == "another"]
    assert np.isin(data.image_digests()[rows], digests).all()


def test_digits_only(tmp_path):
    data = Femnist(make_femnist(tmp_path, num_classes=10), num_classes=10)
    assert data.num_classes == 10
    assert data.table["label"].max() < 10
    root = make_femnist(tmp_path / "all")
    few = Femnist(root, num_classes=10)
    with pytest.raises(
        UserError, match=r"data: user f000\d_0\d has label \d\d \(\w\), but there are num_classes=10; set"
    ):
        few.table  # noqa: B018


def test_split_by_user(tmp_path):
    writers = np.repeat(np.arange(4), 5)
    root = make_femnist(tmp_path, labels=writers, writers=writers, is_test=writers == 3, data="")
    table = Femnist(root).table
    assert table.groupby("split")["owner"].unique().map(len).to_dict() == {"test": 1, "train": 3}
    clients = Owner().assign(table, 62)
    assert len(clients) == 4


def test_conversion_happens_once_and_moving_changes_nothing(root, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    one = Femnist(root, cache_dir=str(tmp_path / "own"))
    before, images, fingerprint = one.table, np.stack([one[i] for i in range(80)]), one.fingerprint()
    assert caplog.text.count("files converted (") == 4
    assert "4 of 4 files converted (all_data_1_niid_0_keep_0_test_9.json of test)" in caplog.text
    (folder,) = (tmp_path / "own/datasets").glob("femnist-*")
    assert sorted(p.name for p in folder.iterdir()) == [
        "checksums.json",
        "images.npy",
        "manifest.json",
        "table.parquet",
    ]
    monkeypatch.setattr(femnist, "_convert", None)
    shutil.move(root, tmp_path / "moved")
    again = Femnist(tmp_path / "moved", cache_dir=str(tmp_path / "own"))
    assert again.fingerprint() == fingerprint
    assert again.table.equals(before)
    np.testing.assert_array_equal(np.stack([again[i] for i in range(80)]), images)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Without a cache folder given, it is the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


def test_a_stopped_conversion_continues(root, tmp_path, monkeypatch):
    calls = []
    real = femnist.read_users

    def read_users(path, pack):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(path)
        return real(path, pack)

    monkeypatch.setattr(femnist, "read_users", read_users)
    cache = str(tmp_path / "own")
    with pytest.raises(KeyboardInterrupt):
        len(Femnist(root, cache_dir=cache))
    monkeypatch.setattr(femnist, "read_users", lambda path, pack: (calls.append(path), real(path, pack))[1])
    stopped = Femnist(root, cache_dir=cache)
    assert len(stopped) == 80
    assert len(calls) == len(set(calls)) == 4
    whole = Femnist(root, cache_dir=str(tmp_path / "other"))
    assert stopped.table.equals(whole.table)
    np.testing.assert_array_equal(stopped._images, whole._images)
    assert [p.name for p in (tmp_path / "own/datasets").iterdir() if p.is_dir()] == [whole._prepared.name]


def test_other_files_are_another_dataset(root):
    before = Femnist(root).fingerprint()
    path = first_file(root)
    path.rename(path.with_name("other.json"))
    assert Femnist(root).fingerprint() != before
    edit(root, lambda content, own: own["y"].__setitem__(0, 100 + own["y"][0]))
    assert Femnist(root).fingerprint() != before


def test_pickled_without_the_pixels(tmp_path):
    labels = np.arange(300) % 62
    data = Femnist(make_femnist(tmp_path, np.zeros((300, 28, 28), dtype=np.uint8), labels, labels % 3))
    image = data[5]
    text = pickle.dumps(data)
    assert len(text) < 300 * 28 * 28 / 4
    np.testing.assert_array_equal(pickle.loads(text)[5], image)


def test_mnist_by_writer(tmp_path):
    file = SHARED / "data" / "mnist_writers.npz"
    if not file.is_file():
        pytest.skip("MNIST by writer is not on this machine")
    with np.load(file) as arrays:
        images, labels, writers, is_test = (arrays[k] for k in ("images", "labels", "writers", "is_test"))
    chosen = np.isin(writers, [*np.unique(writers[~is_test])[:3], *np.unique(writers[is_test])[:2]])
    root = make_femnist(tmp_path, images[chosen], labels[chosen], writers[chosen], is_test[chosen])
    data = Femnist(root, num_classes=10)
    assert len(data) == chosen.sum()
    assert data.table.groupby("split")["owner"].nunique().to_dict() == {"test": 2, "train": 3}
    ours = np.sort([round(float(data[i].sum()) * 255) for i in range(len(data))])
    np.testing.assert_array_equal(ours, np.sort(images[chosen].sum((1, 2), dtype=np.int64)))


def test_the_made_pictures_can_be_learned():
    labels = np.arange(620) % 62
    writers = np.arange(620) // 62
    pictures = draw(labels, writers).reshape(620, -1) / 255.0
    nearest = ((pictures[62:, None] - pictures[None, :62]) ** 2).sum(-1).argmin(1)
    assert 0.3 < (nearest == labels[62:]).mean() < 1.0  # other writers' pictures are moved


@pytest.mark.parametrize(
    ("arguments", "key", "message"),
    [
        (
            {"root": None},
            "root",
            r"(?s)null: give the folder of FEMNIST.*github.com/TalwalkarLab/leaf.*data/train/<name>.json",
        ),
        ({"root": "nowhere"}, "root", "there is no such folder"),
        ({"num_classes": 63}, "num_classes", "2 to 62"),
    ],
)
def test_bad_arguments_name_their_key(root, arguments, key, message):
    with pytest.raises(ConfigError, match=message) as error:
        Femnist(**{"root": root} | arguments)
    assert error.value.key == key


def test_a_wrong_folder_shows_the_tree(root, tmp_path):
    with pytest.raises(UserError, match="(?s)has no folder train, nor has its folder data;.*preprocess.sh"):
        Femnist(tmp_path)
    shutil.rmtree(root / "data/test")
    (root / "data/test").mkdir()
    with pytest.raises(UserError, match="(?s)test: has no .json file;.*preprocess.sh"):
        Femnist(root).table  # noqa: B018


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, own: own["y"].__setitem__(1, 62), r"user f0000_00: y has the label 62, must be 0 to 61"),
        (lambda c, own: own["y"].__setitem__(1, -1), r"user f0000_00: y has the label -1"),
        (lambda c, own: own["y"].__setitem__(1, 1.5), r"user f0000_00: y must be whole numbers"),
        (lambda c, own: own["y"].pop(), r"user f0000_00: x has 18 entries, y has 17"),
        (lambda c, own: own["x"][3].pop(), r"user f0000_00: x\[3\] has 783 numbers, must have 784 \(28x28 pixels\)"),
        (lambda c, own: own["x"].__setitem__(0, 1.0), r"user f0000_00: x\[0\] has 0 numbers"),
        (lambda c, own: own["x"][3].__setitem__(0, "a"), r"user f0000_00: x has pixels that are not numbers"),
        (lambda c, own: own["x"][3].__setitem__(0, 254), r"user f0000_00: x has a pixel 254, must be 0 to 1"),
        (lambda c, own: own["x"][3].__setitem__(0, float("nan")), r"user f0000_00: x has a pixel nan"),
        (lambda c, own: own["x"][3].__setitem__(0, 0.5), r"user f0000_00: x has a pixel 0.5, .* in steps of 1/255"),
        (lambda c, own: own.pop("y"), r"user f0000_00: has no x and y"),
        (lambda c, own: own.update(y=3), r"user f0000_00: x and y must be lists"),
        (lambda c, own: c["user_data"].pop("f0001_01"), r"user f0001_01 is in users, but not in user_data"),
        (lambda c, own: c["users"].append("f0000_00"), r"user f0000_00 is twice in users"),
        (lambda c, own: c["num_samples"].__setitem__(1, 7), r"user f0001_01: num_samples says 7, x and y have 18"),
        (lambda c, own: c.pop("users"), "has no users and user_data, so it is not one of LEAF's files"),
    ],
)
def test_wrong_content_names_file_and_user(root, change, message):
    path = edit(root, change)
    with pytest.raises(UserError, match=message) as error:
        Femnist(root).table  # noqa: B018
    assert str(error.value).startswith(f"{path}: ")


def test_a_truncated_file_is_named_and_can_be_repaired(root):
    path = first_file(root, "test")
    text = path.read_text()
    path.write_text(text[:-1000])
    with pytest.raises(UserError, match=r"test_9.json: not valid JSON, or cut off \(.*\); make or copy it again"):
        Femnist(root).table  # noqa: B018
    path.write_text(text)
    assert len(Femnist(root)) == 80


def test_users_that_leaf_left_out_are_left_out(root):
    """LEAF's split within clients keeps entries of users that are not in its list."""
    edit(root, lambda c, own: (c["users"].pop(0), c["num_samples"].pop(0)))
    assert len(Femnist(root)) == 80 - 18


def test_no_images_at_all(root):
    for path in root.glob("data/*/*.json"):
        path.write_text('{"users": [], "num_samples": [], "user_data": {}}')
    with pytest.raises(UserError, match="LEAF's 4 files hold no images"):
        Femnist(root).table  # noqa: B018


def test_files_of_two_samplings_are_refused(tmp_path):
    """Left-over files of another preprocessing: every image would be there twice, or test images in train."""
    root = make_femnist(tmp_path)
    first = sorted((root / "data/train").glob("*.json"))[0]
    shutil.copy(first, other := first.with_name("all_data_0_niid_05_keep_64_train_8.json"))
    shutil.copy(first, first.with_name("all_data_7_niid_0_keep_0_train_9.json"))
    with pytest.raises(
        UserError, match=r"has files of 2 samplings \(train/all_data_0.*json and train/all_data_0_.*\); delete"
    ):
        Femnist(root, cache_dir=tmp_path / "cache").table  # noqa: B018
    other.unlink()
    with pytest.raises(UserError, match=r"data/train: user .* is in two files; delete the files of another sampling"):
        Femnist(root, cache_dir=tmp_path / "cache").table  # noqa: B018
