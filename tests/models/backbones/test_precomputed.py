import numpy as np
import pytest
import torch

from iciia_exp.errors import ConfigError
from iciia_exp.models.backbones.precomputed import Precomputed


def test_vectors_pass_unchanged_and_the_head_reads_them():
    model = Precomputed(5, dim=8, macs=1000)
    vector = np.random.default_rng(0).normal(size=8).astype(np.float16)
    x = model.transform(vector)
    assert x.dtype == torch.float32
    np.testing.assert_array_equal(x.numpy(), vector.astype(np.float32))
    features = model.features(x[None])
    assert features.shape == (1, 8)
    torch.testing.assert_close(model(x[None]), model.head(features))
    assert [name for name, _ in model.named_parameters()] == ["head.weight", "head.bias"]
    assert (model.dim, model.num_classes, model.macs(x)) == (8, 5, 1000 + 8 * 5)
    assert model.describe_transform() == {}


def test_the_cost_may_be_unknown():
    assert Precomputed(5, dim=8).macs(torch.zeros(8)) is None


@pytest.mark.parametrize(("arguments", "key"), [({"dim": 0}, "dim"), ({"dim": 8, "macs": -1}, "macs")])
def test_bad_arguments_name_their_key(arguments, key):
    with pytest.raises(ConfigError) as error:
        Precomputed(5, **arguments)
    assert error.value.key == key
