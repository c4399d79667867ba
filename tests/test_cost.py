"""The closed forms against the published table and against PyTorch's counter."""

import pytest
import torch

from iciia_exp.cost import attention_macs, count_macs, overheads, streaming_attention_macs
from iciia_exp.models.iciia import ICIIA

# iciia: dim, backbone GMACs, (B: MACs as printed, percent as printed), (T: ...); 3 layers, 16 images (paper, Table 2)
PUBLISHED = [
    ("mobilenetv3_l", 1280, 0.2348e9, ("0.47 G", "202"), ("3.8 M", "1.62")),
    ("resnet152", 2048, 11.6e9, ("1.2 G", "10.4"), ("7.9 M", "0.07")),
    ("efficientnet_b4", 1792, 4.60e9, ("0.93 G", "20.2"), ("6.4 M", "0.14")),
    ("swin_b", 1024, 15.4e9, ("0.30 G", "1.97"), ("2.8 M", "0.02")),
    ("convnext_l", 1536, 34.4e9, ("0.68 G", "1.98"), ("5.0 M", "0.01")),
    ("efficientnet_b7", 2560, 38.9e9, ("1.9 G", "4.86"), ("11 M", "0.03")),
]


def printed(value, like):
    """Round ``value`` to the digits of the printed number ``like``."""
    return f"{value:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize(("name", "dim", "backbone", "base", "tiny"), PUBLISHED, ids=[p[0] for p in PUBLISHED])
def test_published_overheads(name, dim, backbone, base, tiny):
    for groups, (macs, percent) in ((1, base), (256, tiny)):
        number, unit = macs.split()
        cost = attention_macs(16, dim, groups, 3)
        assert printed(cost / {"G": 1e9, "M": 1e6}[unit], number) == number
        assert printed(overheads(cost, None, 16, backbone)["published"], percent) == percent


@pytest.mark.parametrize("groups", [1, 2, 8, 64])
@pytest.mark.parametrize("layers", [1, 2])
def test_closed_form_equals_the_counter(groups, layers, monkeypatch):
    # groups that are joined for speed multiply zeros too, which is not in the cost
    monkeypatch.setattr("iciia_exp.models.grouped._JOINED_VECTORS", 1000)
    model = ICIIA(64, 10, layers, 4, groups)
    counted = count_macs(model, torch.randn(1, 16, 64)) - 16 * 64 * 10  # less the classifier
    assert counted == attention_macs(16, 64, groups, layers)


def test_count_macs_of_known_layers():
    conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    assert count_macs(conv, torch.randn(1, 3, 10, 10)) == 10 * 10 * 8 * 3 * 9
    conv.train()
    count_macs(conv, torch.randn(1, 3, 10, 10))
    assert conv.training


def test_overheads_by_convention():
    cost = overheads(1600, 100, 16, 1000)
    assert cost == {"published": 160.0, "per_image": 10.0, "streaming": 10.0}
    assert overheads(1600, None, 16, 1000)["streaming"] is None
    assert streaming_attention_macs(16, 64, 4, 1) == 6 * 64 * 64 // 4 + 2 * 16 * 64


@pytest.mark.parametrize(
    ("backbone_macs", "dim", "groups", "percent"), [(0.2348e9, 1280, 256, 0.10), (15.4e9, 1024, 1, 0.12)]
)
def test_one_more_image_costs_a_fraction_of_the_published_overhead(backbone_macs, dim, groups, percent):
    # MobileNetV3-L with ICIIA-T (1.62 % as published) and Swin-B with ICIIA-B (1.97 %), N = 3, 16 images
    assert round(100 * streaming_attention_macs(16, dim, groups, 3) / backbone_macs, 2) == percent
