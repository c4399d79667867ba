"""CIFAR-10, CIFAR-100 and Fashion-MNIST, read and downloaded by torchvision.

Sources: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; H. Xiao et al., "Fashion-MNIST:
a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017.
"""

import pickle
import textwrap
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from filelock import FileLock
from PIL.Image import Image

from iciia_exp.data.content import Content, row_digests
from iciia_exp.data.dataset import ImageDataset, existing_root, wrong_folder
from iciia_exp.errors import ConfigError, UserError, check_bool, first_line

__all__ = ["CIFAR10", "CIFAR100", "FashionMNIST", "TorchvisionSet", "download_root", "downloading"]

# Torchvision's own splits by the value of its argument `train`.
_TRAIN = {"train": True, "test": False}

# Torchvision's errors for a wrong checksum or, in files that it does not check, a wrong size.
_DAMAGED = (OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, AssertionError, pickle.UnpicklingError)


def download_root(root: str | Path | None, download: bool, what: str, tree: str) -> Path:
    """Return the folder of a dataset; with ``download``, it need not exist."""
    if not check_bool("download", download):
        return existing_root(root, what, tree)
    if root is None:
        raise ConfigError("root", "null", "give data_dir=FOLDER for the download; it is created if needed")
    path = Path(root).expanduser()
    if path.exists() and not path.is_dir():
        raise ConfigError("root", path, "is not a folder; the download needs a folder, existing or new")
    return path


@contextmanager
def downloading(what: str, root: Path, bring: Mapping[str, Path]) -> Iterator[None]:
    """Download in one process at a time into ``root``; an error names the files to copy without a network.

    ``bring`` has the place of every file by its URL; ``what`` is the dataset in words.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".download.lock"):
            yield
    except (OSError, RuntimeError, HTTPException) as error:  # a URLError is an OSError
        files = "\n".join(f"{url}\n  as {path}" for url, path in bring.items())
        problem = " ".join(str(error).split())  # torchvision's errors have several lines
        hint = f"without a network, copy\n{textwrap.indent(files, '  ')}\nand repeat the command"
        raise UserError(f"{root}: {what} could not be downloaded ({problem}); {hint}") from error


class TorchvisionSet(ImageDataset):
    """A dataset of torchvision with a training and a test part.

    Args:
        root: folder with torchvision's folder of the dataset.
        download: let torchvision download missing files into ``root`` when the dataset is first read, and unpack
            archives in ``root``.
    """

    cosmetic = frozenset({"root", "download"})  # the content is always the same
    has_backbone_images = False

    #: Name of torchvision's class.
    source: ClassVar[str]
    #: The dataset in words, with its URL.
    what: ClassVar[str]
    #: Its files below ``root``.
    files: ClassVar[tuple[str, ...]]

    def __init__(self, root: str | Path | None, download: bool = False) -> None:
        self.download = download
        self.root = download_root(root, download, self.what, self._tree)

    @property
    def _source(self) -> Any:
        from torchvision import datasets  # late: the import is slow

        return getattr(datasets, self.source)

    @abstractmethod
    def _bring(self) -> dict[str, Path]:
        """Return the place of every file of the download by its URL."""

    @abstractmethod
    def _parents(self) -> Sequence[str]:
        """Return the parent category of every class."""

    @property
    def _tree(self) -> str:
        hint = "or set dataset.download=true, which also unpacks an archive in that folder"
        return "\n".join([*(f"<root>/{file}" for file in self.files), hint])

    def _complete(self) -> None:
        """Download files that are missing, or raise an error that names one."""
        missing = [file for file in self.files if not (self.root / file).is_file()]
        if missing and self.download:
            with downloading(self.what, self.root, self._bring()), _old_pickles():
                self._source(str(self.root), download=True)
        elif missing:
            raise wrong_folder(self.root, f"{missing[0]} is missing", self._tree)

    def content(self, kept: Content) -> str:
        """Return a digest of the files, which torchvision does not check in every dataset."""
        self._complete()
        return kept.of(self.root, self.files)

    @cached_property
    def _parts(self) -> dict[str, Any]:
        """Torchvision's datasets by split, in memory."""
        source = self._source
        self._complete()
        try:
            with _old_pickles():
                return {split: source(str(self.root), train=train) for split, train in _TRAIN.items()}
        except _DAMAGED as error:
            folder = self.root / self.files[0].split("/")[0]
            problem = f"a file is damaged or not the original ({first_line(error)})"
            raise UserError(f"{folder}: {problem}; delete the folder and set dataset.download=true") from error

    def image_digests(self) -> np.ndarray:
        """Return a digest of every image's pixels."""
        return np.concatenate([row_digests(np.asarray(part.data)) for part in self._parts.values()])

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, as torchvision has them."""
        return tuple(self._parts["train"].classes)

    def load_table(self) -> pd.DataFrame:
        """Return labels, torchvision's splits and parent categories; the images have no owners."""
        parts = {split: pd.DataFrame({"label": part.targets}) for split, part in self._parts.items()}
        table = pd.concat(parts, names=["split"]).reset_index("split").astype({"label": np.int64, "split": object})
        return table.assign(owner=None, parent=np.array(self._parents(), dtype=object)[table["label"]])

    def __getitem__(self, index: int) -> Image:
        """Return one image: RGB of 32x32 pixels, or grey (L) of 28x28 with the object bright on black."""
        train, test = self._parts["train"], self._parts["test"]
        return train[index][0] if index < len(train) else test[index - len(train)][0]


@contextmanager
def _old_pickles() -> Iterator[None]:
    """Silence a warning of NumPy 2.4.0 to 2.4.4 for arrays pickled by Python 2."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
        yield


class CIFAR10(TorchvisionSet):
    """60,000 photographs of 32x32 pixels in 10 classes: 50,000 to train, 10,000 to test. Parents: animal, vehicle."""

    name, source = "cifar10", "CIFAR10"
    num_classes = 10
    what = "CIFAR-10 (python version, https://www.cs.toronto.edu/~kriz/cifar.html)"
    files = tuple(
        f"cifar-10-batches-py/{file}"
        for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
    )

    _VEHICLES = frozenset({"airplane", "automobile", "ship", "truck"})

    def _bring(self) -> dict[str, Path]:
        return {self._source.url: self.root / self._source.filename}

    def _parents(self) -> Sequence[str]:
        return ["vehicle" if name in self._VEHICLES else "animal" for name in self.class_names]


class CIFAR100(CIFAR10):
    """60,000 photographs of 32x32 pixels in 100 classes: 50,000 to train, 10,000 to test. Parents: its superclasses."""

    name, source = "cifar100", "CIFAR100"
    num_classes = 100
    what = "CIFAR-100 (python version, https://www.cs.toronto.edu/~kriz/cifar.html)"
    files = tuple(f"cifar-100-python/{file}" for file in ("train", "test", "meta"))

    def _read(self, file: str) -> dict[str, Any]:
        # unpickling can run code: torchvision has compared the checksums before
        with open(self.root / "cifar-100-python" / file, "rb") as stream, _old_pickles():
            return pickle.load(stream, encoding="latin1")

    def _parents(self) -> Sequence[str]:
        """Return the superclass of every class; torchvision does not read the coarse labels."""
        names, train = self._read("meta")["coarse_label_names"], self._read("train")
        coarse = dict(zip(train["fine_labels"], train["coarse_labels"], strict=True))
        return [names[coarse[fine]] for fine in range(self.num_classes)]


class FashionMNIST(TorchvisionSet):
    """70,000 grey pictures of 28x28 pixels of 10 kinds of clothing: 60,000 to train, 10,000 to test.

    Parents: tops, shoes and other, each of at least three kinds.
    """

    name, source = "fashion_mnist", "FashionMNIST"
    num_classes = 10
    what = "Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist)"
    files = tuple(
        f"FashionMNIST/raw/{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    )

    _PARENTS: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("T-shirt/top", "Pullover", "Coat", "Shirt"), "tops"),
        **dict.fromkeys(("Sandal", "Sneaker", "Ankle boot"), "shoes"),
        **dict.fromkeys(("Trouser", "Dress", "Bag"), "other"),
    }

    def _bring(self) -> dict[str, Path]:
        folder, url = self.root / "FashionMNIST" / "raw", self._source.mirrors[0]
        return {url + file: folder / file for file, _ in self._source.resources}

    def _parents(self) -> Sequence[str]:
        return [self._PARENTS[name] for name in self.class_names]
