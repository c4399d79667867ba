"""Weights from files, rows of a classifier, and the network that a configuration starts from."""

import socket
import tarfile
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from iciia_exp.errors import ConfigError, UserError
from iciia_exp.models import weights
from iciia_exp.models.backbone import BackboneSpec
from iciia_exp.models.small_cnn import SmallCNN
from iciia_exp.models.timm_backbone import TimmBackbone
from iciia_exp.models.torchvision_backbone import TorchvisionBackbone
from iciia_exp.models.weights import class_rows, fetched, known_classes, read_weights
from iciia_exp.recipe import Recipe

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"

STATE = {"layer.weight": torch.arange(6.0).view(2, 3), "layer.bias": torch.ones(2, dtype=torch.float16)}


def same(got, want=STATE):
    assert set(got) == set(want)
    for key, value in want.items():
        assert torch.equal(got[key], value)


# ---- files


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt", "w.bin"])
def test_files_of_tensors(tmp_path, name):
    (save_file if name.endswith(".safetensors") else torch.save)(STATE, tmp_path / name)
    same(read_weights(tmp_path / name))
    same(read_weights(str(tmp_path / name)))


@pytest.mark.parametrize("outer", [("state_dict",), ("model",), ("model_state_dict",), ("state_dict", "model")])
def test_weights_inside_a_checkpoint(tmp_path, outer):
    checkpoint = {f"module.{k}": v for k, v in STATE.items()}
    for key in reversed(outer):
        checkpoint = {key: checkpoint, "epoch": 3}
    torch.save(checkpoint, tmp_path / "w.pth")
    same(read_weights(tmp_path / "w.pth"))


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(STATE, tmp_path / "w.pth")
    same(read_weights("~/w.pth"))


def test_a_missing_file():
    with pytest.raises(ConfigError, match=r"weights=nowhere\.pth: no such file"):
        read_weights("nowhere.pth")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("content", [b"", b"not weights at all, but long enough to have a header", None])
def test_a_damaged_file_is_one_line(tmp_path, name, content):
    path = tmp_path / name
    (save_file if name.endswith(".safetensors") else torch.save)(STATE, path)
    path.write_bytes(path.read_bytes()[:-3] if content is None else content)
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert str(error.value).startswith(f"{path}: cannot be read as weights (")
    assert "\n" not in str(error.value)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_file_without_tensors(tmp_path, name):
    (save_file if name.endswith(".safetensors") else torch.save)({}, tmp_path / name)
    with pytest.raises(UserError, match="holds no tensors by name"):
        read_weights(tmp_path / name)


def test_a_file_of_something_else(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no tensors by name"):
        read_weights(tmp_path / "w.pth")


# ---- classes


@pytest.fixture
def classes(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("cat\ndog\n\n  emu \nfox\n", encoding="utf-8")
    return str(path)


def test_known_classes(classes):
    assert known_classes(classes) == ["cat", "dog", "emu", "fox"]
    imagenet = known_classes("imagenet-1k")
    assert (len(imagenet), imagenet[0], imagenet[-1]) == (1000, "n01440764", "n15075141")
    assert imagenet == sorted(imagenet)
    with pytest.raises(ConfigError, match="classes=imagnet: must be a text file of class names, or imagenet-1k"):
        known_classes("imagnet")


def test_rows_follow_the_dataset_s_order(classes):
    for needed in (False, True):
        assert class_rows(classes, 4, ["fox", "cat"], needed) == [3, 0]
        assert class_rows(classes, 4, ["cat", "dog", "emu", "fox"], needed) == [0, 1, 2, 3]


def test_classes_without_names_fit_by_number():
    assert class_rows(None, 2, ["a", "b"], needed=True) is None
    assert class_rows(None, 3, ["a", "b"], needed=False) is None
    with pytest.raises(ConfigError, match="classes=null: the weights know 3 classes, the dataset has 2; .*train=head"):
        class_rows(None, 3, ["a", "b"], needed=True)


def test_classes_that_the_weights_do_not_know(classes):
    assert class_rows(classes, 4, ["cat", "gnu"], needed=False) is None
    with pytest.raises(ConfigError, match="2 of the dataset's 3 classes are not among them, 'gnu' first; .*train=head"):
        class_rows(classes, 4, ["cat", "gnu", "hen"], needed=True)


@pytest.mark.parametrize("needed", [False, True])
def test_names_must_be_as_many_as_the_weights_classes(classes, needed):
    with pytest.raises(ConfigError, match="has 4 names, the weights know 5 classes"):
        class_rows(classes, 5, ["cat"], needed)


def test_a_name_of_two_classes_stands_for_neither(tmp_path):
    (tmp_path / "twice.txt").write_text("cat\ndog\ncat\n", encoding="utf-8")
    classes = str(tmp_path / "twice.txt")
    assert class_rows(classes, 3, ["dog"], needed=True) == [1]
    assert class_rows(classes, 3, ["dog", "cat"], needed=False) is None
    with pytest.raises(ConfigError, match="has 'cat' more than once"):
        class_rows(classes, 3, ["dog", "cat"], needed=True)


# ---- downloads


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, empty caches; whoever tries to load is noticed."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    asked = []

    def fail(host, port, *arguments, **options):
        asked.append((host, port))
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(weights.socket, "getaddrinfo", fail)
    return asked


def test_what_can_be_fetched_is_returned(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")  # the proxy looks the name up
    assert fetched(lambda: 7, "seven", "nowhere.invalid", "bring it") == 7


def test_without_a_network_nothing_is_tried(offline):
    with pytest.raises(UserError) as error:
        fetched(lambda: pytest.fail("tried"), "the weights", "files.example", "get FILE and put it THERE")
    assert offline == [("files.example", 443)]
    assert str(error.value).startswith("the weights: cannot be read from the cache or downloaded (")
    assert str(error.value).endswith("); get FILE and put it THERE")


def test_torchvision_says_which_file_goes_where(offline, tmp_path):
    with pytest.raises(UserError) as error:
        TorchvisionBackbone(5, "resnet18", image_size=32).pretrained_state()
    assert offline == [("download.pytorch.org", 443)]
    url = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    place = tmp_path / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    assert str(error.value).endswith(f"; get {url} elsewhere and put it at {place}")


def test_timm_says_which_file_to_name(offline, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    with pytest.raises(UserError) as error:
        TimmBackbone(5, "resnet10t.c3_in1k", 32).pretrained_state()
    assert [host for host, _ in offline] == ["huggingface.co"]
    page = "https://huggingface.co/timm/resnet10t.c3_in1k/resolve/main/model.safetensors"
    assert str(error.value).endswith(f"get {page} elsewhere and set backbone.weights=FILE")


def test_weights_of_the_configuration_are_named(offline):
    model = partial(TorchvisionBackbone, model="resnet18", image_size=32)
    with pytest.raises(UserError, match=r"torchvision's resnet18 IMAGENET1K_V1: cannot be read"):
        BackboneSpec("r", model, pretrained=True).initial(["a"])


# ---- the network a configuration starts from

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
            "has no classifier head.weight; these are not weights of backbone s",
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
        ({"train": "all", "recipe": Recipe(patience=3)}, "recipe.patience"),
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
