"""Small CIFAR and Fashion-MNIST folders of exactly the real form: pickles of Python 2, and idx files."""

import hashlib
import pickle
import struct

import numpy as np

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FINE_NAMES = [f"fine_{i:03d}" for i in range(100)]
COARSE_NAMES = [f"coarse_{i:02d}" for i in range(20)]

#: Superclass of every class; as in the real files, not in the order of the classes.
COARSE = np.random.default_rng(3).permutation(np.repeat(np.arange(20), 5))


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 and its NumPy wrote: byte strings, `numpy.core.multiarray`, and flags of types as 0 and 1."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        data = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string

    def save_global(self, obj, name=None):
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__qualname__}\n".encode())
        self.memoize(obj)

    def reducer_override(self, obj):
        if isinstance(obj, type) or callable(obj):
            return NotImplemented
        if isinstance(obj, np.dtype):
            _, (kind, _, _), state = obj.__reduce__()
            return np.dtype, (kind, 0, 1), state
        return NotImplemented


def dump(content, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        Python2Pickler(file, protocol=2).dump(content)


def _images(rng, number):
    return rng.integers(0, 256, (number, 3072), dtype=np.uint8)


def make_cifar10(root, per_batch=20, seed=0):
    """Write five training batches and a test batch; returns data [M, 3072] and labels [M], training first."""
    rng = np.random.default_rng(seed)
    folder, data, labels = root / "cifar-10-batches-py", [], []
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        own, own_labels = _images(rng, per_batch), rng.permutation(np.arange(per_batch) % 10).tolist()
        note = "testing batch 1 of 1" if file == "test_batch" else f"training batch {file[-1]} of 5"
        names = [f"image_s_{i:06d}.png" for i in range(per_batch)]
        dump({"batch_label": note, "labels": own_labels, "data": own, "filenames": names}, folder / file)
        data.append(own)
        labels += own_labels
    dump({"num_cases_per_batch": per_batch, "label_names": CIFAR10_NAMES, "num_vis": 3072}, folder / "batches.meta")
    return np.concatenate(data), np.array(labels)


def make_cifar100(root, train=200, test=40, seed=0):
    """Write train, test and meta; returns data [M, 3072] and fine labels [M], training first."""
    rng = np.random.default_rng(seed)
    folder, data, labels = root / "cifar-100-python", [], []
    for file, number in (("train", train), ("test", test)):
        own, fine = _images(rng, number), rng.permutation(np.arange(number) % 100)
        content = {
            "filenames": [f"image_s_{i:06d}.png" for i in range(number)],
            "batch_label": f"{file}ing batch 1 of 1",
            "fine_labels": fine.tolist(),
            "coarse_labels": COARSE[fine].tolist(),
            "data": own,
        }
        dump(content, folder / file)
        data.append(own)
        labels += fine.tolist()
    dump({"fine_label_names": FINE_NAMES, "coarse_label_names": COARSE_NAMES}, folder / "meta")
    return np.concatenate(data), np.array(labels)


def idx(array):
    """Return a uint8 array in the idx form of MNIST: type, number of axes, sizes (big endian), data."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def make_fashion_mnist(root, train=60, test=20, seed=0):
    """Write four idx files; returns images [M, 28, 28] and labels [M], training first."""
    rng = np.random.default_rng(seed)
    folder, images, labels = root / "FashionMNIST" / "raw", [], []
    folder.mkdir(parents=True)
    for part, number in (("train", train), ("t10k", test)):
        images.append(rng.integers(0, 256, (number, 28, 28), dtype=np.uint8))
        labels.append(rng.permutation(np.arange(number) % 10).astype(np.uint8))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images[-1]))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels[-1]))
    return np.concatenate(images), np.concatenate(labels)


def md5(path):
    """Return the checksum of a file, in torchvision's form."""
    return hashlib.md5(path.read_bytes()).hexdigest()


def accept(monkeypatch, source, folder):
    """Give torchvision the checksums of made CIFAR files, so that all of its own checks run."""
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(source, part, [[file, md5(folder / file)] for file, _ in getattr(source, part)])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5(folder / source.meta["filename"])})
