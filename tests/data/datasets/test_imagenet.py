import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo

from iciia_exp.data.datasets.imagenet import ImageNet
from iciia_exp.data.partitions import ParentCategory
from iciia_exp.errors import ConfigError, UserError
from tests.making.imagenet import WNIDS, make_imagenet
from tests.making.images import make_image, write_image

LAYOUTS = ("folders", "solution", "devkit", "kaggle", "tiny")


@pytest.fixture
def root(tmp_path):
    return make_imagenet(tmp_path / "imagenet", train=2, val=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images(tmp_path, layout):
    data = ImageNet(make_imagenet(tmp_path, layout=layout))
    assert data.class_names == WNIDS
    assert data.shown_names()[0] == ImageNetInfo("imagenet-1k").label_name_to_description(WNIDS[0])
    table = data.table
    assert table["split"].value_counts().to_dict() == {"train": 72, "test": 36}
    assert table.groupby(["split", "label"]).size().unique().tolist() == [3, 6]
    assert table["label"].tolist() == [*np.repeat(range(12), 6), *np.repeat(range(12), 3)]
    assert table["owner"].isna().all()
    assert table["parent"].unique().tolist() == ["colubrid snake", "terrier", "wind instrument"]
    for i in (0, 71, 72, 107):
        assert (data.root / table["path"][i]).is_file()
    # the pictures tell their class: its colour is close to what the class's pictures have
    for i in (72, 80, 107):
        expected = np.asarray(make_image(int(table["label"][i]), 0)).mean((0, 1))
        np.testing.assert_allclose(np.asarray(data[i]).mean((0, 1)), expected, atol=25)


def test_validation_images_have_one_order_in_every_layout(tmp_path):
    tables = [ImageNet(make_imagenet(tmp_path / layout, layout=layout)).table for layout in LAYOUTS[:4]]
    names = [table["path"].str.rsplit("/", n=1).str[-1].tolist() for table in tables]
    assert names[0] == names[1] == names[2] == names[3]


def test_images_are_rgb_with_exact_pixels(root):
    data = ImageNet(root)
    path = root / data.table["path"][0]
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")  # some of ImageNet's files are not what they are called
    assert data[0].mode == "RGB"
    np.testing.assert_array_equal(np.asarray(data[0]), np.repeat(pixels[..., None], 3, axis=2))
    assert data.describe(0) == "train/n01728572/n01728572_0.JPEG"
    path.write_bytes(b"cut off")
    with pytest.raises(OSError, match="cannot identify"):
        data[0]


def test_extensions_hidden_files_and_deeper_folders(root):
    folder = root / "train" / WNIDS[0]
    for name in ("A.jpg", "b.Jpeg", "c.PNG"):
        write_image(folder / name, 0)
    for name in (".hidden.JPEG", "notes.txt"):
        (folder / name).write_text("")
    (root / "train" / ".cache").mkdir()
    table = ImageNet(root).table
    own = table[(table["label"] == 0) & (table["split"] == "train")]
    assert own["path"].str.rsplit("/").str[-1].tolist() == [
        "A.jpg",
        "b.Jpeg",
        "c.PNG",
        f"{WNIDS[0]}_0.JPEG",
        f"{WNIDS[0]}_1.JPEG",
    ]


def test_parents_from_a_table_by_path(root, tmp_path):
    path = tmp_path / "parents.csv"
    path.write_text(
        "wnid,group_name\n" + "".join(f"{w},{'even' if i % 2 == 0 else 'odd'}\n" for i, w in enumerate(WNIDS))
    )
    assert ImageNet(root, parents=path).table["parent"][:4].tolist() == ["even", "even", "odd", "odd"]
    path.write_text("wnid,group_name\n" + f"{WNIDS[0]},x\n")
    with pytest.raises(UserError, match=r"parents.csv: lacks 11 of the 12 classes \(n01728920"):
        ImageNet(root, parents=path).table  # noqa: B018


def test_the_published_table_can_be_used(root, reference):
    table = ImageNet(root, parents=reference / "imagenet_class_groups.csv").table
    assert table["parent"].unique().tolist() == ["snake", "terrier", "wind instrument, whistle"]


def test_classes_of_a_larger_imagenet_have_no_parent(tmp_path, caplog):
    data = ImageNet(make_imagenet(tmp_path, wnids=("n00004475", *WNIDS[:1]), train=1, val=1))
    assert data.table["parent"].isna().tolist() == [True, False, True, False]
    assert "1 classes are not of ImageNet-1K and have no parent (n00004475)" in caplog.text


def test_parent_clients(tmp_path):
    data = ImageNet(make_imagenet(tmp_path, train=10, val=4))
    clients = ParentCategory(train_chunk=20, test_chunk=8).assign(data.table, data.num_classes)
    assert sorted(set(clients.types)) == ["colubrid snake", "terrier", "wind instrument"]
    assert len(clients.types) == 6


def test_fingerprint_follows_the_files_and_not_their_place(root, tmp_path):
    before = ImageNet(root).fingerprint()
    assert ImageNet(root).fingerprint() == before
    moved = tmp_path / "elsewhere"
    shutil.move(root, moved)
    assert ImageNet(moved).fingerprint() == before
    assert pickle.loads(pickle.dumps(ImageNet(moved))).fingerprint() == before
    write_image(moved / "train" / WNIDS[0] / "new.JPEG", 0)
    assert ImageNet(moved).fingerprint() != before


def test_a_missing_root_shows_the_tree(tmp_path):
    for root in (None, tmp_path / "none"):
        with pytest.raises(ConfigError, match="train/<wnid>") as error:
            ImageNet(root)
        assert error.value.key == "root"
    for missing in ("train", "val"):
        shutil.rmtree(tmp_path, ignore_errors=True)
        make_imagenet(tmp_path, WNIDS[:2], 1, 1)
        shutil.rmtree(tmp_path / missing)
        with pytest.raises(UserError, match=f"(?s)has no folder {missing};.*train/<wnid>"):
            ImageNet(tmp_path)


def test_a_missing_parents_file_is_found_at_once(root):
    with pytest.raises(ConfigError, match="there is no such file; give a CSV table") as error:
        ImageNet(root, parents="nowhere.csv")
    assert error.value.key == "parents"


def _empty(folder):
    for path in folder.iterdir():
        shutil.rmtree(path)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("folders", lambda r: _empty(r / "train"), "train: has no class folders;"),
        ("folders", lambda r: (_empty(r / "train"), (r / "train/n01728572.tar").touch()), "unpack the .tar"),
        ("folders", lambda r: (r / "train/cats").mkdir(), r"not wnids \(cats\); for classes of other names use"),
        (
            "folders",
            lambda r: (r / "train/n00000001").mkdir(),
            r"train: has class folders without images \(n00000001\)",
        ),
        ("folders", lambda r: (r / "val/n00000001").mkdir(), r"val: has class folders without images \(n00000001\)"),
        ("folders", lambda r: _empty(r / "val"), "val: has no images"),
        ("folders", lambda r: write_image(r / "val/loose.JPEG", 0), r"outside its class folders \(loose.JPEG\)"),
        ("folders", lambda r: shutil.rmtree(r / "train" / WNIDS[0]), r"1 classes that train lacks \(n01728572\)"),
        (
            "solution",
            lambda r: (r / "LOC_val_solution.csv").unlink(),
            "val: has neither class folders nor an annotation",
        ),
        (
            "solution",
            lambda r: (r / "LOC_val_solution.csv").write_text("a,b\n"),
            "has no column ImageId, only a, b; expected ImageId,PredictionString",
        ),
        (
            "solution",
            lambda r: write_image(r / "val/ILSVRC2012_val_00050000.JPEG", 0),
            r"LOC_val_solution.csv: has no class for 1 images of .*val \(ILSVRC2012_val_00050000\)",
        ),
        ("solution", lambda r: shutil.rmtree(r / "train" / WNIDS[0]), "1 classes that train lacks"),
        (
            "devkit",
            lambda r: (r / "ILSVRC2012_devkit_t12/data/meta.mat").unlink(),
            "meta.mat: there is no such file; copy",
        ),
        ("devkit", lambda r: (r / "ILSVRC2012_devkit_t12/data/meta.mat").write_bytes(b"x" * 200), "does not fit"),
        (
            "devkit",
            lambda r: (r / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt").write_text("99\n"),
            "does not fit",
        ),
        (
            "tiny",
            lambda r: (r / "val/val_annotations.txt").write_text("a b\n"),
            "expected lines of file name, tab, wnid",
        ),
    ],
)
def test_wrong_files_are_named_before_any_work(tmp_path, layout, change, message):
    change(make_imagenet(tmp_path, WNIDS[:3], 1, 1, layout))
    with pytest.raises(UserError, match=message):
        ImageNet(tmp_path).table  # noqa: B018
