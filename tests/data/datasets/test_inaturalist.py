import pickle
import shutil

import numpy as np
import pandas as pd
import pytest

from iciia_exp.data.datasets.inaturalist import INaturalist
from iciia_exp.data.partitions import Owner
from iciia_exp.errors import ConfigError, UserError
from tests.making.images import make_image
from tests.making.inaturalist import FORMS, make_inaturalist


@pytest.fixture
def root(tmp_path):
    return make_inaturalist(tmp_path / "inat")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_mapping_gives_the_same_images(tmp_path, form):
    data = INaturalist(make_inaturalist(tmp_path, form=form))
    names = ["Birds/0", "Plants/1", "Amphibians/2", "Birds/3", "Amphibians/10", "Plants/11"]
    assert data.class_names == names
    table = data.table
    assert table.groupby("split")["owner"].nunique().to_dict() == {"test": 3, "train": 6}
    assert table.groupby("owner").size().unique().tolist() == [8]
    for file, split in (("train.csv", "train"), ("test.csv", "test")):
        given = pd.read_csv(tmp_path / "client_data_mapping" / file)
        own = table[table["split"] == split]
        assert own["owner"].tolist() == [f"{split}-{c}" for c in given["client_id"]]
        assert [names[i].split("/")[1] for i in own["label"]] == given["label_id"].astype(str).tolist()
        assert own["parent"].tolist() == given["label_name"].tolist()
        assert own["path"].map(lambda p: (tmp_path / p).is_file()).all()
    for i in (0, 40, 71):
        assert data[i].mode == "RGB"
        expected = np.asarray(make_image(int(table["label"][i]), 0)).mean((0, 1))
        np.testing.assert_allclose(np.asarray(data[i]).mean((0, 1)), expected, atol=25)


def test_clients_of_two_files_are_never_one(root):
    """FedScale's numbers may start anew in each file."""
    clients = Owner().assign(INaturalist(root).table, 6)
    assert len(clients) == 9
    assert set(clients.types) <= {"Amphibians", "Birds", "Plants"}


def test_validation_clients_are_for_val(tmp_path):
    clients = (("train.csv", 3), ("val.csv", 2), ("test.csv", 2))
    table = INaturalist(make_inaturalist(tmp_path, clients)).table
    assert table["split"].unique().tolist() == ["train", "val", "test"]
    assert table.groupby("split")["owner"].nunique().to_dict() == {"val": 2, "test": 2, "train": 3}
    assert table["owner"][24] == "val-0"


def test_the_mapping_in_the_folder_of_its_archive_and_other_columns(root):
    before = INaturalist(root).fingerprint()
    (root / "inaturalist").mkdir()
    shutil.move(root / "client_data_mapping", root / "inaturalist/client_data_mapping")
    for path in (root / "inaturalist/client_data_mapping").glob("*.csv"):
        pd.read_csv(path).drop(columns=["label_name", "label_id"]).assign(more=1).to_csv(path, index=False)
    assert INaturalist(root).fingerprint() == before


def test_a_missing_image_is_left_to_extraction(root):
    data = INaturalist(root)
    (root / data.table["path"][3]).unlink()
    again = INaturalist(root)
    assert len(again) == 72
    with pytest.raises(FileNotFoundError):
        again[3]


def test_fingerprint_follows_the_files_and_not_their_place(root, tmp_path):
    before = INaturalist(root).fingerprint()
    shutil.move(root, tmp_path / "moved")
    data = INaturalist(tmp_path / "moved")
    assert data.fingerprint() == before
    assert pickle.loads(pickle.dumps(data)).fingerprint() == before
    path = tmp_path / "moved/client_data_mapping/train.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    assert INaturalist(tmp_path / "moved").fingerprint() != before


def test_a_wrong_folder_shows_the_tree_and_the_sources(root, tmp_path):
    for given in (None, "nowhere"):
        with pytest.raises(
            ConfigError, match="(?s)visipedia/inat_comp.*SymbioticLab/FedScale.*train_val2019/<super"
        ) as error:
            INaturalist(given)
        assert error.value.key == "root"
    with pytest.raises(UserError, match="(?s)has no folder train_val2019;.*client_data_mapping/train.csv"):
        INaturalist(tmp_path)
    (root / "client_data_mapping/test.csv").unlink()
    with pytest.raises(UserError, match="client_data_mapping: has no file test.csv"):
        INaturalist(root)
    shutil.rmtree(root / "client_data_mapping")
    with pytest.raises(UserError, match="has no folder client_data_mapping"):
        INaturalist(root)


def _mapping(change):
    def apply(root):
        path = root / "client_data_mapping/train.csv"
        change(pd.read_csv(path, dtype=str)).to_csv(path, index=False)

    return apply


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        (
            "path",
            lambda r: shutil.rmtree(r / "train_val2019/Plants"),
            r"train.csv: names \d+ of 48 images that are in no folder of .*unpack",
        ),
        (
            "name",
            lambda r: shutil.rmtree(r / "train_val2019/Plants"),
            r"train.csv: names \d+ of 48 images that are in no folder",
        ),
        (
            "path",
            lambda r: (r / "train_val2019/Plants/ferns").mkdir(),
            r"train_val2019: has categories that are not numbers \(Plants/ferns\)",
        ),
        (
            "path",
            lambda r: (r / "train_val2019/Plants/3").mkdir(),
            r"has categories in two supercategories \(Birds/3\)",
        ),
        (
            "path",
            lambda r: (shutil.rmtree(r / "train_val2019"), (r / "train_val2019").mkdir()),
            "has no category folders",
        ),
        (
            "path",
            _mapping(lambda t: t.rename(columns={"client_id": "user"})),
            "train.csv: has no column client_id, only user",
        ),
        (
            "path",
            _mapping(lambda t: t.assign(client_id=t["client_id"].mask(t.index == 4))),
            "is empty in 1 rows, first in 6",
        ),
        (
            "path",
            _mapping(lambda t: t.assign(sample_path=t["sample_path"].where(t.index != 4, t["sample_path"][5]))),
            "1 images are listed twice",
        ),
    ],
)
def test_wrong_files_are_named(tmp_path, form, change, message):
    change(make_inaturalist(tmp_path, form=form))
    with pytest.raises(UserError, match=message):
        INaturalist(tmp_path).table  # noqa: B018
