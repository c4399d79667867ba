"""Arrays of one pass: features, logits and tokens, against passes of their own."""

import pytest
import torch

from iciia_exp.errors import ConfigError, UserError
from iciia_exp.models.backbones.timm_backbone import TimmBackbone
from iciia_exp.models.backbones.torchvision_backbone import TorchvisionBackbone
from iciia_exp.models.gather import stages
from tests.making.arrays import hooked_tokens

SMALL_VIT = {"depth": 2, "patch_size": 8, "embed_dim": 48, "num_heads": 2}


@pytest.mark.parametrize(
    ("model", "size", "options", "tokens"),
    [
        ("vit_tiny_patch16_224", 32, SMALL_VIT, 16 + 1),
        ("vit_small_patch14_reg4_dinov2", 56, {"depth": 2, "embed_dim": 48, "num_heads": 2}, 16 + 1 + 4),
        ("vit_medium_patch16_gap_240", 64, {"depth": 2, "embed_dim": 48, "num_heads": 2}, 16),  # mean of the patches
        ("vit_base_patch16_siglip_224", 64, {"depth": 2, "embed_dim": 48, "num_heads": 2}, 16),  # attention pooling
        ("beit_base_patch16_224", 64, {"depth": 2, "embed_dim": 48, "num_heads": 2}, 16 + 1),
        ("eva02_tiny_patch14_224", 56, {"depth": 2, "embed_dim": 48, "num_heads": 2}, 16 + 1),  # rotary positions
        ("vit_relpos_small_patch16_224", 64, {"depth": 2, "embed_dim": 48, "num_heads": 2}, 16),
    ],
)
@torch.no_grad()
def test_tokens_are_the_sum_of_all_levels_and_the_features_are_those_without(model, size, options, tokens):
    torch.manual_seed(0)
    backbone = TimmBackbone(3, model, size, options=options).eval()
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    calls = []
    hook = backbone.net.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    given = backbone.outputs(images, frozenset({"features", "logits", "tokens"}))
    hook.remove()
    assert len(calls) == 1
    assert given["tokens"].shape == (2, tokens, 48)
    torch.testing.assert_close(given["tokens"], hooked_tokens(backbone, images))
    torch.testing.assert_close(given["features"], backbone.features(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given["logits"], backbone(images), rtol=1e-5, atol=1e-5)
    assert backbone.output_shapes(images[0], frozenset({"logits", "tokens"})) == {
        "logits": (3,),
        "tokens": (tokens, 48),
    }


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: TorchvisionBackbone(3, "vit_b_32", image_size=32), 32),
        (
            lambda: TimmBackbone(3, "swin_tiny_patch4_window7_224", options={"embed_dim": 24, "depths": (1, 1, 1, 1)}),
            224,
        ),
    ],
)
@torch.no_grad()
def test_every_network_gives_features_and_logits_and_refuses_the_rest(make, size):
    backbone = make().eval()
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    given = backbone.outputs(images, frozenset({"features", "logits"}))
    assert list(given) == ["features", "logits"]
    assert torch.equal(given["features"], backbone.features(images))
    assert torch.equal(given["logits"], backbone.head(given["features"]))
    assert list(backbone.outputs(images, frozenset({"logits"}))) == ["logits"]
    name = type(backbone).__name__
    with pytest.raises(UserError, match=f"^{name} gives features, images and logits, not quality and tokens$"):
        backbone.outputs(images, frozenset({"features", "quality", "tokens"}))


@torch.no_grad()
def test_logits_are_those_of_the_features_in_mixed_precision():
    torch.manual_seed(0)
    backbone = TimmBackbone(3, "vit_tiny_patch16_224", 32, options=SMALL_VIT).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        given = backbone.outputs(images, frozenset({"features", "logits", "tokens"}))
        rounded = backbone.head(given["features"])
    want = backbone.head(given["features"].float())
    torch.testing.assert_close(given["logits"], want)
    assert not torch.allclose(rounded.float(), want, rtol=1e-4)
    torch.testing.assert_close(given["tokens"].float(), hooked_tokens(backbone, images), rtol=0.1, atol=0.1)


@torch.no_grad()
def test_levels_and_grid_of_the_tokens():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    whole = TimmBackbone(3, "vit_tiny_patch16_224", 32, options=SMALL_VIT).eval()

    def tokens(**gather):
        backbone = TimmBackbone(3, "vit_tiny_patch16_224", 32, options=SMALL_VIT, **gather).eval()
        backbone.load_state_dict(whole.state_dict())
        return backbone.outputs(images, frozenset({"tokens"}))["tokens"]

    each = [tokens(gather_first=level, gather_last=level) for level in range(3)]
    torch.testing.assert_close(tokens(), sum(each))
    torch.testing.assert_close(tokens(gather_last=1), each[0] + each[1])
    torch.testing.assert_close(tokens(gather_first=1), each[1] + each[2])
    assert torch.equal(each[0][0, 0], each[0][1, 0]), "the class token does not depend on the image yet"
    pooled = tokens(gather_grid=2)
    assert pooled.shape == (2, 5, 48)
    torch.testing.assert_close(pooled[:, 0], tokens()[:, 0])
    torch.testing.assert_close(pooled[:, 1], tokens()[:, [1, 2, 5, 6]].mean(1))
    for gather, message in (
        ({"gather_first": 3}, "gather_first=3: must be a whole number of 0 to 2 .the network has 2 blocks"),
        ({"gather_last": 9}, "gather_last=9: must be a whole number of 0 to 2"),
        ({"gather_first": 2, "gather_last": 1}, "gather_last=1: must be a whole number of 2 to 2"),
        ({"gather_grid": 5}, "gather_grid=5: must be a whole number of 1 to 4 .the network has 16 patches"),
    ):
        with pytest.raises(ConfigError, match=message):
            tokens(**gather)


@pytest.mark.parametrize(
    ("model", "size", "widths", "side"),
    [
        ("tf_efficientnet_lite0", 128, [16, 24, 40, 80, 112, 192, 320], 4),
        ("resnet10t", 64, [64, 128, 256, 512], 2),
        ("convnext_atto", 64, [40, 80, 160, 320], 2),
        ("mobilenetv3_small_050", 64, [8, 16, 24, 24, 48, 288], 2),
    ],
)
@torch.no_grad()
def test_tokens_of_a_convolutional_network_are_its_stages(model, size, widths, side):
    torch.manual_seed(0)
    backbone = TimmBackbone(3, model, size).eval()
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    outputs = {}
    for i, stage in enumerate(stages(backbone.net)):
        stage.register_forward_hook(lambda m, x, y, i=i: outputs.update({i: y}))
    given = backbone.outputs(images, frozenset({"features", "tokens", "levels"}))
    torch.testing.assert_close(given["features"], backbone.features(images), rtol=1e-5, atol=1e-5)
    assert [outputs[i].shape[1] for i in range(len(outputs))] == widths
    dim, n = max(widths), side**2
    assert given["levels"].shape == (2, len(widths), 1 + n, dim)
    torch.testing.assert_close(given["tokens"], given["levels"].sum(1))
    for i, (width, level) in enumerate(zip(widths, given["levels"].unbind(1), strict=True)):
        assert not level[:, :, width:].any()
        factor = outputs[i].shape[-1] // side
        place = outputs[i][:, :, :factor, :factor].mean((2, 3))  # the first patch
        torch.testing.assert_close(level[:, 1, :width], place, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(level[:, 0], level[:, 1:].mean(1))
    with pytest.raises(UserError, match="gives features, images, levels, logits and tokens, not block_input"):
        backbone.outputs(images, frozenset({"block_input"}))


@torch.no_grad()
def test_projected_stages_keep_their_lengths():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    pad = TimmBackbone(3, "resnet10t", 64).eval()
    project = TimmBackbone(3, "resnet10t", 64, gather_channels="project").eval()
    project.load_state_dict(pad.state_dict())
    one, other = (b.outputs(images, frozenset({"levels"}))["levels"] for b in (pad, project))
    torch.testing.assert_close(one[:, -1], other[:, -1])  # as wide as all
    torch.testing.assert_close(one.norm(dim=-1), other.norm(dim=-1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one[:, 0], other[:, 0], atol=1e-2)
    assert torch.equal(other, project.outputs(images, frozenset({"levels"}))["levels"])
    with pytest.raises(ConfigError, match="gather_channels=zeros: must be one of pad, project"):
        TimmBackbone(3, "resnet10t", 64, gather_channels="zeros")
    with pytest.raises(ConfigError, match="gather_last=4: must be a whole number of 0 to 3 .the network has 4 stages"):
        TimmBackbone(3, "resnet10t", 64, gather_last=4)


def test_stages_of_another_form_are_refused():
    backbone = TimmBackbone(3, "resnet10t", 64).eval()
    backbone.net.feature_info[-1]["num_chs"] = 2  # as of a network with its channels last
    with pytest.raises(
        UserError, match=r"ResNet: its stages give \[64, .*, and not channels x height x width; no tokens"
    ):
        backbone.outputs(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), frozenset({"tokens"}))
