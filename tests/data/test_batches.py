import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from iciia_exp.data.batches import ClientBatchSampler, ClientIndex, FeatureBatches, cut_chunks, pack
from iciia_exp.data.clients import Ragged


@pytest.fixture
def ragged():
    rng = np.random.default_rng(0)
    images = rng.permutation(200)
    return Ragged.from_rows(np.split(images, [1, 17, 33, 33, 70, 150]))  # lengths 1, 16, 16, 0, 37, 80, 50


def test_chunks_equal_a_plain_loop(ragged):
    want = []
    for i in range(len(ragged)):
        row = ragged[i]
        want += [(i, row[s : s + 16].tolist()) for s in range(0, len(row), 16)]
    chunks = cut_chunks(ragged, 16)
    got = [(int(c), index[index >= 0].tolist()) for index, c in zip(*chunks, strict=True)]
    assert got == want


def loader(ragged, **options):
    features = np.random.default_rng(1).normal(size=(200, 5)).astype(np.float16)
    labels = np.arange(200) % 7
    sampler = ClientBatchSampler(ragged, 16, 3, **options)
    return DataLoader(FeatureBatches(features, labels), batch_size=None, sampler=sampler), features, labels


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shuffle": True, "shuffle_images": True}])
def test_every_image_comes_once_with_its_own_label_and_client(ragged, options):
    batches, features, labels = loader(ragged, **options)
    owner = dict(zip(ragged.values.tolist(), ragged.row_numbers.tolist(), strict=True))
    row_of = {features[i].tobytes(): i for i in range(200)}
    seen = []
    for batch in batches:
        assert batch.x_CSD.shape[:2] == batch.y_CS.shape == batch.mask_CS.shape
        assert (batch.x_CSD[~batch.mask_CS] == 0).all()
        assert (batch.y_CS[~batch.mask_CS] == 0).all()
        for c, client in enumerate(batch.client_C.tolist()):
            for s in batch.mask_CS[c].nonzero().flatten().tolist():
                i = row_of[batch.x_CSD[c, s].numpy().astype(np.float16).tobytes()]
                assert labels[i] == batch.y_CS[c, s]
                assert owner[i] == client
                seen.append(i)
    assert sorted(seen) == sorted(ragged.values.tolist())
    assert len(list(batches)) == len(batches.sampler)


def order(sampler):
    return [tuple(s.index_CS.flatten()) for s in sampler]


def test_the_order_depends_on_seed_and_epoch_alone(ragged):
    def sampler(seed, epoch, **options):
        made = ClientBatchSampler(ragged, 16, 3, shuffle=True, seed=seed, **options)
        made.set_epoch(epoch)
        return made

    assert order(sampler(0, 1)) == order(sampler(0, 1))
    assert order(sampler(0, 1)) != order(sampler(0, 2))
    assert order(sampler(0, 1)) != order(sampler(1, 0))
    plain, mixed = (
        {frozenset(row[row >= 0]) for s in sampler(0, 1, **o) for row in s.index_CS}
        for o in ({}, {"shuffle_images": True})
    )
    assert plain != mixed  # other chunks, not only another order of chunks


@pytest.mark.parametrize("shuffle", [False, True])
def test_processes_share_every_batch(ragged, shuffle):
    whole = ClientBatchSampler(ragged, 16, 4, shuffle=shuffle)
    parts = [ClientBatchSampler(ragged, 16, 4, shuffle=shuffle, rank=r, world_size=2) for r in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):  # equally many steps
        rows = [row[row >= 0].tolist() for share in shares for row in share.index_CS]
        assert sorted(filter(None, rows)) == sorted(row[row >= 0].tolist() for row in batch.index_CS)
    assert any(not (share.index_CS >= 0).any() for share in parts[1]) == (len(list(whole)[-1].client_C) == 1)


def test_columns_that_are_padding_for_all_are_not_carried():
    batches = FeatureBatches(np.ones((4, 2), np.float32), np.arange(4))
    chunks = cut_chunks(Ragged.from_rows([np.array([0, 1]), np.array([2])]), 16)
    assert batches[chunks].x_CSD.shape == (2, 2, 2)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_labels_of_several_attributes_are_padded(ragged, dtype):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(200, 5)).astype(np.float32)
    labels = rng.integers(0, 2, (200, 3)).astype(dtype)
    labels[:, 0] = 1  # a padded image would show
    sampler = ClientBatchSampler(ragged, 16, 3, shuffle=True, shuffle_images=True)
    row_of = {features[i].tobytes(): i for i in range(200)}
    seen = []
    for batch in DataLoader(FeatureBatches(features, labels), batch_size=None, sampler=sampler):
        C, S = batch.mask_CS.shape
        assert batch.y_CS.shape == (C, S, 3)
        assert batch.y_CS.numpy().dtype == dtype
        assert (batch.y_CS[~batch.mask_CS] == 0).all()
        for x_D, y_K in zip(batch.x_CSD[batch.mask_CS], batch.y_CS[batch.mask_CS], strict=True):
            seen.append(row_of[x_D.numpy().tobytes()])
            np.testing.assert_array_equal(y_K, labels[seen[-1]])
    assert sorted(seen) == sorted(ragged.values.tolist())


@pytest.mark.parametrize("shuffle", [True, False])
def test_little_is_padded(shuffle):
    rng = np.random.default_rng(0)
    ragged = Ragged.from_rows([np.arange(n) for n in rng.integers(1, 120, 400)])
    sampler = ClientBatchSampler(ragged, 16, 8, shuffle=shuffle, seed=1)
    seen, places = [], 0
    for index_CS, client_C in sampler:
        used = (index_CS >= 0).any(0).sum()
        places += used * len(client_C)
        seen += [(int(c), tuple(row[row >= 0])) for row, c in zip(index_CS, client_C, strict=True)]
    want = cut_chunks(ragged, 16)
    assert sorted(seen) == sorted((int(c), tuple(r[r >= 0])) for r, c in zip(*want, strict=True))
    assert places < 1.05 * ragged.lengths.sum()


def test_chunks_of_one_length_keep_their_order():
    order = np.random.default_rng(0).permutation(50)
    assert (pack(np.full(50, 16), order, 8, np.random.default_rng(0)) == order).all()


def test_logits_of_some_images():
    features = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
    logits = np.arange(12, dtype=np.float16).reshape(4, 3)
    batches = FeatureBatches(features, np.arange(10), (logits, np.array([7, 2, 5, 3])))
    batch = batches[ClientIndex(np.array([[2, 7, -1], [3, 5, 2]]), np.array([0, 1]))]
    want = np.stack([np.stack([logits[1], logits[0], 0 * logits[0]]), logits[[3, 2, 1]]])
    np.testing.assert_array_equal(batch.backbone_CSK, want)
    assert batches[ClientIndex(np.array([[2, 4, -1]]), np.array([0]))].backbone_CSK is None
    assert FeatureBatches(features, np.arange(10))[ClientIndex(np.array([[2]]), np.array([0]))].backbone_CSK is None


def test_arrays_beside_the_features():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((10, 4)).astype(np.float32)
    tokens = rng.standard_normal((10, 3, 2)).astype(np.float16)
    batches = FeatureBatches(features, np.arange(10), arrays={"tokens": tokens})
    index_CS = np.array([[2, 7, -1], [3, 5, 2]])
    for batch in (batches[ClientIndex(index_CS, np.arange(2))].moved("cpu"), *loaded(batches, index_CS)):
        got = batch.arrays["tokens"]
        assert got.dtype == torch.float32
        np.testing.assert_array_equal(got, np.where((index_CS >= 0)[..., None, None], tokens[index_CS], 0))
        np.testing.assert_array_equal(batch.x_CSD[1], features[index_CS[1]])
    plain = FeatureBatches(features, np.arange(10))[ClientIndex(index_CS, np.arange(2))]
    assert plain.arrays == plain.moved("cpu").arrays == {}
    assert torch.equal(plain.x_CSD, batch.x_CSD)


def loaded(batches, index_CS):
    """Yield the batch as it comes out of a loading process."""
    order = [ClientIndex(index_CS, np.arange(2))]
    return DataLoader(batches, batch_size=None, sampler=order, num_workers=1)
