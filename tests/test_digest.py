import pytest

from iciia_exp.digest import digest, file_digest


def test_key_order_and_number_type_do_not_count():
    assert digest({"a": 1, "b": [1.0, True]}) == digest({"b": [1, True], "a": 1.0})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"seed": 0}, {"seed": None}),
        ({"seed": 0}, {}),
        ({"a": True}, {"a": 1.5}),
        ({"a": "1"}, {"a": 1}),
        ([1, 2], [2, 1]),
    ],
)
def test_what_differs_has_another_digest(one, other):
    assert digest(one) != digest(other)


def test_only_plain_values():
    with pytest.raises(TypeError, match="plain values"):
        digest({"a": object()})


def test_stays_the_same_between_versions():
    """A stored digest: a change here orphans every artifact on users' disks."""
    assert digest({"method": "iciia", "groups": 16, "lr": 3e-4, "tags": ["a"], "none": None}) == "da9accc79ad2"


def test_file_digest(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_digest(tmp_path / "x") == "ba7816bf8f01"  # SHA-256 of "abc" (FIPS 180-2, appendix B.1)
