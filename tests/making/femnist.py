"""LEAF's FEMNIST in small, or any pictures by writer in its form."""

import numpy as np

LEVELS = [repr(k / 255) for k in range(256)]


def draw(labels, writers, seed=0):
    """Return pictures uint8 [M, 28, 28], dark on white: a pattern per class, moved in a way that the writer has."""
    rng = np.random.default_rng(seed)
    patterns = np.kron(np.random.default_rng(1).random((62, 6, 6)) < 0.4, np.ones((4, 4)))  # ink, 24x24
    pictures = np.zeros((len(labels), 28, 28))
    for picture, label, writer in zip(pictures, labels, writers, strict=True):
        top, left = (int(writer) * 7) % 4, (int(writer) * 5) % 4
        picture[top : top + 24, left : left + 24] = patterns[label]
    return np.rint(255 * (1 - pictures * rng.uniform(0.5, 1.0, pictures.shape))).astype(np.uint8)


def make_femnist(
    root,
    images=None,
    labels=None,
    writers=None,
    is_test=None,
    *,
    num_writers=4,
    per_writer=20,
    num_classes=62,
    writers_per_file=2,
    data="data",
    seed=0,
):
    """Write ``data/{train,test}/*.json`` below ``root`` and return ``root``.

    Given pictures (uint8 [M, 28, 28]) are written as they are: FEMNIST itself is dark on white, MNIST is not. Without
    ``is_test``, a tenth of each writer's images is, as LEAF splits within clients.
    """
    rng = np.random.default_rng(seed)
    if labels is None:
        labels = rng.integers(0, num_classes, num_writers * per_writer)
        writers = np.repeat(np.arange(num_writers), per_writer)
    labels, writers = np.asarray(labels), np.asarray(writers)
    if images is None:
        images = draw(labels, writers, seed)
    if is_test is None:
        is_test = np.zeros(len(labels), dtype=bool)
        for writer in np.unique(writers):
            own = rng.permutation(np.flatnonzero(writers == writer))
            is_test[own[max(1, int(0.9 * len(own))) :]] = True
    for split, chosen in (("train", ~np.asarray(is_test)), ("test", np.asarray(is_test))):
        folder = root / data / split
        folder.mkdir(parents=True, exist_ok=True)
        present = np.unique(writers[chosen])
        for number, first in enumerate(range(0, len(present), writers_per_file)):
            own = {
                f"f{int(w):04d}_{int(w) % 50:02d}": np.flatnonzero(chosen & (writers == w))
                for w in present[first : first + writers_per_file]
            }
            file = folder / f"all_data_{number}_niid_0_keep_0_{split}_9.json"
            file.write_text(leaf_json({u: (images[rows], labels[rows]) for u, rows in own.items()}))
    return root


def leaf_json(users):
    """Return LEAF's JSON of ``{user: (images, labels)}``; by hand, since its numbers are only 256 different texts."""
    texts = []
    for user, (images, labels) in users.items():
        x = ", ".join("[" + ", ".join([LEVELS[k] for k in image.ravel().tolist()]) + "]" for image in images)
        texts.append(f'"{user}": {{"x": [{x}], "y": {[int(y) for y in labels]}}}')
    names = ", ".join(f'"{user}"' for user in users)
    counts = [len(labels) for _, labels in users.values()]
    return f'{{"users": [{names}], "num_samples": {counts}, "user_data": {{{", ".join(texts)}}}}}'
