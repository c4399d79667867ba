"""The network that a configuration starts from: fresh, with weights of a file, or with the rows of some classes."""

import tarfile
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from iciia_exp.errors import ConfigError, UserError
from iciia_exp.models.backbones.base import BackboneSpec
from iciia_exp.models.backbones.precomputed import Precomputed
from iciia_exp.models.backbones.small_cnn import SmallCNN
from iciia_exp.models.backbones.timm_backbone import TimmBackbone
from iciia_exp.recipe import Recipe

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"

SMALL = partial(SmallCNN, width=2, dim=6)
NAMES = ["cat", "dog", "emu", "fox"]


@pytest.fixture
def trained(tmp_path):
    """A network of four classes and its file."""
    torch.manual_seed(1)
    network = SMALL(num_classes=4).eval()
    save_file(network.state_dict(), tmp_path / "small.safetensors")
    return network, str(tmp_path / "small.safetensors")


IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_part_of_the_classes_keeps_its_rows(trained, classes):
    network, file = trained
    want = network(IMAGES)
    spec = BackboneSpec("s", SMALL, weights=file, classes=classes)
    for names, rows in ((NAMES, [0, 1, 2, 3]), (["fox", "cat"], [3, 0]), (["emu"], [2])):
        backbone = spec.initial(names).eval()
        assert backbone.num_classes == len(names)
        torch.testing.assert_close(backbone(IMAGES), want[:, rows])


@torch.no_grad()
@pytest.mark.parametrize("train", ["none", "head", "all"])
def test_as_many_classes_keep_the_classifier(trained, train):
    network, file = trained
    backbone = BackboneSpec("s", SMALL, train, weights=file, recipe=Recipe()).initial(["w", "x", "y", "z"]).eval()
    torch.testing.assert_close(backbone(IMAGES), network(IMAGES))


@torch.no_grad()
@pytest.mark.parametrize("train", ["head", "all"])
@pytest.mark.parametrize("known", [False, True])
def test_other_classes_get_a_fresh_classifier_on_the_same_trunk(trained, classes, train, known):
    network, file = trained
    spec = BackboneSpec("s", SMALL, train, weights=file, classes=classes if known else None, recipe=Recipe())
    backbone = spec.initial(["gnu", "hen", "ibex", "jay", "koi"]).eval()
    assert backbone.num_classes == 5
    torch.testing.assert_close(backbone.features(IMAGES), network.features(IMAGES))
    assert backbone(IMAGES).shape == (3, 5)


@torch.no_grad()
def test_a_fresh_classifier_follows_the_seed(trained):
    _, file = trained
    spec = BackboneSpec("s", SMALL, "head", weights=file)
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(spec.initial(["a", "b"]).head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_nothing_trained_and_other_classes(trained):
    _, file = trained
    with pytest.raises(ConfigError, match="classes=null: the weights know 4 classes, the dataset has 2"):
        BackboneSpec("s", SMALL, weights=file).initial(["a", "b"])


def test_without_weights_the_network_is_fresh():
    spec = BackboneSpec("s", SMALL, "all", recipe=Recipe())
    assert not spec.started
    assert spec.initial(["a", "b"]).num_classes == 2


@torch.no_grad()
def test_half_precision_becomes_single(trained, tmp_path):
    network, _ = trained
    save_file({k: v.half() for k, v in network.state_dict().items()}, tmp_path / "half.safetensors")
    backbone = BackboneSpec("s", SMALL, weights=str(tmp_path / "half.safetensors")).initial(NAMES).eval()
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    torch.testing.assert_close(backbone(IMAGES), network(IMAGES), atol=1e-2, rtol=1e-2)


@torch.no_grad()
def test_a_classifier_without_a_bias_has_none(trained, tmp_path):
    network, _ = trained
    save_file({k: v for k, v in network.state_dict().items() if k != "head.bias"}, tmp_path / "w.safetensors")
    backbone = BackboneSpec("s", SMALL, weights=str(tmp_path / "w.safetensors")).initial(NAMES).eval()
    torch.testing.assert_close(backbone(IMAGES), network(IMAGES) - network.head.bias)


def without(state, name):
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda s: {"fc.weight": s["head.weight"]},
            "has no classifier head.weight of backbone s; use backbone.train=head to fit one on the dataset",
        ),
        (lambda s: without(s, "trunk.0.weight"), "does not fit backbone s: has no trunk.0.weight (1 keys)"),
        (lambda s: s | {"extra": torch.ones(1)}, "does not fit backbone s: has unknown extra (1 keys)"),
        (
            lambda s: s | {"trunk.0.weight": torch.ones(3, 1, 3, 3)},
            "does not fit backbone s: has other sizes, first trunk.0.weight [3, 1, 3, 3] not [2, 1, 3, 3] (1 keys)",
        ),
        (
            lambda s: s | {"head.weight": torch.ones(4, 7)},
            "does not fit backbone s: has other sizes, first head.weight [4, 7] not [4, 6] (1 keys)",
        ),
    ],
)
def test_a_file_of_another_network_is_one_line(trained, tmp_path, change, problem):
    network, _ = trained
    path = tmp_path / "other.safetensors"
    save_file({k: v.contiguous() for k, v in change(network.state_dict()).items()}, path)
    with pytest.raises(UserError) as error:
        BackboneSpec("s", SMALL, weights=str(path)).initial(NAMES)
    assert str(error.value) == f"{path}: {problem}"


@pytest.mark.parametrize("train", ["head", "all"])
@torch.no_grad()
def test_weights_without_a_classifier(trained, tmp_path, train):
    network, _ = trained
    state = network.state_dict()
    save_file({k: v for k, v in state.items() if not k.startswith("head.")}, tmp_path / "trunk.safetensors")
    spec = BackboneSpec("s", SMALL, train, weights=str(tmp_path / "trunk.safetensors"), recipe=Recipe())
    backbone = spec.initial(["a", "b", "c"]).eval()
    torch.testing.assert_close(backbone.features(IMAGES), network.features(IMAGES))
    assert backbone.head.weight.shape[0] == backbone.head.bias.shape[0] == 3
    save_file({"other.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other.safetensors: does not fit backbone s: has no trunk"):
        BackboneSpec("s", SMALL, train, weights=str(tmp_path / "other.safetensors"), recipe=Recipe()).initial(NAMES)


def test_many_missing_keys_are_counted(trained, tmp_path):
    network, _ = trained
    kept = {k: v for k, v in network.state_dict().items() if k.startswith("head")}
    save_file(kept, tmp_path / "w.safetensors")
    with pytest.raises(
        UserError, match=r"has no trunk\.0\.weight, trunk\.1\.weight, trunk\.1\.bias, \.\.\. \(17 keys\)"
    ):
        BackboneSpec("s", SMALL, weights=str(tmp_path / "w.safetensors")).initial(NAMES)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({}, "train"),  # nothing gives weights
        ({"train": "most", "pretrained": True}, "train"),
        ({"pretrained": True, "reserve": 0.1}, "reserve"),
        ({"train": "head", "reserve": 1.0}, "reserve"),
        ({"train": "all"}, "recipe"),
        ({"pretrained": True, "dim": 0}, "dim"),
        ({"pretrained": True, "seed": -1}, "seed"),
    ],
)
def test_bad_arguments_name_their_key(arguments, key):
    with pytest.raises(ConfigError) as error:
        BackboneSpec("s", SMALL, **arguments)
    assert error.value.key == key


def test_errors_of_the_network_name_their_place():
    with pytest.raises(ConfigError, match=r"^model\.size=2: "):
        BackboneSpec("s", partial(SMALL, size=2), "head").fresh(3)
    with pytest.raises(ConfigError, match=r"^dim=7: the network has D=6"):
        BackboneSpec("s", SMALL, "head", dim=7).fresh(3)


# ---- real weights on real images


@pytest.mark.skipif(not (REAL / "tiny_imagenet.tar").is_file(), reason="no Tiny-ImageNet on this machine")
@pytest.mark.skipif(
    not (REAL / "mobilenetv2_100_imagenet_fp16.safetensors").is_file(), reason="no ImageNet weights on this machine"
)
@torch.no_grad()
def test_real_weights_know_real_images():
    """A wrong order of classes, of channels or of rows would be at chance: 0.5 %."""
    files, pictures = defaultdict(list), []
    with tarfile.open(REAL / "tiny_imagenet.tar") as tar:
        for member in tar:
            _, split, wnid, *name = [*member.name.split("/"), None, None][:4]
            if split == "val" and name != [None]:
                files[wnid].append(member)
        names = np.random.default_rng(0).permutation(sorted(files)).tolist()
        assert len(names) == 200
        backbone = BackboneSpec(
            "m",
            partial(
                TimmBackbone,
                model="mobilenetv2_100",
                image_size=128,
                crop_pct=1.0,
                mean=[0.5, 0.5, 0.5],
                std=[0.5, 0.5, 0.5],
                options={"pad_type": "same"},
            ),
            weights=str(REAL / "mobilenetv2_100_imagenet_fp16.safetensors"),
            classes="imagenet-1k",
            dim=1280,
        ).initial(names)
        for number in range(0, 200, 10):
            for member in sorted(files[names[number]], key=lambda m: m.name)[:3]:
                pictures.append((backbone.transform(Image.open(tar.extractfile(member))), number))
    images, labels = torch.stack([x for x, _ in pictures]), torch.tensor([y for _, y in pictures])
    logits = backbone.eval()(images)
    assert logits.shape == (60, 200)
    assert (logits.argmax(1) == labels).float().mean() > 0.3


def test_a_file_takes_the_place_of_the_library_s_weights():
    spec = BackboneSpec("r", lambda num_classes: None, pretrained=True, weights="w.pth")
    assert spec.started
    assert not spec.pretrained


def test_a_network_whose_arguments_are_missing_is_one_line():
    def network(num_classes, depth):
        raise AssertionError("was built")

    spec = BackboneSpec("mine", network, train="all", recipe=Recipe())
    with pytest.raises(ConfigError, match=r"model=mine: its keys do not fit \(missing a required argument: 'depth'\)"):
        spec.fresh(3)
    with pytest.raises(ConfigError, match="precomputed: takes feature vectors, whose dataset tells their size"):
        Precomputed(3)
