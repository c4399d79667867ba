"""Sequences of the history protocols, against plain loops."""

import itertools

import numpy as np
import pytest

from iciia_exp.data.clients import Ragged
from iciia_exp.data.sequences import by_length, prefix_sequences, stream_orders
from iciia_exp.results.summary import ALL

ROWS = [np.arange(5), np.empty(0, np.int64), np.array([20]), np.arange(30, 37)]
TEST = Ragged.from_rows(ROWS)


@pytest.mark.parametrize("length", [0, 1, 3, 6, ALL])
def test_prefix_takes_the_first_others(length):
    want = []
    for client, row in enumerate(ROWS):
        for target in row:
            others = [i for i in row if i != target]
            want.append((client, [*others[: 4 if length == ALL else length], target]))
    got = prefix_sequences(TEST, length, longest=4 if length == ALL else 10)
    assert [(int(c), got.ragged[i].tolist()) for i, c in enumerate(got.client_B)] == want


def test_stream_orders_are_seeded_and_cut():
    first, second = (list(stream_orders(TEST, 3, 4, seed)) for seed in (0, 1))
    assert len(first) == 3
    for sequences in first:
        assert sequences.client_B.tolist() == [0, 2, 3]
        assert sequences.ragged.lengths.tolist() == [5, 1, 5]
        for i, client in enumerate(sequences.client_B):
            assert set(sequences.ragged[i]) <= set(ROWS[client])
    same = list(stream_orders(TEST, 3, 4, 0))
    assert all((a.ragged.values == b.ragged.values).all() for a, b in zip(first, same, strict=True))
    assert any((a.ragged.values != b.ragged.values).any() for a, b in zip(first, second, strict=True))
    assert any((a.ragged.values != b.ragged.values).any() for a, b in itertools.pairwise(first))


def test_time_has_one_order():
    (only,) = stream_orders(TEST, 16, 100, 0, in_time=True)
    assert [only.ragged[i].tolist() for i in range(3)] == [ROWS[i].tolist() for i in (0, 2, 3)]


@pytest.mark.parametrize(("length", "tokens"), [(None, 10), (None, 1), (4, 8), (1, 100)])
def test_batches_have_every_sequence_once(length, tokens):
    sequences = next(iter(stream_orders(TEST, 1, 100, 0)))
    seen = {}
    for index_BS, client_B in by_length(sequences, length, tokens):
        assert index_BS.size <= max(tokens, 7)
        for row, client in zip(index_BS, client_B, strict=True):
            seen[int(client)] = row[row >= 0].tolist()
    want = {int(c): sequences.ragged[i].tolist() for i, c in enumerate(sequences.client_B)}
    if length is not None:
        want = {c: row[:length] for c, row in want.items() if len(row) >= length}
    assert seen == want
