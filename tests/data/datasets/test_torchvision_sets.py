import gzip
import pickle
import tarfile

import numpy as np
import pytest
from torchvision import datasets

from iciia_exp.data.datasets.torchvision_sets import CIFAR10, CIFAR100, FashionMNIST
from iciia_exp.errors import ConfigError, UserError
from tests.making.torchvision_sets import (
    CIFAR10_NAMES,
    COARSE,
    COARSE_NAMES,
    FINE_NAMES,
    accept,
    make_cifar10,
    make_cifar100,
    make_fashion_mnist,
    md5,
)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    made = make_cifar10(tmp_path)
    accept(monkeypatch, datasets.CIFAR10, tmp_path / "cifar-10-batches-py")
    return made


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    made = make_cifar100(tmp_path)
    accept(monkeypatch, datasets.CIFAR100, tmp_path / "cifar-100-python")
    return made


def assert_images(dataset, data):
    """Pixels are stored colour by colour, row by row."""
    for i in range(len(dataset)):
        image = dataset[i]
        assert (image.mode, image.size) == ("RGB", (32, 32))
        np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1).ravel(), data[i])
    assert_compared(dataset)


def assert_compared(dataset):
    """Images have equal digests where they are equal."""
    pixels = [np.asarray(dataset[i]).tobytes() for i in range(len(dataset))]
    digests = dataset.image_digests().tolist()
    assert len(set(digests)) == len(set(pixels)) == len(set(zip(digests, pixels, strict=True))) > 10


def test_cifar10(tmp_path, cifar10):
    data, labels = cifar10
    dataset = CIFAR10(tmp_path)
    assert dataset.class_names == tuple(CIFAR10_NAMES)
    assert dataset.num_classes == 10
    assert dataset.table["label"].tolist() == labels.tolist()
    assert dataset.table["split"].tolist() == ["train"] * 100 + ["test"] * 20
    assert dataset.table["owner"].isna().all()
    of_class = dataset.table.groupby("label")["parent"].unique()
    assert [CIFAR10_NAMES[label] for label, parent in of_class.items() if parent.tolist() == ["vehicle"]] == [
        "airplane",
        "automobile",
        "ship",
        "truck",
    ]
    assert_images(dataset, data)
    again = pickle.loads(pickle.dumps(dataset))
    assert np.asarray(again[119]).tolist() == np.asarray(dataset[119]).tolist()


def test_cifar100_has_its_superclasses(tmp_path, cifar100):
    data, labels = cifar100
    dataset = CIFAR100(tmp_path)
    assert dataset.class_names == tuple(FINE_NAMES)
    assert dataset.num_classes == 100
    assert dataset.table["label"].tolist() == labels.tolist()
    assert dataset.table["split"].value_counts().to_dict() == {"train": 200, "test": 40}
    assert dataset.table["parent"].tolist() == [COARSE_NAMES[COARSE[label]] for label in labels]
    assert_images(dataset, data)


def test_fashion_mnist(tmp_path):
    images, labels = make_fashion_mnist(tmp_path)
    dataset = FashionMNIST(tmp_path)
    assert dataset.class_names[9] == "Ankle boot"
    assert dataset.table["label"].tolist() == labels.tolist()
    assert dataset.table["split"].tolist() == ["train"] * 60 + ["test"] * 20
    assert dataset.table.groupby("parent")["label"].nunique().to_dict() == {"other": 3, "shoes": 3, "tops": 4}
    for i in range(len(dataset)):
        assert dataset[i].mode == "L"
        np.testing.assert_array_equal(np.asarray(dataset[i]), images[i])
    assert_compared(dataset)


@pytest.mark.parametrize("client_type", [CIFAR10, CIFAR100, FashionMNIST])
def test_number_of_classes_needs_no_files(tmp_path, client_type):
    dataset = client_type(tmp_path)
    assert dataset.num_classes in (10, 100)
    assert dataset.fingerprint() is None
    assert client_type.cosmetic == {"root", "download"}


@pytest.mark.parametrize(
    ("client_type", "file"),
    [
        (CIFAR10, "cifar-10-batches-py/data_batch_1"),
        (CIFAR100, "cifar-100-python/train"),
        (FashionMNIST, "FashionMNIST/raw/train-images-idx3-ubyte"),
    ],
)
def test_missing_files_are_named_with_the_expected_tree(tmp_path, client_type, file):
    with pytest.raises(UserError, match=r"dataset\.download=true") as error:
        client_type(tmp_path).table  # noqa: B018
    assert f"{tmp_path}: {file} is missing" in str(error.value)
    assert f"<root>/{file}" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "key", "problem"),
    [
        ({"root": None}, "root", "give the folder of CIFAR-10"),
        ({"root": None, "download": True}, "root", "give data_dir=FOLDER"),
        ({"root": "nowhere"}, "root", "there is no such folder"),
        ({"root": "file", "download": True}, "root", "is not a folder"),
        ({"root": ".", "download": "yes"}, "download", "true or false"),
    ],
)
def test_bad_arguments_name_their_key(tmp_path, arguments, key, problem):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=problem) as error:
        CIFAR10(**arguments)
    assert error.value.key == key


def test_damaged_files_are_told_from_missing_ones(tmp_path, cifar10):
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"cifar-10-batches-py: a file is damaged .* delete the folder"):
        CIFAR10(tmp_path).table  # noqa: B018


def test_damaged_idx_file(tmp_path):
    make_fashion_mnist(tmp_path)
    path = tmp_path / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="a file is damaged"):
        FashionMNIST(tmp_path).table  # noqa: B018


def test_download_unpacks_an_archive_that_lies_there(tmp_path, cifar100, monkeypatch):
    """Through all of torchvision's own steps but the network."""
    root = tmp_path / "new"
    root.mkdir()
    with tarfile.open(root / "cifar-100-python.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", md5(root / "cifar-100-python.tar.gz"))
    monkeypatch.setattr(datasets.CIFAR100, "url", "file:///nowhere")
    dataset = CIFAR100(root, download=True)
    assert not (root / "cifar-100-python").exists()  # not before it is needed
    assert dataset.table["label"].tolist() == cifar100[1].tolist()
    (root / "cifar-100-python.tar.gz").unlink()
    assert len(CIFAR100(root, download=True)) == 240  # it is there: nothing is downloaded again


def test_download_unpacks_the_archives_of_fashion_mnist(tmp_path, monkeypatch):
    _, labels = make_fashion_mnist(tmp_path)
    resources = []
    for path in sorted((tmp_path / "FashionMNIST" / "raw").iterdir()):
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        resources.append((packed.name, md5(packed)))
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", ["file:///nowhere/"])
    assert FashionMNIST(tmp_path, download=True).table["label"].tolist() == labels.tolist()


def test_without_a_network_the_error_says_what_to_bring_where(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "url", "file:///nowhere/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match="could not be downloaded") as error:
        CIFAR10(tmp_path / "new", download=True).table  # noqa: B018
    assert "file:///nowhere/cifar-10-python.tar.gz" in str(error.value)
    assert str(tmp_path / "new" / "cifar-10-python.tar.gz") in str(error.value)
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", ["file:///nowhere/"])
    with pytest.raises(UserError, match="could not be downloaded") as error:
        FashionMNIST(tmp_path / "new", download=True).table  # noqa: B018
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        assert f"file:///nowhere/{part}-ubyte.gz" in str(error.value)
        assert str(tmp_path / "new" / "FashionMNIST" / "raw" / f"{part}-ubyte.gz") in str(error.value)
