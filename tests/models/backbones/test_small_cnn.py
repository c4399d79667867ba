import numpy as np
import pytest
import torch

from iciia_exp.errors import ConfigError
from iciia_exp.models.backbones.small_cnn import SmallCNN


def test_head_of_features_is_the_network_s_logits():
    model = SmallCNN(10).eval()
    rng = np.random.default_rng(0)
    images = torch.stack([model.transform(rng.random((1, 8, 8), dtype=np.float32)) for _ in range(3)])
    features = model.features(images)
    assert features.shape == (3, 512)
    assert (features >= 0).all()
    torch.testing.assert_close(model.head(features), model(images))


def test_other_sizes():
    model = SmallCNN(7, channels=3, size=28, width=8, dim=64)
    assert model(torch.randn(2, 3, 28, 28)).shape == (2, 7)


def test_bad_arguments():
    with pytest.raises(ConfigError, match="dim=0"):
        SmallCNN(10, dim=0)
    with pytest.raises(ConfigError, match="std=0"):
        SmallCNN(10, std=0)
