"""Every backbone against the library's own network and its own evaluation transform, with random weights."""

import re
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from hydra.utils import instantiate
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torch import nn
from torchvision import models

from iciia_exp.config.paths import CONF_DIR
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.models.backbones.base import BackboneSpec
from iciia_exp.models.backbones.c3d import C3D
from iciia_exp.models.backbones.leaf_cnn import LeafCNN
from iciia_exp.models.backbones.timm_backbone import TimmBackbone
from iciia_exp.models.backbones.torchvision_backbone import TorchvisionBackbone

FILES = sorted(
    f for f in (CONF_DIR / "backbone").glob("*.yaml") if "\nmodel:\n" in f.read_text("utf-8")
)  # else composed
LIBRARIES = {"TimmBackbone", "TorchvisionBackbone"}

#: What makes a configured network cheap enough to build here.
SMALLER = {"TimmBackbone": {"image_size": 32}, "TorchvisionBackbone": {"image_size": 32}, "C3D": {"channels": 4}}


def kind_of(path):
    return yaml.safe_load(path.read_text())["model"]["_target_"].rsplit(".", 1)[-1]


LIBRARY_FILES = [f for f in FILES if kind_of(f) in LIBRARIES]
#: of two networks; they have tests of their own
PAIRS = ("paired", "scene_pair", "diffusers_pair")
OWN_FILES = [f for f in FILES if kind_of(f) not in LIBRARIES and f.stem not in PAIRS]


def named(files):
    return pytest.mark.parametrize("path", files, ids=[f.stem for f in files])


def build(path, classes, **arguments):
    """Build a configured network, small, with fresh weights; return it and D as configured."""
    node = yaml.safe_load(path.read_text())
    for key in ("defaults", "recipe"):  # its optimiser is composed
        node.pop(key, None)
    node["train"] = "head"
    node["model"] |= SMALLER.get(kind_of(path), {})
    node["name"] = path.stem
    backbone = instantiate(node).fresh(classes, **arguments).eval()
    return backbone, node.get("dim", node["model"].get("dim"))


def picture(width=50, height=37, mode="RGB"):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def original_state(backbone):
    """Return a network's weights under the names of the original network."""
    state = {}
    for key, value in backbone.state_dict().items():
        name = key.removeprefix("net.")
        state[f"{backbone.head_name}.{key.removeprefix('head.')}" if key.startswith("head.") else name] = value.clone()
    return state


def library_model(backbone, **options):
    """Return the library's own network with the same weights; strictly, so every name must be the original's."""
    make = timm.create_model if isinstance(backbone, TimmBackbone) else models.get_model
    with torch.device("meta"):  # no time for weights that are replaced
        network = make(backbone.model, num_classes=backbone.num_classes, **options)
    network.load_state_dict(original_state(backbone), assign=True)
    return network.eval()


def plain_normalised(backbone, images):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.mean, backbone.std))
    return (images / 255 - mean) / std


def relative_difference(got, want):
    assert want.abs().max() > 0
    return float((got - want).abs().max() / want.abs().max())


@torch.no_grad()
def check_against_library(backbone, **options):
    """Head of features equals the library's logits, before and after the weights travel under their original names."""
    images = torch.stack([backbone.transform(picture())])
    assert images.dtype == torch.uint8
    library = library_model(backbone, **options)
    want = library(plain_normalised(backbone, images))
    features = backbone.features(images)
    assert features.shape == (1, backbone.dim)
    assert want.shape == (1, backbone.num_classes)
    assert relative_difference(backbone.head(features), want) < 1e-4
    for tensor in (*backbone.parameters(), *backbone.buffers()):
        tensor.zero_()
    backbone.load_original(library.state_dict())
    assert relative_difference(backbone(images), want) < 1e-4


def test_all_files_are_seen():
    assert len(FILES) == 20
    assert len(LIBRARY_FILES) == 10
    assert {f.stem for f in OWN_FILES} == {
        "c3d",
        "leaf_cnn",
        "small_cnn",
        "small_vit",
        "precomputed",
        "recommender",
        "vgg",
    }


@pytest.mark.slow
@named(LIBRARY_FILES)
def test_configured_backbone_is_the_library_s_network(path):
    torch.manual_seed(0)
    backbone, dim = build(path, 7)
    assert backbone.num_classes == 7
    assert dim in (None, backbone.dim)
    check_against_library(backbone)


EXAMPLES = {
    "c3d": lambda rng: rng.integers(0, 256, (16, 30, 40, 3), dtype=np.uint8),
    "leaf_cnn": lambda rng: rng.random((1, 28, 28), dtype=np.float32),
    "small_cnn": lambda rng: rng.random((1, 8, 8), dtype=np.float32),
    "small_vit": lambda rng: rng.random((1, 8, 8), dtype=np.float32),
    "vgg": lambda rng: rng.random((1, 28, 28), dtype=np.float32),
    "precomputed": lambda rng: rng.random(24, dtype=np.float32),
    "recommender": lambda rng: rng.integers(0, 5, 8, dtype=np.int32),
}
MORE = {"precomputed": {"dim": 24}, "recommender": {"users": 5, "items": 6, "item_categories": [[0]] * 6}}


@named(OWN_FILES)
@torch.no_grad()
def test_our_own_networks(path):
    torch.manual_seed(0)
    arguments, classes = MORE.get(path.stem, {}), 2 if path.stem == "recommender" else 7
    (backbone, dim), (other, _) = build(path, classes, **arguments), build(path, classes, **arguments)
    assert backbone.num_classes == classes
    assert backbone.dim == {"precomputed": 24, "recommender": 82, "vgg": 96}.get(path.stem, dim)
    images = torch.stack([backbone.transform(EXAMPLES[path.stem](np.random.default_rng(0)))])
    logits = backbone(images)
    assert logits.shape == (1, classes)
    torch.testing.assert_close(backbone.head(backbone.features(images)), logits)
    other.load_original(original_state(backbone))
    torch.testing.assert_close(other(images), logits)


def test_c3d_has_the_names_of_the_usual_files():
    state = original_state(C3D(7, channels=4))
    convolutions = ("conv1", "conv2", "conv3a", "conv3b", "conv4a", "conv4b", "conv5a", "conv5b")
    layers = (*convolutions, "fc6", "fc7", "fc8")
    assert set(state) == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


@torch.no_grad()
def test_c3d_is_a_plain_stack_of_layers():
    """The poolings and the order of fc6's inputs, written out once more."""
    torch.manual_seed(0)
    model = C3D(7, channels=2).eval()
    clip = torch.randint(0, 256, (1, 3, 16, 112, 112), dtype=torch.uint8)
    x = clip.float() - torch.tensor([101.4, 97.7, 90.2]).view(1, 3, 1, 1, 1)
    net = model.net
    x = nn.functional.max_pool3d(net.conv1(x).relu(), (1, 2, 2), (1, 2, 2))
    x = nn.functional.max_pool3d(net.conv2(x).relu(), 2, 2)
    x = nn.functional.max_pool3d(net.conv3b(net.conv3a(x).relu()).relu(), 2, 2)
    x = nn.functional.max_pool3d(net.conv4b(net.conv4a(x).relu()).relu(), 2, 2)
    x = nn.functional.max_pool3d(net.conv5b(net.conv5a(x).relu()).relu(), 2, 2, padding=(0, 1, 1))
    want = net.fc7(net.fc6(x.reshape(1, -1)).relu()).relu()
    torch.testing.assert_close(model.features(clip), want)


def test_c3d_clips_are_resized_and_cropped():
    model = C3D(7, channels=2)
    clip = np.zeros((16, 64, 80, 3), dtype=np.uint8)
    clip[..., 1] = 200
    x = model.transform(clip)
    assert (x.shape, x.dtype) == ((3, 16, 112, 112), torch.uint8)
    assert (x[1] == 200).all()
    assert (x[[0, 2]] == 0).all()
    for wrong in (clip[:8], clip[0]):
        with pytest.raises(UserError, match="16 frames"):
            model.transform(wrong)
    with pytest.raises(ConfigError, match="frames=8"):
        C3D(7, frames=8)


def test_leaf_cnn_subtracts_its_mean():
    image = np.full((1, 28, 28), 0.75, dtype=np.float32)
    assert (LeafCNN(62).transform(image) == 0.25).all()


# ---- transforms


@pytest.mark.parametrize(
    ("model", "weights"),
    [("resnet18", None), ("mobilenet_v3_large", "IMAGENET1K_V2"), ("swin_t", None), ("efficientnet_b0", None)],
)
def test_torchvision_pixels_are_the_library_s(model, weights):
    backbone = TorchvisionBackbone(5, model, weights)
    enum = models.get_model_weights(model)
    theirs = (enum[weights] if weights else enum.DEFAULT).transforms()
    for image in (picture(311, 197), picture(120, 300)):
        ours = backbone.normalise(backbone.transform(image)[None])[0]
        torch.testing.assert_close(ours, theirs(image), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", ["mobilenetv2_100.ra_in1k", "tf_efficientnet_b0.aa_in1k", "test_vit.r160_in1k"])
def test_timm_pixels_are_the_library_s(model):
    backbone = TimmBackbone(5, model)
    theirs = create_transform(**resolve_data_config(model=timm.create_model(model)), is_training=False)
    for image in (picture(311, 197), picture(120, 300)):
        ours = backbone.normalise(backbone.transform(image)[None])[0]
        torch.testing.assert_close(ours, theirs(image), atol=1e-5, rtol=0)


def test_timm_pixels_can_be_configured():
    settings = {"crop_pct": 0.75, "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    backbone = TimmBackbone(5, "resnet10t", 48, **settings)
    said = backbone.describe_transform()
    assert said["input_size"] == [3, 48, 48]
    assert {k: said[k] for k in settings} == settings
    theirs = create_transform((3, 48, 48), interpolation=said["interpolation"], **settings)
    for image in (picture(100, 60), picture(30, 40)):
        ours = backbone.normalise(backbone.transform(image)[None])[0]
        torch.testing.assert_close(ours, theirs(image), atol=1e-5, rtol=0)


def test_torchvision_resizes_in_proportion_to_the_crop():
    backbone = TorchvisionBackbone(5, "resnet18", image_size=112)  # the weights' own: 256, then 224
    assert (backbone.resize_size, backbone.crop_size) == (128, 112)
    assert backbone.transform(picture(300, 200)).shape == (3, 112, 112)
    assert backbone.describe_transform() == {
        "resize_size": 128,
        "crop_size": 112,
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }


@pytest.mark.parametrize(
    "make", [lambda: TorchvisionBackbone(5, "resnet18", image_size=32), lambda: TimmBackbone(5, "resnet10t", 32)]
)
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_other_modes_are_made_rgb(make, mode):
    backbone, image = make(), picture(mode=mode)
    x = backbone.transform(image)
    assert (x.shape, x.dtype) == ((3, 32, 32), torch.uint8)
    torch.testing.assert_close(x, backbone.transform(image.convert("RGB")))
    if mode == "L":
        assert (x[0] == x[1]).all()


def test_normalising_leaves_the_images_as_they_are():
    backbone = TorchvisionBackbone(5, "resnet18", image_size=32)
    images = backbone.transform(picture())[None]
    before = images.clone()
    assert backbone.normalise(images).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


# ---- any model of the libraries


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("resnet10t", 32),
        ("convnextv2_atto", 32),
        ("vit_tiny_patch16_224", 32),  # refuses other sizes unless told
        ("test_vit", None),
        ("regnety_002", 32),
        ("densenet121", 32),
        ("xcit_nano_12_p16_224", 32),
    ],
)
def test_any_timm_model(model, size):
    torch.manual_seed(0)
    backbone = TimmBackbone(3, model, size)
    images = backbone.transform(picture())[None]
    options = {"img_size": size} if model.startswith("vit") else {}
    library = timm.create_model(model, num_classes=3, **options).eval()
    library.load_state_dict(original_state(backbone))
    with torch.no_grad():
        want = library(plain_normalised(backbone, images))
        assert relative_difference(backbone.eval()(images), want) < 1e-4


@pytest.mark.parametrize("model", ["resnet18", "densenet121", "mnasnet0_5", "shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_any_torchvision_model(model):
    torch.manual_seed(0)
    backbone = TorchvisionBackbone(3, model, image_size=32)
    images = backbone.transform(picture())[None]
    library = models.get_model(model, num_classes=3).eval()
    strangers = library.state_dict()
    for key, value in original_state(backbone).items():
        strangers[key].copy_(value)
    with torch.no_grad():
        want = library(plain_normalised(backbone, images))
        assert relative_difference(backbone.eval()(images), want) < 1e-4
        nn.init.zeros_(backbone.head.weight)
        backbone.load_original(strangers)
        assert relative_difference(backbone(images), want) < 1e-4


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"in_chans": 1}, "expected input.* to have 1 channels"),
        ({"features_only": True}, "the network has no classifier"),
        ({"global_pool": ""}, "a picture becomes"),
        ({"nope": 3}, "nope"),
    ],
)
def test_options_that_do_not_fit_are_said_at_once(options, problem):
    with pytest.raises(ConfigError, match=rf"^options=.*: do not fit here \(.*{problem}"):
        TimmBackbone(3, "resnet18", 32, options=options)


def test_options_of_torchvision_that_do_not_fit_are_said_at_once():
    with pytest.raises(ConfigError, match=r"^options=.*: do not fit here"):
        TorchvisionBackbone(3, "resnet18", image_size=32, options={"nope": 3})


def test_options_reach_the_library():
    assert (
        TimmBackbone(3, "mobilenetv2_100", 32, options={"pad_type": "same"}).net.conv_stem.__class__.__name__
        == "Conv2dSame"
    )
    vit = {"num_layers": 1, "hidden_dim": 24, "mlp_dim": 24, "num_heads": 2}
    with pytest.raises(ConfigError, match="options=.*num_layers"):  # the builder's own
        TorchvisionBackbone(3, "vit_b_32", image_size=32, options=vit)
    for make in (TimmBackbone, TorchvisionBackbone):
        with pytest.raises(ConfigError, match="options=.*colour"):
            make(3, "resnet18", options={"colour": "red"})


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_a_torchvision_classifier_without_a_bias():
    backbone = TorchvisionBackbone(3, "maxvit_t")
    assert (backbone.head.bias == 0).all()
    state = original_state(backbone)
    del state["classifier.5.bias"]
    nn.init.ones_(backbone.head.bias)
    backbone.load_original(state)
    assert (backbone.head.bias == 0).all()
    backbone.keep_classes([2, 0])
    torch.testing.assert_close(backbone.head.weight, state["classifier.5.weight"][[2, 0]])


@pytest.mark.filterwarnings("ignore::UserWarning:timm")
@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_weights_of_another_input_size_are_converted_as_by_timm(model, tmp_path):
    options = {"depths": (1, 1, 1, 1)} if "swin" in model else {"depth": 2}
    source = timm.create_model(model, num_classes=3, **options)
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 3}}
    library = timm.create_model(model, num_classes=3, img_size=128, **overlay, **options).eval()
    backbone = TimmBackbone(3, model, 128, options=options).eval()
    backbone.load_original(source.state_dict())
    images = backbone.transform(picture())[None]
    with torch.no_grad():
        want = library(plain_normalised(backbone, images))
        assert relative_difference(backbone(images), want) < 1e-4
    wrong = source.state_dict() | {"patch_embed.proj.weight": torch.zeros(5, 3, 4, 4)}
    with pytest.raises(RuntimeError, match="other sizes"):
        backbone.load_original(wrong)


def test_a_torchvision_transformer_is_built_for_its_size():
    backbone = TorchvisionBackbone(3, "vit_b_32", image_size=64)
    with torch.no_grad():
        assert backbone.eval()(backbone.transform(picture())[None]).shape == (1, 3)


@pytest.mark.parametrize(
    ("make", "model"),
    [
        (TorchvisionBackbone, "squeezenet1_0"),  # a convolution
        (TorchvisionBackbone, "inception_v3"),  # one more for training
        (TimmBackbone, "deit_tiny_distilled_patch16_224"),  # two
        (TimmBackbone, "resnetv2_50"),  # a convolution
        (TimmBackbone, "shvit_s1"),  # a batch norm in front of it, which goes with it
    ],
)
def test_other_classifiers_are_refused(make, model):
    with pytest.raises(ConfigError, match=f"model={model}: .*classifier"):
        make(3, model)


@pytest.mark.parametrize(
    ("make", "model", "hint"),
    [
        (TorchvisionBackbone, "resnet_18", "torchvision has no such model; did you mean resnet18?"),
        (TimmBackbone, "resnet18d1", "timm has no such model; did you mean resnet18d?"),
        (TimmBackbone, "resnet18.a1_in1kk", "timm has no weights of that tag; did you mean resnet18.a1_in1k?"),
        (TimmBackbone, "qqqqqqqqq", "timm has no such model"),
    ],
)
def test_misspelt_models(make, model, hint):
    with pytest.raises(ConfigError) as error:
        make(3, model)
    assert str(error.value) == f"model={model}: {hint}"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"image_size": 4}, "image_size=4"),
        ({"crop_pct": 0.0}, "crop_pct=0.0"),
        ({"mean": [0.5]}, "mean=.*three numbers"),
        ({"std": [0.5, 0.5, 0]}, "std=.*three numbers above 0"),
    ],
)
def test_bad_arguments_of_timm(arguments, problem):
    with pytest.raises(ConfigError, match=problem):
        TimmBackbone(3, "resnet10t", **arguments)


def test_bad_arguments_of_torchvision():
    with pytest.raises(ConfigError, match="weights_name=IMAGENET1K_V3: .* did you mean IMAGENET1K_V"):
        TorchvisionBackbone(3, "resnet18", "IMAGENET1K_V3")
    with pytest.raises(ConfigError, match="image_size=4"):
        TorchvisionBackbone(3, "resnet18", image_size=4)
    with pytest.raises(ConfigError, match="image_size=64: .*divisible"):
        TorchvisionBackbone(3, "maxvit_t", image_size=64)


def test_weights_in_the_library_s_cache(tmp_path, monkeypatch):
    """DenseNet's file has names of an older version, which only torchvision's builder knows."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    network = models.densenet121()
    weights = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    old = {re.sub(r"(denselayer.*\.(norm|conv))([12])\.", r"\1.\3.", k): v for k, v in weights.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    file = tmp_path / "hub" / "checkpoints" / Path(models.DenseNet121_Weights.IMAGENET1K_V1.url).name
    file.parent.mkdir(parents=True)
    torch.save(old, file)
    backbone = TorchvisionBackbone(1000, "densenet121", image_size=32)
    backbone.load_original(backbone.pretrained_state())
    got = original_state(backbone)
    for key, value in weights.items():
        torch.testing.assert_close(got[key], value)


@torch.no_grad()
def test_the_features_do_not_depend_on_the_rest_of_the_batch():
    backbone = TorchvisionBackbone(3, "mobilenet_v3_small", image_size=32).eval()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(backbone.features(images)[1:2], backbone.features(images[1:2]), atol=1e-5, rtol=1e-4)


def test_the_cost_is_the_library_s():
    """224 px, classifier included: MobileNetV2 is published with 300 million multiply-accumulates."""
    backbone = TimmBackbone(1000, "mobilenetv2_100")
    assert backbone.macs(backbone.transform(picture())) == pytest.approx(300e6, rel=0.01)


@torch.no_grad()
def test_timm_models_of_the_hub_and_of_folders(tmp_path, monkeypatch):
    constants, revision = huggingface_hub.constants, "a" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--user--net"
    files = repository / "snapshots" / revision
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    model = timm.create_model("test_efficientnet", num_classes=7).eval()
    save_for_hf(model, str(files), safe_serialization=True)
    images = torch.rand(2, 3, 160, 160)
    for name in ("hf_hub:user/net", "hf-hub:user/net", f"local-dir:{files}"):
        backbone = BackboneSpec("timm", partial(TimmBackbone, model=name), "none", True).initial(list("abcdefg"))
        backbone.eval()
        want = model(backbone.normalise(images))
        torch.testing.assert_close(backbone.head(backbone.features(images)), want, atol=1e-5, rtol=1e-4)
    for name in ("hf_hub:user/other", f"local-dir:{tmp_path}"):
        with pytest.raises(ConfigError, match=rf"^model={name}: cannot be loaded \("):
            TimmBackbone(7, name)


def test_networks_without_weights_say_so():
    with pytest.raises(ConfigError, match="LeafCNN has no pre-trained weights; give weights=FILE"):
        LeafCNN(3).pretrained_state()
    with pytest.raises(ConfigError, match="timm has no weights for it"):
        TimmBackbone(3, "efficientnet_b0_g8_gn", 32).pretrained_state()
