"""ImageNet in small: real wnids, and every layout that its users have."""

import numpy as np

from tests.making.images import write_image

#: Four terriers, four snakes and four wind instruments, in sorted order.
WNIDS = (
    *("n01728572", "n01728920", "n01729322", "n01729977"),
    *("n02093256", "n02093428", "n02093647", "n02093754"),
    *("n02672831", "n02804610", "n03110669", "n03372029"),
)


def make_imagenet(root, wnids=WNIDS, train=6, val=3, layout="folders", size=32):
    """Write train and validation images of each class.

    Layouts: ``folders`` (class folders in val), ``solution`` (flat val, LOC_val_solution.csv), ``devkit`` (flat val,
    ground truth and meta.mat), ``kaggle`` (as ``solution``, below ILSVRC/Data/CLS-LOC), ``tiny`` (Tiny ImageNet's own).
    """
    base = root / "ILSVRC/Data/CLS-LOC" if layout == "kaggle" else root
    for label, wnid in enumerate(wnids):
        for number in range(train):
            folder = base / "train" / wnid / ("images" if layout == "tiny" else "")
            write_image(folder / f"{wnid}_{number}.JPEG", label, number, size)
    # validation images are numbered in an order of their own
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(wnids)), val))
    names = [f"val_{i}.JPEG" if layout == "tiny" else f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(len(labels))]
    folders = {"folders": "{}", "tiny": "images"}
    for number, (name, label) in enumerate(zip(names, labels, strict=True)):
        folder = base / "val" / folders.get(layout, "").format(wnids[label])
        write_image(folder / name, int(label), 1000 + number, size)
    of_image = [wnids[label] for label in labels]
    if layout in ("solution", "kaggle"):
        rows = [f"{n.removesuffix('.JPEG')},{w} 1 1 9 9 {w} 2 2 8 8 " for n, w in zip(names, of_image, strict=True)]
        (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]) + "\n")
    elif layout == "devkit":
        write_devkit(root / "ILSVRC2012_devkit_t12" / "data", wnids, labels)
    elif layout == "tiny":
        rows = [f"{n}\t{w}\t0\t0\t9\t9" for n, w in zip(names, of_image, strict=True)]
        (base / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    return root


def write_devkit(folder, wnids, labels):
    """Write the devkit's two files; its class numbers are in another order than the wnids, as in the real one."""
    from scipy.io import savemat

    folder.mkdir(parents=True)
    numbers = np.random.default_rng(1).permutation(len(wnids)) + 1
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.zeros((len(wnids) + 1, 1), dtype=fields)
    for row, (number, wnid) in enumerate(zip(numbers, wnids, strict=True)):
        synsets[row, 0] = (float(number), wnid, "a class", 0.0)
    synsets[-1, 0] = (float(len(wnids) + 1), "n00001740", "something above", 2.0)
    savemat(folder / "meta.mat", {"synsets": synsets})
    text = "".join(f"{numbers[label]}\n" for label in labels)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(text)
