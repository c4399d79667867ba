"""Arrays of one pass: features, logits and tokens, against passes of their own."""

import pytest
import torch

from iciia_exp.errors import UserError
from iciia_exp.models.backbones.timm_backbone import TimmBackbone
from iciia_exp.models.backbones.torchvision_backbone import TorchvisionBackbone
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
def test_tokens_are_the_sum_of_the_blocks_and_the_features_are_those_without(model, size, options, tokens):
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
        (lambda: TimmBackbone(3, "resnet10t", 32), 32),
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
    with pytest.raises(UserError, match=f"^{name} gives features and logits, not quality and tokens$"):
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
