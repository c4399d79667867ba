import numpy as np
import pytest
from sklearn.datasets import load_digits

from iciia_exp.data.datasets.digits import Digits
from iciia_exp.errors import ConfigError

SIZES = {"backbone": 500, "train": 600, "val": 197, "test": 500}


def test_every_image_is_in_one_split_with_its_own_label():
    digits = Digits(SIZES, noise_std=0.0)
    assert len(digits) == 1797
    assert digits.table["split"].value_counts().to_dict() == SIZES
    raw = load_digits()
    ours = np.stack([digits[i][0] for i in range(len(digits))])
    key = {image.tobytes(): label for image, label in zip((raw.images / 16).astype("f4"), raw.target, strict=True)}
    assert [key[image.tobytes()] for image in ours] == digits.table["label"].tolist()
    assert digits.table["parent"].nunique() == 3


def test_noise_is_fixed_by_the_seed():
    one, again, other = Digits(SIZES), Digits(SIZES), Digits(SIZES, seed=1)
    np.testing.assert_array_equal(one[3], again[3])
    assert not np.array_equal(one[3], other[3])
    clean = Digits(SIZES, noise_std=0.0)
    noise = np.stack([one[i] - clean[i] for i in range(1797)])
    assert noise.std() == pytest.approx(0.4, rel=0.01)
    assert abs(noise.mean()) < 0.01


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"sizes": SIZES | {"test": 501}}, "sizes"),
        ({"sizes": SIZES | {"test": 0}}, "sizes.test"),
        ({"sizes": {"train": 10}}, "sizes"),
        ({"sizes": SIZES, "noise_std": -0.1}, "noise_std"),
        ({"sizes": SIZES, "seed": -1}, "seed"),
    ],
)
def test_bad_arguments_name_their_key(arguments, key):
    with pytest.raises(ConfigError) as error:
        Digits(**arguments)
    assert error.value.key == key
