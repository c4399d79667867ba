import math
import pickle

import numpy as np
import pytest

from iciia_exp.errors import ConfigError, check_bool, check_choice, check_float, check_int, nearest


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True, None, 12])
def test_check_int_refuses(value):
    with pytest.raises(ConfigError, match="heads=.*: must be a whole number of 1 to 10"):
        check_int("heads", value, 1, 10)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "abc", None, True])
def test_check_float_refuses(value):
    with pytest.raises(ConfigError, match="lr=.*: must be a number at least 0"):
        check_float("lr", value, 0.0)


def test_check_float_takes_whole_numbers_and_open_ranges():
    assert check_float("lr", 1, 0.0) == 1.0
    with pytest.raises(ConfigError, match="above 0"):
        check_float("lr", 0, 0.0, open_low=True)


def test_check_bool_and_choice():
    assert check_bool("shuffle", False) is False
    with pytest.raises(ConfigError, match="true or false"):
        check_bool("shuffle", 1)
    with pytest.raises(ConfigError, match="did you mean sgd"):
        check_choice("optimizer", "sdg", ("sgd", "adamw"))


def test_nearest_finds_a_leaf_of_a_dotted_key():
    assert nearest("noise", ["seed", "dataset.noise_std"]) == "dataset.noise_std"


def test_config_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ConfigError("a.b", 3, "too many")))
    assert str(error) == "a.b=3: too many"


def test_whole_numbers_of_numpy_are_whole_numbers():
    found = check_int("history", np.int64(3), 0)
    assert type(found) is int
    assert found == 3
    with pytest.raises(ConfigError):
        check_int("history", np.float64(3), 0)
