"""Accuracy by length of history, against running every target by itself."""

import numpy as np
import pytest
import torch
from torch import nn

from iciia_exp.config.settings import Evaluation
from iciia_exp.data.batches import FeatureBatches
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.data.sequences import prefix_sequences, stream_orders
from iciia_exp.engine.evaluation.history import Setup, history_table
from iciia_exp.methods.adapt.iciia import IciiaMethod
from iciia_exp.methods.base import Facts
from iciia_exp.results.summary import ALL
from iciia_exp.results.tables import history_summary

D, K = 8, 3
SIZES = [6, 0, 1, 4, 9]


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((sum(SIZES), D)).astype(np.float32)
    labels = rng.integers(0, K, len(features))
    offsets = np.concatenate([[0], np.cumsum(SIZES)])
    rows = [np.arange(offsets[i], offsets[i + 1]) for i in range(len(SIZES))]
    test, none = Ragged.from_rows(rows), Ragged.from_rows([np.empty(0, np.int64)] * len(SIZES))
    ids = np.array([f"c{i}" for i in range(len(SIZES))], dtype=object)
    return FeatureBatches(features, labels), Clients(ids, ids, none, none, test)


@pytest.mark.parametrize(("attention", "layers"), [("full", 2), ("causal", 2)])
def test_every_target_by_itself(world, attention, layers):
    batches, clients = world
    torch.manual_seed(0)
    head = nn.Linear(D, K)
    method = IciiaMethod(Facts.of(head), layers, 2, 2, attention=attention).eval()
    options = Evaluation(history_lengths=[0, 2, 5], history_orders=3, history_longest=7)
    told = []
    table = history_table(Setup(method, head, batches, clients), options, told.append)
    assert told[-1] == 1.0
    want: dict = {}

    def add(name, n, client, images):
        x = torch.from_numpy(batches.features[images])[None]
        with torch.no_grad():
            logits, plain = method(x)[0, -1], head(x)[0, -1]
        y = int(batches.labels[images[-1]])
        row = want.setdefault((name, n, f"c{client}"), np.zeros(5))
        hit, base = int(logits.argmax() == y), int(plain.argmax() == y)
        row += [1, base, hit, hit * base, -float(logits.log_softmax(-1)[y])]

    for sequences in stream_orders(clients.test, 3, 7, 0):
        for i, client in enumerate(sequences.client_B):
            images = sequences.ragged[i]
            for n in (0, 2, 5):
                if len(images) > n:
                    add("stream", n, client, images[: n + 1])
            add("stream", ALL, client, images)
    for n in (0, 2, 5, ALL):
        sequences = prefix_sequences(clients.test, n, 7)
        for i, client in enumerate(sequences.client_B):
            add("prefix", n, client, sequences.ragged[i])
    columns = ["targets", "backbone_correct", "method_correct", "both_correct", "method_loss"]
    got = table.set_index(["protocol", "history", "client"])[columns]
    assert set(got.index) == set(want)
    for key, row in want.items():
        np.testing.assert_allclose(got.loc[key], row, atol=1e-4)

    summary = history_summary(table).set_index(["protocol", "history"])
    assert summary.loc[("stream", 5), "clients"] == 2
    assert summary.loc[("stream", 5), "targets"] == 6
    for n in (0, 5):  # in the paper's protocol clients with fewer images stay
        assert summary.loc[("prefix", n), "targets"] == sum(SIZES)


def test_of_many_clients_some_are_drawn(world):
    batches, clients = world
    head = nn.Linear(D, K)
    method = IciiaMethod(Facts.of(head), 1, 2, 2).eval()
    every = history_table(Setup(method, head, batches, clients), Evaluation())
    some = history_table(Setup(method, head, batches, clients), Evaluation(history_clients=2))
    drawn = set(some["client"])
    assert len(drawn) == 2
    keys = ["protocol", "history", "client"]
    want = every[every["client"].isin(drawn) & (every["protocol"] == "prefix")].set_index(keys)
    got = some[some["protocol"] == "prefix"].set_index(keys)
    assert got["method_correct"].equals(want["method_correct"].loc[got.index])


def test_no_length_that_nobody_has(world):
    batches, clients = world
    head = nn.Linear(D, K)
    method = IciiaMethod(Facts.of(head), 1, 2, 2).eval()
    table = history_table(Setup(method, head, batches, clients), Evaluation())
    assert sorted(table["history"].unique()) == [-1, 0, 1, 2, 3, 5]
