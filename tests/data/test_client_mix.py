"""Training clients that are drawn anew each epoch."""

import numpy as np
import pytest

from iciia_exp.data.client_mix import ClientMix, unseen
from iciia_exp.data.clients import Ragged
from iciia_exp.errors import ConfigError

# four clients of two types; classes 0-2 are of type a, 3-5 of type b
LABELS = np.tile(np.arange(6), 40)
ROWS = [
    np.flatnonzero((LABELS < 3) & (np.arange(240) % 12 < 6)),
    np.flatnonzero((LABELS < 3) & (np.arange(240) % 12 >= 6)),
]
ROWS += [np.flatnonzero(LABELS >= 3)[:60], np.flatnonzero(LABELS >= 3)[60:90]]
TRAIN = Ragged.from_rows(ROWS)
KINDS = np.array(["a", "a", "b", "b"], dtype=object)


def draw(images=8, seed=0, **shares):
    return ClientMix(**shares).draw(TRAIN, KINDS, LABELS, images, np.random.default_rng(seed))


def test_natural_clients_come_once_before_any_comes_twice():
    index_CS, client_C = draw(size=1.0)
    assert sorted(index_CS[index_CS >= 0]) == sorted(TRAIN.values)
    for row, client in zip(index_CS, client_C, strict=True):
        assert set(row[row >= 0]) <= set(ROWS[client])
    twice, _ = draw(size=2.0)
    assert len(twice) == 2 * len(index_CS)
    assert (np.bincount(twice[twice >= 0], minlength=240)[TRAIN.values] == 2).all()


def test_kinds_share_their_images():
    index_CS, client_C = draw(pool="client_type")
    mixed = [len({int(np.isin(i, ROWS[1])) for i in row[row >= 0]}) for row in index_CS[client_C == 0]]
    assert max(mixed) == 2
    assert all(len(set(LABELS[row[row >= 0]] // 3)) == 1 for row in index_CS)


def test_shares_are_those_asked_for():
    index_CS, client_C = draw(natural=2, random_classes=1, homogeneous=1, drifting=0, size=10)
    count = ClientMix(size=10).count(TRAIN, 8)
    assert len(index_CS) == count
    assert abs((client_C >= 0).sum() - count / 2) <= 1
    assert np.isin(index_CS[index_CS >= 0], TRAIN.values).all()


def test_random_sets_have_the_sizes_and_are_even():
    index_CS, client_C = draw(images=200, natural=0, random_classes=1, size=300, fewest_classes=2, most_classes=4)
    assert (client_C == -1).all()
    sizes = np.array([len(set(LABELS[row])) for row in index_CS])
    assert set(sizes) == {2, 3, 4}
    counts = np.bincount(LABELS[index_CS].ravel(), minlength=6)
    assert counts.min() > 0.85 * counts.max()
    # on a log scale: log(3/2) : log(4/3) : log(5/4)
    assert 0.4 < (sizes == 2).mean() < 0.5


def test_homogeneous_clients_have_all_classes():
    index_CS, _ = draw(images=100, natural=0, homogeneous=1, size=20)
    assert all(len(set(LABELS[row])) == 6 for row in index_CS)


def test_a_drifting_client_becomes_another():
    index_CS, _ = draw(images=40, natural=1, drifting=100000, size=20)
    both = [set(LABELS[row[row >= 0]] // 3) == {0, 1} for row in index_CS]
    assert 0.3 < np.mean(both) < 0.7  # half of the pairs are of one type


def test_unseen_types_come_in_other_clients_alone():
    (client_type,) = unseen(KINDS, 0.5)
    index_CS, client_C = draw(natural=1, homogeneous=1, unseen_types=0.5, size=4)
    assert set(KINDS[client_C[client_C >= 0]]) == {"a", "b"} - {client_type}
    assert len(set(LABELS[index_CS[client_C < 0].ravel()])) == 6
    assert not ClientMix(unseen_types=0.5).plain


def test_an_epoch_is_a_function_of_its_seed():
    shares = {"natural": 1, "random_classes": 1, "homogeneous": 1, "drifting": 1}
    same, again, other = draw(**shares), draw(**shares), draw(seed=1, **shares)
    assert (same.index_CS == again.index_CS).all()
    assert same.index_CS.shape == other.index_CS.shape
    assert (same.index_CS != other.index_CS).any()


def test_what_cannot_be_drawn():
    with pytest.raises(ConfigError, match="natural=0"):
        ClientMix(natural=0, drifting=1)
    with pytest.raises(ConfigError, match="most_classes=2"):
        ClientMix(fewest_classes=3, most_classes=2)
    with pytest.raises(ConfigError, match="random_classes=1.0: needs one label per image"):
        ClientMix(random_classes=1.0).check(np.zeros((5, 3)), TRAIN, KINDS)
    ClientMix(homogeneous=1.0).check(np.zeros((5, 3)), TRAIN, KINDS)
    ClientMix(unseen_types=0.5).check(LABELS, TRAIN, KINDS)
    one = np.full(4, "a", dtype=object)
    with pytest.raises(ConfigError, match="unseen_types=0.6: leaves no images for natural clients: all .* types a;"):
        ClientMix(unseen_types=0.6).check(LABELS, TRAIN, one)
    ClientMix(natural=0.0, homogeneous=1.0, unseen_types=0.6).check(LABELS, TRAIN, one)
    assert ClientMix().plain
    assert not ClientMix(pool="client_type").plain
