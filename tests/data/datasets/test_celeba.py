import json
import pickle
import shutil

import numpy as np
import pytest

from iciia_exp.data.dataset import dense_labels
from iciia_exp.data.datasets.celeba import CelebA
from iciia_exp.data.partitions import Owner
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.tasks import MULTI_LABEL
from tests.making.celeba import ATTRIBUTES, make_celeba

USED = [i for i, name in enumerate(ATTRIBUTES) if name not in ("Male", "Young")]


@pytest.fixture
def root(tmp_path):
    make_celeba(tmp_path / "celeba")
    return tmp_path / "celeba"


@pytest.mark.parametrize("below", ["", "data"])
@pytest.mark.parametrize("files", [1, 2])
def test_attributes_people_and_splits(tmp_path, below, files):
    attributes = make_celeba(tmp_path, files_per_split=files)
    data = CelebA(tmp_path / below)
    assert data.task == MULTI_LABEL
    assert data.num_classes == 38
    assert data.class_names == [ATTRIBUTES[i] for i in USED]
    table = data.table
    people = {"2880": 8, "2881": 6, "2882": 5, "2883": 7, "2885": 6}  # 2884 has 3 images
    assert table["owner"].value_counts().to_dict() == people
    assert table.groupby("split")["owner"].unique().map(sorted).to_dict() == {
        "test": ["2883"],
        "train": ["2880", "2881", "2882", "2885"],
    }
    assert table["parent"].isna().all()
    numbers = table["path"].str[-10:-4].astype(int) - 1
    np.testing.assert_array_equal(dense_labels(table["label"], data.task, 38), attributes[numbers][:, USED])
    assert all(isinstance(row, list) for row in table["label"])


def test_images_are_the_files_in_their_own_size(root):
    data = CelebA(root)
    assert (data[0].mode, data[0].size) == ("RGB", (178, 218))
    assert data.describe(0) == data.table["path"][0] == "raw/img_align_celeba/" + data.table["path"][0][-10:]
    # a field of the picture tells the attribute: the pictures can be learned
    pixels = np.stack([np.asarray(data[i]).mean(-1) for i in range(len(data))])
    field = pixels[:, 7 * 218 // 8 + 8 : -8, 4:30].mean((1, 2))  # row 7, column 0: Wearing_Hat
    has = np.array([data.class_names.index("Wearing_Hat") in row for row in data.table["label"]])
    assert 0 < has.sum() < len(has)
    assert field[has].min() > field[~has].max()
    (root / "data" / data.table["path"][0]).unlink()
    with pytest.raises(FileNotFoundError):
        data[0]


def test_people_with_few_images(root):
    assert CelebA(root, min_images=1).table["owner"].nunique() == 6
    assert CelebA(root, min_images=7).table["owner"].nunique() == 2
    with pytest.raises(ConfigError, match="none of the 6 people has that many images") as error:
        CelebA(root, min_images=9).table  # noqa: B018
    assert error.value.key == "min_images"


def test_people_of_both_splits_count_once(root):
    """LEAF can split within people, too: then a person's images of both splits count together."""
    train, test = ((root / "data" / split / f"all_data_niid_1_keep_5_{split}_9.json") for split in ("train", "test"))
    content = json.loads(train.read_text())
    moved = {"users": ["2882"], "num_samples": [2], "user_data": {"2882": {"x": [], "y": []}}}
    for key in ("x", "y"):
        own = content["user_data"]["2882"]
        moved["user_data"]["2882"][key], own[key] = own[key][:2], own[key][2:]
    content["num_samples"][content["users"].index("2882")] = 3
    train.write_text(json.dumps(content))
    test.write_text(json.dumps(moved))
    assert CelebA(root).table.query("owner == '2882'")["split"].tolist() == ["train"] * 3 + ["test"] * 2


def test_all_attributes_or_others(root):
    assert CelebA(root, dropped=[]).class_names == ATTRIBUTES
    assert CelebA(root, dropped=["Smiling"]).num_classes == 39
    for dropped, message in (
        (["Mail"], "dropped=Mail: must be one of .*; did you mean Male?"),
        (["?"], "must be one of 5_o_Clock"),
    ):
        with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as error:
            CelebA(root, dropped=dropped).class_names  # noqa: B018
        assert error.value.key == "dropped"
    with pytest.raises(ConfigError, match="must leave at least 2"):
        CelebA(root, dropped=ATTRIBUTES[1:]).class_names  # noqa: B018
    with pytest.raises(ConfigError, match="must be a list"):
        CelebA(root, dropped="Male")


def test_natural_clients(root):
    clients = Owner(val_share=0.3).assign(CelebA(root).table, 38)
    assert len(clients) == 5


def test_fingerprint_follows_the_files_and_not_their_place(root, tmp_path):
    data = CelebA(root)
    before = data.fingerprint()
    assert pickle.loads(pickle.dumps(data)).fingerprint() == before
    shutil.move(root, tmp_path / "moved")
    root = tmp_path / "moved"
    assert CelebA(root).fingerprint() == before
    assert CelebA(root, min_images=6).fingerprint() != before
    path = root / "data/raw/list_attr_celeba.txt"
    text = path.read_text()
    path.write_text(
        text.replace("000001.jpg  1", "000001.jpg -1")
        if "000001.jpg  1" in text
        else text.replace("000001.jpg -1", "000001.jpg  1")
    )
    assert CelebA(root).fingerprint() != before


def test_a_wrong_folder_shows_the_tree_and_the_source(root, tmp_path):
    page = "mmlab.ie.cuhk.edu.hk"
    for given in (None, "nowhere"):
        with pytest.raises(ConfigError, match=f"(?s)only, whose terms forbid.*list_attr_celeba.txt.*{page}") as error:
            CelebA(given)
        assert error.value.key == "root"
    with pytest.raises(UserError, match=f"(?s)has no folder train.*{page}"):
        CelebA(tmp_path)
    raw = root / "data/raw"
    (raw / "img_align_celeba").rename(raw / "images")
    with pytest.raises(UserError, match=f"(?s)has no folder raw/img_align_celeba;.*{page}"):
        CelebA(root)
    (raw / "list_attr_celeba.txt").unlink()
    with pytest.raises(UserError, match=f"(?s)has no file raw/list_attr_celeba.txt;.*{page}"):
        CelebA(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.pop(), "says 35 images and has 34; it is cut off"),
        (lambda lines: lines.pop(0), "cannot be read"),
        (
            lambda lines: lines.__setitem__(1, lines[1].replace("Bald ", "")),
            "has 39 names of attributes, but 40 columns",
        ),
        (lambda lines: lines.__setitem__(2, lines[2].replace("-1", " 0")), r"other than 1 and -1 \(image 000001.jpg\)"),
        (lambda lines: lines.__setitem__(-1, lines[-1][:40]), r"other than 1 and -1 \(image 000035.jpg\)"),
        (
            lambda lines: lines.__setitem__(2, lines[2].replace("000001", "900001")),
            r"no attributes for 1 images .*\(000001.jpg\)",
        ),
    ],
)
def test_a_wrong_attribute_file_is_named(root, change, message):
    path = root / "data/raw/list_attr_celeba.txt"
    lines = path.read_text().splitlines()
    change(lines)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=message) as error:
        CelebA(root, min_images=1).table  # noqa: B018
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["user_data"]["2880"]["x"].__setitem__(0, [0.5]),
            r"9.json: user 2880: x must be names of image files, not \[0.5\]",
        ),
        (lambda c: c["user_data"].pop("2880"), "9.json: user 2880 is in users, but not in user_data"),
        (
            lambda c: c["user_data"]["2880"]["x"].__setitem__(0, c["user_data"]["2880"]["x"][1]),
            "1 images are listed twice",
        ),
    ],
)
def test_wrong_json_is_named(root, change, message):
    path = root / "data/train/all_data_niid_1_keep_5_train_9.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        CelebA(root).table  # noqa: B018
