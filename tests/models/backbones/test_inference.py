"""Folding batch norm changes no feature, and is taken back where it would."""

import copy

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from iciia_exp.models.backbones.inference import faster
from iciia_exp.models.backbones.torchvision_backbone import TorchvisionBackbone

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def used(net):
    """Give every norm statistics and weights that a trained network could have; folding is then not trivial."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, NORMS):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return net.eval().requires_grad_(False)


def norms(net):
    return [m for m in net.modules() if isinstance(m, NORMS)]


def check(net, x, done):
    """Apply `faster` and compare; return the difference relative to the largest feature."""
    want = net(x)
    assert faster(net, x[:1]) == done
    got = net(x)
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.resnet18(num_classes=10),
        lambda: models.mobilenet_v3_small(num_classes=10),
        lambda: models.efficientnet_b0(num_classes=10),
        lambda: timm.create_model("test_efficientnet", num_classes=0),
        lambda: timm.create_model("efficientnet_b0", num_classes=0),
        lambda: timm.create_model("mobilenetv2_100", num_classes=0, pad_type="same"),
        lambda: timm.create_model("resnet10t", num_classes=0),
    ],
    ids=[
        "resnet18",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "timm-small",
        "timm-b0",
        "timm-same-padding",
        "timm-resnet",
    ],
)
def test_every_norm_is_folded_and_no_feature_changes(make):
    net = used(make())
    assert norms(net)
    assert check(net, torch.randn(3, 3, 64, 64), ["batch norm folded", "channels last"]) < 1e-4
    assert not norms(net)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)


def test_folded_twice_is_folded_once():
    net = used(models.resnet18(num_classes=10))
    x = torch.randn(2, 3, 64, 64)
    check(net, x, ["batch norm folded", "channels last"])
    assert check(net, x, ["channels last"]) < 1e-6


class Net(nn.Module):
    """conv, norm, and what a subclass does with them; then a mean over pixels."""

    def __init__(self, conv=nn.Conv2d, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm = conv(3, 8, 3, bias=False), norm(8)

    def forward(self, x):
        return self.mix(x).flatten(2).mean(-1)

    def mix(self, x):
        return self.norm(self.conv(x)).relu()


class UsesTwice(Net):
    def mix(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class TwoNorms(Net):
    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(8)

    def mix(self, x):
        y = self.conv(x)
        return self.norm(y).relu() + self.other(y)


class ChangesBetween(Net):
    def mix(self, x):
        return self.norm(self.conv(x).relu_())


class RunsTwice(Net):
    def mix(self, x):
        return self.norm(self.conv(x)) + self.norm(self.conv(-x))


class NormRunsElsewhereToo(Net):
    def __init__(self):
        super().__init__()
        self.second = nn.Conv2d(8, 8, 1)

    def mix(self, x):
        return self.norm(self.second(self.norm(self.conv(x)).relu()))


@torch.no_grad()
@pytest.mark.parametrize("kind", [UsesTwice, TwoNorms, ChangesBetween, RunsTwice, NormRunsElsewhereToo])
def test_where_folding_would_change_features_nothing_is_folded(kind):
    net = used(kind())
    before = copy.deepcopy(net)
    x = torch.randn(2, 3, 12, 12)
    assert check(net, x, ["channels last"]) < 1e-6
    assert set(net.state_dict()) == set(before.state_dict())
    for key, value in before.state_dict().items():
        assert torch.equal(net.state_dict()[key], value)
    assert [type(m) for m in net.modules()] == [type(m) for m in before.modules()]


class TwoPlaces(Net):
    """The same norm under two names, run once."""

    def __init__(self):
        super().__init__()
        self.alias = nn.Sequential(self.norm)


class TwoPlacesUsedTwice(TwoPlaces):
    def mix(self, x):
        y = self.conv(x)
        return self.norm(y) + y


@torch.no_grad()
def test_a_norm_with_two_names_is_folded_once():
    net = used(TwoPlaces())
    assert check(net, torch.randn(2, 3, 12, 12), ["batch norm folded", "channels last"]) < 1e-5
    assert not norms(net)


@torch.no_grad()
def test_all_steps_are_taken_back():
    net = used(TwoPlacesUsedTwice())
    weight = net.conv.weight.clone()
    assert check(net, torch.randn(2, 3, 12, 12), ["channels last"]) < 1e-6
    assert torch.equal(net.conv.weight, weight)
    assert net.conv.bias is None
    assert net.norm is net.alias[0]


@torch.no_grad()
def test_a_bias_of_the_convolution_is_kept():
    net = used(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    nn.init.normal_(net[0].bias)
    assert check(net, torch.randn(2, 3, 12, 12), ["batch norm folded", "channels last"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_norms_of_other_kinds(options):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **options), nn.Flatten()).eval()
    x = torch.randn(1, 3, 12, 12)
    want = net(x)
    done = faster(net, x)
    assert done == (["batch norm folded"] if "affine" in options else []) + ["channels last"]
    torch.testing.assert_close(net(x), want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_network_without_batch_norm_keeps_its_weights():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten()).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert check(net, torch.randn(2, 3, 12, 12), ["channels last"]) < 1e-5
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@torch.no_grad()
def test_three_dimensional_convolutions():
    net = used(Net(nn.Conv3d, nn.BatchNorm3d))
    assert check(net, torch.randn(2, 3, 6, 12, 12), ["batch norm folded"]) < 1e-5
    assert not norms(net)


@torch.no_grad()
def test_no_hook_stays_behind():
    net = used(Net())
    faster(net, torch.randn(1, 3, 12, 12))
    assert not any(m._forward_hooks for m in net.modules())


@torch.no_grad()
def test_a_backbone_is_made_faster_as_a_whole():
    backbone = TorchvisionBackbone(5, "mobilenet_v3_small", image_size=32)
    used(backbone)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    want, head = backbone(images), backbone.head.weight.clone()
    assert backbone.faster(images[0]) == ["batch norm folded", "channels last"]
    torch.testing.assert_close(backbone(images), want, atol=1e-4, rtol=1e-4)
    assert torch.equal(backbone.head.weight, head)
