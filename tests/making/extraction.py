"""A folder of images of three owners to extract features of, the smallest settings for it, and its damage."""

import numpy as np

from iciia_exp.data.store import FeatureStore
from iciia_exp.engine.execute import execute
from tests.making.folder import CLASSES, make_folder, write_table
from tests.making.images import write_image

#: A random trunk on small pictures; what is random about it is the same in every process.
SMALL = (
    *("dataset=folder", "dataset.csv=images.csv", "partition=owner", "logger=csv", "trainer=cpu"),
    *("backbone.model.channels=3", "backbone.model.size=16", "backbone.model.width=4", "backbone.model.dim=16"),
    *("backbone.recipe.epochs=2", "training.recipe.epochs=2", "training.images=8", "features.batch_size=8"),
)
HEAD = ("backbone.train=head", "backbone.recipe=null")
ROLES = ("train", "val", "test")


def owned_images(folder):
    """Make 9 images of each class and split in ``folder``; three owners have 3 of each."""
    make_folder(folder, per_class=9, splits=("train", "val", "test"))
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    write_table(folder / "images.csv", path=paths, owner=[f"u{int(path[-7:-4]) % 3}" for path in paths])
    return folder


BAD = ["test/apple/003.jpg", "train/bread/004.jpg", "val/cup/005.jpg"]


def damage(root):
    """Delete an image, cut one short, put text in the place of another."""
    (root / BAD[0]).unlink()
    path = root / BAD[1]
    path.write_bytes(path.read_bytes()[:300])
    (root / BAD[2]).write_text("not an image")


def repair(root, paths=BAD):
    for path in paths:
        label, number = CLASSES.index(path.split("/")[1]), int(path[-7:-4])
        write_image(root / path, label, number, 16)


def store_of(stages):
    store = FeatureStore.open(stages.features.folder)
    return store.array().copy(), store.bad, store.manifest["bad_images"]


def same_stores(one, other):
    """Bit for bit."""
    return np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1]) and one[2] == other[2]


def store_of_finished(folder, *overrides):
    stages = folder(*HEAD, *overrides, "stage=features")
    execute(stages)
    return store_of(stages)


def artifacts_in(cache):
    """Return the kinds of artifacts in a cache, apart from what is kept about datasets."""
    return {path.relative_to(cache).parts[0] for path in cache.glob("*/**/*")} - {"datasets"}
