"""Two networks on the same images, a VGG that is cut by its channels, and a perceptron on features."""

from functools import partial

import numpy as np
import pytest
import torch

from iciia_exp.errors import ConfigError
from iciia_exp.models.backbones.feature_perceptron import FeaturePerceptron
from iciia_exp.models.backbones.paired import Paired
from iciia_exp.models.backbones.timm_backbone import TimmBackbone
from iciia_exp.models.backbones.vgg import VGG

FIRST, SECOND = (
    partial(TimmBackbone, model=f"mobilenetv3_small_{width}", image_size=32, crop_pct=1.0) for width in ("075", "050")
)


def pair():
    torch.manual_seed(0)
    return Paired(5, FIRST, SECOND).eval()


@torch.no_grad()
def test_the_first_classifies_and_the_second_gives_an_array():
    backbone, images = pair(), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    arrays = backbone.outputs(images, frozenset({"features", "logits", "second", "images"}))
    assert arrays["features"].shape == (2, backbone.dim)
    torch.testing.assert_close(arrays["logits"], backbone(images))
    torch.testing.assert_close(arrays["second"], backbone.second.features(images))
    assert arrays["second"].shape == (2, backbone.second.dim)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert backbone.transform(image).shape == (3, 32, 32)


@torch.no_grad()
def test_weights_of_both_come_from_one_file():
    one, other = pair(), pair()
    names = {f"{one.head_name}.{k}": t.clone() for k, t in one.head.state_dict().items()}
    state = names | {k: t.clone() for k, t in one.first.net.state_dict().items()}
    state |= {f"second.{k}": t.clone() for k, t in one.second.net.state_dict().items()}
    state[f"second.{one.second.head_name}.weight"] = torch.zeros(1000, 8)  # its classifier is not used
    for p in other.parameters():
        p.zero_()
    other.load_original(state)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    wanted = frozenset({"features", "logits", "second"})
    for name, values in one.outputs(images, wanted).items():
        torch.testing.assert_close(other.outputs(images, wanted)[name], values)
    with pytest.raises(RuntimeError, match="second: has no"):
        other.load_original({k: t for k, t in state.items() if not k.startswith("second.")})
    assert "second" in dict(other.named_children())


def test_both_need_the_same_transform():
    with pytest.raises(ConfigError, match="second=TimmBackbone: must have the first's input_size"):
        Paired(5, FIRST, partial(SECOND, image_size=64))
    with pytest.raises(ConfigError, match="first.model=resnet5: timm has no such model"):
        Paired(5, partial(FIRST, model="resnet5"), SECOND)
    with pytest.raises(ConfigError, match="second=resnet50: must be a node"):
        Paired(5, FIRST, "resnet50")


def test_vgg_16_is_cut_by_its_channels_as_published():
    """DC-CCL's setting of CIFAR-10: 11.68 M and 0.244 M parameters behind a common first convolution."""
    widths = [56, "M", 112, 112, "M", *[224] * 3, "M", *[448] * 3, "M", *[448] * 3, "M"]
    large = VGG(10, channels=3, size=32, stem=64, layers=widths, hidden=[448, 448], dropout=0.5)
    small = [width if width == "M" else width // 7 for width in widths]
    part = VGG(10, channels=64, size=32, layers=small, hidden=[64, 64])
    own = sum(p.numel() for name, p in large.named_parameters() if not name.startswith("stem."))
    assert own / 1e6 == pytest.approx(11.68, abs=0.005)
    assert sum(p.numel() for p in part.parameters()) / 1e6 == pytest.approx(0.244, abs=0.0005)
    stem = large.eval().outputs(torch.zeros(2, 3, 32, 32), frozenset({"features", "stem"}))["stem"]
    assert stem.shape == (2, 64, 32, 32)
    assert part.eval()(stem).shape == (2, 10)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"layers": [8, "M"] * 6}, "layers=.*pools an image of 28 pixels to nothing"),
        ({"layers": [8, "P"]}, "layers=P"),
        ({"hidden": [0]}, "hidden=0"),
    ],
)
def test_wrong_layers(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        VGG(10, **settings)


def test_a_perceptron_takes_vectors_of_its_size():
    network = FeaturePerceptron(3, inputs=6, width=4)
    assert network.transform(np.zeros(6)).dtype == torch.float32
    with pytest.raises(Exception, match="takes vectors of 6 numbers"):
        network.transform(np.zeros(5))
