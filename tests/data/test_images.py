import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from iciia_exp.data.dataset import ImageDataset
from iciia_exp.data.images import ImageBlocks, Jpeg, TransformedImages, collate, readable
from iciia_exp.errors import ConfigError, UserError

M = 21
LABELS = np.arange(M) % 3


class Pictures(ImageDataset):
    name = "pictures"
    class_names = ("a", "b", "c")

    def __init__(self, bad=(), error=None):
        self.bad, self.error = set(bad), error or OSError("image file is truncated")

    def load_table(self):
        paths = [f"c/{i:02d}.jpg" for i in range(M)]
        return pd.DataFrame({"label": LABELS, "split": "train", "owner": None, "parent": None, "path": paths})

    def __getitem__(self, index):
        if index in self.bad:
            raise self.error
        return np.full((2, 2), index, dtype=np.float32)


def images(dataset, rows=None, **options):
    return TransformedImages(dataset, torch.from_numpy, np.arange(M) if rows is None else rows, LABELS, **options)


def test_a_batch_has_the_images_that_could_be_read_and_names_the_others():
    batch = collate([images(Pictures(bad=[1]), np.array([4, 1, 2]))[i] for i in range(3)])
    assert batch.images[:, 0, 0].tolist() == batch.rows.tolist() == [4, 2]
    assert batch.labels.tolist() == [1, 2]
    assert batch.labels.dtype == batch.rows.dtype == torch.int64
    assert batch.bad == [(1, "OSError: image file is truncated")]


def test_a_batch_may_have_no_image_at_all():
    batch = collate([images(Pictures(bad=range(M)))[i] for i in range(3)])
    assert len(batch.images) == len(batch.labels) == len(batch.rows) == 0
    assert [row for row, _ in batch.bad] == [0, 1, 2]


def test_labels_of_a_multi_label_task_keep_their_type():
    labels = np.eye(M, 4, dtype=np.uint8)
    many = TransformedImages(Pictures(), torch.from_numpy, np.arange(M), labels)
    assert collate([many[0], many[1]]).labels.equal(torch.from_numpy(labels[:2]))


def test_an_error_names_the_image_and_the_way_out():
    message = r"^c/03\.jpg: cannot be read \(OSError: image file is truncated\); .*features\.on_bad_image=skip$"
    with pytest.raises(UserError, match=message):
        images(Pictures(bad=[3]), on_bad_image="error")[3]


def test_an_error_of_ours_is_no_bad_image():
    with pytest.raises(UserError, match="^no decoder for videos$"):
        images(Pictures(bad=[3], error=UserError("no decoder for videos")))[3]


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (FileNotFoundError(2, "No such file or directory", "/my data/c/03.jpg"), "FileNotFoundError: No such file"),
        (ValueError("cannot identify '/my data/c/03.jpg'"), "ValueError: cannot identify 'c/03.jpg'"),
        (ValueError("first\nsecond"), "ValueError: first"),
        (ValueError(), "ValueError: unknown error"),
    ],
    ids=["missing", "strange", "long", "silent"],
)
def test_problems_are_one_line_without_the_folders_above_the_dataset(error, problem):
    text = images(Pictures(bad=[3], error=error))[3].problem
    assert text.startswith(problem)
    assert "my data" not in text
    assert "\n" not in text


@pytest.mark.parametrize("size", [1, 8, 21, 50])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_blocks_cover_every_image_once_whoever_has_them(size, processes):
    parts = np.array_split(np.unique(np.arange(M) // size), processes)
    shares = [ImageBlocks(images(Pictures()), part, size) for part in parts]
    rows = [share[i].rows.tolist() for share in shares for i in range(len(share))]
    assert [row for block in rows for row in block] == list(range(M))
    assert all(row[0] % size == 0 for row in rows)
    assert sum(share.num_images for share in shares) == M


def test_blocks_are_the_same_in_processes_of_their_own():
    blocks = ImageBlocks(images(Pictures(bad=[5])), np.array([0, 2]), 8)
    for workers in (0, 2):
        got = list(DataLoader(blocks, batch_size=None, num_workers=workers, collate_fn=lambda batch: batch))
        assert [batch.rows.tolist() for batch in got] == [[0, 1, 2, 3, 4, 6, 7], [16, 17, 18, 19, 20]]
        assert [len(batch.bad) for batch in got] == [1, 0]


def test_the_first_readable_image():
    row, image = readable(Pictures(bad=[2, 5]), torch.from_numpy, [2, 5, 7, 8])
    assert row == 7
    assert image[0, 0] == 7
    message = r"^none of the 2 images tried could be read; the first: c/02\.jpg: OSError: image file is truncated$"
    with pytest.raises(UserError, match=message):
        readable(Pictures(bad=[2, 5]), torch.from_numpy, [2, 5])


def test_a_jpeg_is_what_the_network_gets_and_its_size_counts():
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 255, 3 * 32 * 32).reshape(3, 32, 32)
    pictures = [
        torch.from_numpy((smooth + 8 * rng.random((3, 32, 32))).clip(0, 255).astype(np.uint8)) for _ in range(3)
    ]
    fine, coarse = (Jpeg(lambda image: image, quality) for quality in (95, 5))
    for picture in pictures:
        near, far = fine(picture), coarse(picture)
        assert near.dtype == torch.uint8
        assert near.shape == picture.shape
        assert (near.float() - picture).abs().mean() < (far.float() - picture).abs().mean()
    assert coarse.mean_bytes(pictures, range(3)) < fine.mean_bytes(pictures, range(3)) < 3 * 32 * 32
    assert fine.mean_bytes(pictures, [0]) == len(fine.encode(pictures[0]))
    with pytest.raises(
        ConfigError, match=r"features.jpeg=95: needs a backbone whose input are pictures.* float32 \[1, 8"
    ):
        fine(torch.zeros(1, 8, 8))
