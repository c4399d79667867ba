"""Every experiment by name, the whole way through, on small data of exactly the real form."""

import pytest
import torch
from torchvision import datasets

from iciia_exp.config.experiment import Experiment
from iciia_exp.config.paths import CONF_DIR
from iciia_exp.engine.execute import execute
from iciia_exp.engine.stages import Stages
from iciia_exp.methods.route import labels
from iciia_exp.models.backbones.timm_backbone import TimmBackbone
from iciia_exp.models.backbones.torchvision_backbone import TorchvisionBackbone
from tests.making.celeba import make_celeba
from tests.making.diffusion import make_clip, make_pipeline
from tests.making.femnist import make_femnist
from tests.making.folder import make_folder
from tests.making.imagenet import make_imagenet
from tests.making.inaturalist import make_inaturalist
from tests.making.movielens import make_movielens
from tests.making.omniglot import make_omniglot
from tests.making.torchvision_sets import accept, make_cifar10, make_cifar100, make_fashion_mnist
from tests.making.ucf101 import make_ucf101
from tests.making.vectors import make_vectors
from tests.making.vtab import make_vtab

pytestmark = pytest.mark.usefixtures("undrawn")


def own_state(self):
    """Return random weights for ImageNet's 1,000 classes, in place of those that no network is there to fetch."""
    generator = torch.Generator().manual_seed(0)
    head = {
        f"{self.head_name}.weight": torch.randn(1000, self.dim, generator=generator) / self.dim**0.5,
        f"{self.head_name}.bias": torch.zeros(1000),
    }
    return head | {k.removeprefix("net."): v for k, v in self.state_dict().items() if k.startswith("net.")}


@pytest.fixture
def offline_weights(monkeypatch):
    for backbone in (TimmBackbone, TorchvisionBackbone):
        monkeypatch.setattr(backbone, "pretrained_state", own_state)


def small_imagenet(root, monkeypatch):
    make_imagenet(root, train=3, val=2)


def small_cifar10(root, monkeypatch):
    make_cifar10(root, per_batch=80)
    accept(monkeypatch, datasets.CIFAR10, root / "cifar-10-batches-py")


def small_cifar100(root, monkeypatch):
    make_cifar100(root, train=1000, test=500)
    accept(monkeypatch, datasets.CIFAR100, root / "cifar-100-python")


def small_scenes(root, monkeypatch):
    """Let models count as different that an epoch of training leaves equally bad."""
    monkeypatch.setattr(labels, "CLEAR", 0.0)


def small_prompts(root, monkeypatch):
    """Make a file of prompts, and two pipelines and a CLIP beside it, which is the working folder."""
    root.rmdir()
    root.write_text("".join(f"{word} {number}\n" for word in ("dog", "sofa", "a red bus") for number in "abcdefgh"))
    make_clip(root.parent / "clip")
    for number, name in enumerate(("small", "large")):
        make_pipeline(root.parent / name, seed=number)


TINY = "backbone.model.image_size=32"
CLIENTS = "partition.images_per_client=4"
CHEAP = (
    "trainer=smoke",
    "logger=csv",
    "evaluation.history_orders=1",
    "groups=16",
)  # of 2,560 features, most of the time

# instead of the largest networks, which are compared with the library's in tests/models/backbones
SMALL = ("backbone.model.model=mobilenet_v3_small", "backbone.model.weights_name=IMAGENET1K_V1", "backbone.dim=null")
SMALL_TIMM = ("backbone.model.model=mobilenetv3_small_050.lamb_in1k", "backbone.dim=null")

SMALL_PAIR = (
    *(f"backbone.model.{part}.{key}" for part in ("first", "second") for key in ("image_size=32",)),
    "backbone.model.first.model=mobilenetv3_small_075.lamb_in1k",
    "backbone.model.second.model=mobilenetv3_small_050.lamb_in1k",
    *("method.network.inputs=1024", "partition.classes_per_client=2", "partition.images_per_client=2"),
    "partition.val_share=0.4",
)
SMALL_CARS = (
    *("backbone.model.model=mobilenet_v3_small", TINY, "backbone.unseen_classes=[cup]", "partition.val_share=0.2"),
    *("backbone.recipe.batch_size=10", "method.network.model=mobilenet_v3_small", "method.network.weights_name=null"),
    *("partition.images_per_client=1", "partition.classes_per_client=1", "method.network.image_size=32"),
)
SMALL_SPLIT = (
    *("backbone.model.layers=[8,M,8,M]", "backbone.model.hidden=[8]", "method.network.channels=8"),
    *("method.network.layers=[4,M,4,M]", "method.network.hidden=[4]", "backbone.recipe.batch_size=32"),
)
SMALL_VIT = ("backbone.model.model=vit_tiny_patch16_224", TINY)
SMALL_MIET = (*SMALL_VIT, "method.epochs=2", "method.linear_epochs=1")

SMALL_SCENES = (
    *("dataset.sizes={backbone: 32, train: 40, val: 20, test: 20}", "backbone.recipe.epochs=1"),
    *("backbone.model.device_channels=[8,8,8]", "backbone.model.cloud_channels=[8,8,16]"),
    *("backbone.model.device_steps=1", "backbone.model.cloud_steps=2", "backbone.model.pictures=1"),
)
SMALL_PIPELINES = (
    *("backbone.model.device_model=small", "backbone.model.cloud_model=large", "backbone.model.clip=clip"),
    *("backbone.model.device_steps=1", "backbone.model.cloud_steps=2", "backbone.model.pictures=1"),
)

EXPERIMENTS = {
    "digits": (None, ()),
    "digits_parents": (None, ()),
    "rivals": (None, ()),
    "coda_digits": (None, ()),
    "mpda_digits": (None, ()),
    "miet_digits": (None, ("backbone.model.depth=2", "method.epochs=3", "method.linear_epochs=2")),
    **{f"{name}_imagenet": (small_imagenet, (TINY,)) for name in ("mobilenetv3", "efficientnet_b4")},
    **{f"{name}_imagenet": (small_imagenet, (TINY, *SMALL)) for name in ("swin_b", "convnext_l", "resnet152")},
    "efficientnet_b7_imagenet": (small_imagenet, (TINY, *SMALL_TIMM)),
    "miet_tiny_imagenet": (lambda root, _: make_imagenet(root, train=4, val=2), (*SMALL_MIET, "partition.tasks=2")),
    "miet_vtab": (lambda root, _: make_vtab(root), SMALL_MIET),
    "miet_omniglot": (lambda root, _: make_omniglot(root), SMALL_MIET),
    "mobilenetv2_tiny_imagenet": (small_imagenet, (TINY,)),
    "coda_tiny_imagenet": (small_imagenet, (TINY, *SMALL_TIMM, "partition.train_chunk=2", "partition.test_chunk=1")),
    "efficientnet_b0_inaturalist": (lambda root, _: make_inaturalist(root), (TINY,)),
    "cnn_femnist": (lambda root, _: make_femnist(root), ()),
    "efficientnet_b0_celeba": (lambda root, _: make_celeba(root), (TINY,)),
    "c3d_ucf101": (lambda root, _: make_ucf101(root, clips=1), ("backbone.model.channels=4", "groups=256")),
    "mpda_movielens": (lambda root, _: make_movielens(root), ("method.candidates=3",)),
    "coda_movielens": (lambda root, _: make_movielens(root), ("method.ratio=2", "method.keep=0.5")),
    "dc_ccl_digits": (None, ("method.devices=1", "method.local_epochs=1")),
    "dc_ccl_mnist": (lambda root, _: make_femnist(root), ("dataset.num_classes=62", "backbone.unseen_classes='50:'")),
    "dc_ccl_tiny_imagenet": (small_imagenet, SMALL_PAIR),
    "dc_ccl_imagenet_cars": (lambda root, _: make_folder(root), SMALL_CARS),
    "dc_ccl_cifar10": (
        small_cifar10,
        ("partition.images_per_client=2", "partition.val_share=0.1", "backbone.model.stem=8", *SMALL_SPLIT),
    ),
    "route_tiny_imagenet": (small_imagenet, (*SMALL_PAIR[:4], "partition.train_chunk=2", "partition.test_chunk=1")),
    "route_t2i": (small_prompts, SMALL_PIPELINES),
    "route_t2i_scenes": (small_scenes, SMALL_SCENES),
    "cifar10": (small_cifar10, (CLIENTS,)),
    "cifar100": (small_cifar100, ("partition.images_per_client=5",)),
    "fashion_mnist": (lambda root, _: make_fashion_mnist(root, train=400, test=80), (CLIENTS,)),
    "omniglot": (lambda root, _: make_omniglot(root), ()),
    "folder": (lambda root, _: make_folder(root), (TINY, CLIENTS)),
    "features": (lambda root, _: make_vectors(root), (CLIENTS, "partition.classes_per_client=2", "groups=4")),
}


def test_every_experiment_is_here():
    assert sorted(EXPERIMENTS) == sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs(name, compose, tmp_path, monkeypatch, offline_weights, capsys):
    make, overrides = EXPERIMENTS[name]
    data = () if make is None else (f"data_dir={tmp_path}/data",)
    if make is not None:
        (tmp_path / "data").mkdir()
        make(tmp_path / "data", monkeypatch)
    stages = Stages(Experiment.from_config(compose(f"+experiment={name}", *data, *CHEAP, *overrides)))
    row = execute(stages)
    assert row["name"] == name
    assert row["test_clients"] > 0
    assert row["dim"] == stages.dim
    assert row["backbone_macs"] is None if name == "features" else row["backbone_macs"] > 0
    assert 0 <= row["accuracy"] <= 1
    assert execute(stages) == row
    if name == "route_tiny_imagenet":  # what the cloud computes is that of the images that were sent
        assert row["request_cloud_macs"] == pytest.approx(row["cloud_share"] * row["backbone_macs"], abs=1)
    if name == "dc_ccl_tiny_imagenet":  # the second trunk is in the answer
        assert row["streaming_macs"] > stages.open_store().manifest["second_macs"] > 0


def test_images_go_to_the_cloud_as_jpeg(compose, tmp_path, monkeypatch, offline_weights):
    make_folder(tmp_path / "data")
    setting = ("+experiment=folder", f"data_dir={tmp_path}/data", "method=linear_head", "evaluation.site=cloud")

    def run(*overrides):
        return execute(
            stages := Stages(Experiment.from_config(compose(*setting, *CHEAP, TINY, CLIENTS, *overrides)))
        ), stages.open_store().manifest

    (plain, _), (small, manifest) = run(), run("features.jpeg=30")
    assert plain["request_up_bytes"] == 3 * 32 * 32
    assert small["request_up_bytes"] == manifest["image_bytes"] < 2000
    assert plain["features_digest"] != small["features_digest"]
    assert "image_bytes" not in run()[1]
