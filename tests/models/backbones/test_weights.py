"""Weights from files and from libraries, and the rows of a classifier that are a dataset's classes."""

import socket
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from iciia_exp.errors import ConfigError, UserError
from iciia_exp.models.backbones import weights
from iciia_exp.models.backbones.base import BackboneSpec
from iciia_exp.models.backbones.timm_backbone import TimmBackbone
from iciia_exp.models.backbones.torchvision_backbone import TorchvisionBackbone
from iciia_exp.models.backbones.weights import class_rows, fetched, known_classes, read_weights

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
