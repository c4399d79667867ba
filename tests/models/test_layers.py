"""The grouped projection and the encoder layer against plain loops and PyTorch's own layers."""

import pytest
import torch
from torch import nn

from iciia_exp.models.grouped import GroupedLinear
from iciia_exp.models.layers import EncoderLayer


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(12, 12, 1), (12, 12, 3), (12, 36, 4), (8, 8, 8)])
def test_grouped_linear_equals_a_loop(inputs, outputs, groups, shuffle):
    layer = GroupedLinear(inputs, outputs, groups, shuffle)
    x = torch.randn(2, 9, inputs)
    i, o = inputs // groups, outputs // groups
    rows = []
    for row in x.reshape(-1, inputs):
        parts = [layer.blocks()[g] @ row[g * i : (g + 1) * i] for g in range(groups)]
        flat = [parts[g][j] for j in range(o) for g in range(groups)] if shuffle else list(torch.cat(parts))
        rows.append(torch.stack([v.reshape(()) for v in flat]) + layer.bias)
    torch.testing.assert_close(layer(x), torch.stack(rows).view(2, 9, outputs), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("groups", "joined"), [(2, 1), (16, 8), (32, 16), (96, 48)])
def test_joining_groups_changes_nothing(groups, joined, monkeypatch):
    layer = GroupedLinear(96, 192, groups)
    x = torch.randn(40, 96, requires_grad=True)
    assert layer.joined == joined
    together = layer(x)
    together.square().sum().backward()
    gradients = layer.weight.grad.clone(), x.grad.clone()
    monkeypatch.setattr("iciia_exp.models.grouped._JOINED_VECTORS", 1000)
    layer.zero_grad()
    x.grad = None
    alone = layer(x)
    alone.square().sum().backward()
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, (layer.weight.grad, x.grad), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("vectors", [40, 80])
def test_joined_weights_follow_the_weights(vectors):
    layer, x = GroupedLinear(96, 96, 16).requires_grad_(False), torch.randn(vectors, 96)
    with torch.no_grad():
        first = layer(x)
        assert layer._kept
        torch.testing.assert_close(layer(x), first)
        layer.weight.mul_(2.0)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (first - layer.bias))
        other = GroupedLinear(96, 96, 16)
        layer.load_state_dict(other.state_dict())
        torch.testing.assert_close(layer(x), other(x))
        layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
        torch.testing.assert_close(layer(x), layer.bias.expand(vectors, 96))
    layer.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), layer.bias.expand(vectors, 96))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(96, 96, 2), (96, 288, 16), (96, 96, 96), (40, 40, 8)])
def test_a_convolution_does_the_same(inputs, outputs, groups, shuffle, monkeypatch):
    monkeypatch.setattr("iciia_exp.models.grouped._CONVOLVE", True)  # also where it would be slow
    monkeypatch.setattr("iciia_exp.models.grouped._CONVOLVED_INPUTS", 1)
    layer = GroupedLinear(inputs, outputs, groups, shuffle)
    x = torch.randn(5, 16, inputs)
    product = layer(x).detach()  # its gradient is recorded
    layer.requires_grad_(False)
    with torch.inference_mode():
        convolved = layer(x)
        assert set(layer._kept) == {"kernels"}
        torch.testing.assert_close(convolved, product, atol=1e-5, rtol=1e-5)
        monkeypatch.setattr("iciia_exp.models.grouped._CONVOLVED_VECTORS", 81)
        torch.testing.assert_close(layer(x), product, atol=1e-6, rtol=1e-6)
        monkeypatch.setattr("iciia_exp.models.grouped._CONVOLVED_VECTORS", 80)
    with torch.no_grad():
        layer.bias.add_(1.0)
        torch.testing.assert_close(layer(x), product + 1, atol=1e-5, rtol=1e-5)
        layer.weight.zero_()
        torch.testing.assert_close(layer(x), layer.bias.expand_as(product))


@pytest.mark.parametrize(("inputs", "form"), [(7, "matrices"), (8, "kernels")])
def test_narrow_groups_stay_products_where_a_convolution_is_slower(inputs, form, monkeypatch):
    monkeypatch.setattr("iciia_exp.models.grouped._CONVOLVE", True)
    monkeypatch.setattr("iciia_exp.models.grouped._CONVOLVED_INPUTS", 8)
    layer = GroupedLinear(8 * inputs, 8 * inputs, 8).requires_grad_(False)
    with torch.inference_mode():
        layer(torch.randn(64, 8 * inputs))
    assert set(layer._kept) == {form}


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
@pytest.mark.parametrize(("groups", "vectors"), [(2, 100), (8, 100), (8, 20)])
def test_answers_follow_every_step_of_an_optimiser(groups, vectors, options):
    layer, x = GroupedLinear(64, 64, groups), torch.randn(vectors, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
    for _ in range(3):
        layer(x).square().sum().backward()
        optimizer.step()
        with torch.inference_mode():  # an epoch's validation
            own = layer(x)
            fresh = GroupedLinear(64, 64, groups)
            fresh.load_state_dict(layer.state_dict())
            torch.testing.assert_close(own, fresh(x))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vectors", [64, 83, 256, 261])  # 83 and 261 are filled up to whole images
@pytest.mark.parametrize(
    ("inputs", "groups", "square"), [(32, 8, True), (40, 8, False), (24, 8, False), (64, 64, True), (96, 2, False)]
)
def test_any_number_of_vectors_is_convolved(vectors, inputs, groups, square, threads, monkeypatch):
    monkeypatch.setattr("iciia_exp.models.grouped._CONVOLVE", True)
    monkeypatch.setattr("iciia_exp.models.grouped._CONVOLVED_INPUTS", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)  # what the layout goes by
    layer, x = GroupedLinear(inputs, inputs, groups).requires_grad_(False), torch.randn(vectors, inputs)
    assert (layer._kernels()[0].shape[1] == 16) is square
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), torch.cat([layer(row[None]) for row in x]), atol=1e-6, rtol=1e-5)
        assert set(layer._kept) == {"kernels"}


def test_one_group_is_a_linear_layer():
    layer, plain = GroupedLinear(6, 4), nn.Linear(6, 4)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), plain(x))


def test_one_group_is_pytorch_s_encoder_layer():
    ours = EncoderLayer(16, 4, 1).eval()
    theirs = nn.TransformerEncoderLayer(16, 4, 16, batch_first=True).eval()
    names = {
        "attention.qkv.weight": "self_attn.in_proj_weight",
        "attention.qkv.bias": "self_attn.in_proj_bias",
        "attention.out.weight": "self_attn.out_proj.weight",
        "attention.out.bias": "self_attn.out_proj.bias",
    }
    theirs.load_state_dict({names.get(n, n): t for n, t in ours.state_dict().items()})
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_groups_must_divide():
    with pytest.raises(ValueError, match="groups=5"):
        GroupedLinear(12, 12, 5)


def test_initialisation_is_per_group():
    layer = GroupedLinear(64, 64, 16)
    bound = (1 / 4) ** 0.5  # kaiming-uniform(sqrt 5): 1 / sqrt(fan in of a group)
    assert 0.9 * bound < layer.weight.abs().max() <= bound
    assert layer.bias.abs().max() <= bound
    layer.reset_attention_parameters()
    assert layer.weight.abs().max() <= (6 / 8) ** 0.5
    assert (layer.bias == 0).all()
