"""Device networks: what devices learn on features, levels and the input of the last block."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from iciia_exp.errors import ConfigError, NotApplicable
from iciia_exp.ledger import Link, Sizes
from iciia_exp.methods.base import Facts
from iciia_exp.methods.tune.full_finetune import FullFinetune
from iciia_exp.methods.tune.last import Last
from iciia_exp.methods.tune.last_block import LastBlock
from iciia_exp.methods.tune.linear_probe import LinearProbe
from iciia_exp.methods.tune.miet import Miet
from iciia_exp.methods.tune.side_network import SideNetwork
from iciia_exp.models.backbones.small_vit import SmallViT
from iciia_exp.models.lae import LAE, LAST, Bottleneck
from tests.making.cloud import ARRAYS, TOKENS, Network, accuracy, no_fit, personalised, small_cloud, taught

K, D = 6, 12
FACTS = Facts.of(nn.Linear(D, K), arrays=ARRAYS, network=Network)
FEW = {"epochs": 15, "linear_epochs": 15, "batch_size": 8, "lr": 0.01}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (LinearProbe, {}),
        (Last, {"rank": 4}),
        (Last, {"rank": 4, "blocks": 1, "subtract": True}),
        (SideNetwork, {"width": 4, "heads": 2}),
        (LastBlock, {"lr": 0.003}),
        (Miet, {"mixer": "perceptron", "rank": 4}),
        (FullFinetune, {"lr": 0.003}),
    ],
)
def test_devices_learn_their_own_classes(method, settings):
    cloud = small_cloud(D, K, images=20, noise=0.3)
    method, link, _ = taught(method(FACTS, **FEW | settings), cloud)
    assert accuracy(method, cloud) > 0.9
    (sent,) = link.counted
    expected = ("device", "training", "labels") if isinstance(method, FullFinetune) else ("cloud", "training")
    assert sent[1 : 1 + len(expected)] == expected


def test_a_feature_that_no_train_image_has_decides_nothing():
    """As behind a ReLU: in a test image where it is not 0 it must not be a million times the others."""
    clouds = [small_cloud(D, K, noise=0.5) for _ in range(2)]
    for cloud, value in zip(clouds, (0.0, 0.2), strict=True):
        cloud.batches.features[:, 0] = 0.0
        cloud.batches.features[cloud.clients.test.values, 0] = value
    without, with_it = (accuracy(taught(LinearProbe(FACTS, **FEW), cloud)[0], cloud) for cloud in clouds)
    assert without > 0.9
    assert with_it > without - 0.1


def test_each_client_takes_its_best_rate():
    cloud = small_cloud(D, K, noise=2.0)
    one, other, both = (taught(LinearProbe(FACTS, **FEW | {"lr": lr}), cloud)[0] for lr in (1e-9, 0.05, [1e-9, 0.05]))
    (val,) = cloud.chunks("val")

    def correct(method):
        right = (method.logits(val).argmax(-1) == val.y_CS) & val.mask_CS
        return right.sum(1)

    assert torch.equal(correct(both), torch.maximum(correct(one), correct(other)))
    assert (correct(other) > correct(one)).any()


def test_the_epochs_of_all_rates_count():
    cloud = small_cloud(D, K)
    _, _, epochs = taught(LinearProbe(FACTS, **FEW | {"lr": [0.01, 0.1, 1.0]}), cloud)
    assert epochs.tolist() == [45] * 12


def test_the_linear_start_has_a_rate_of_its_own():
    assert [recipe.optimizer.keywords["lr"] for recipe in LastBlock(FACTS).recipes[0]] == [0.0001, 0.001]
    assert [recipe.optimizer.keywords["lr"] for recipe in Last(FACTS, lr=0.01).recipes[0]] == [0.01, 0.01]
    with pytest.raises(ConfigError, match="linear_lr=0: must be"):
        Last(FACTS, linear_lr=0)


def test_levels_are_evenly_spaced():
    assert Last(FACTS).used == [0, 1, 2, 3]
    assert Last(FACTS, blocks=2).used == [0, 2, 3]
    assert SideNetwork(FACTS, blocks=1, width=4).shape == (2, *TOKENS)
    with pytest.raises(ConfigError, match=r"blocks=4: must be a whole number of 1 to 3 \(4 levels are stored\)"):
        Last(FACTS, blocks=4)
    with pytest.raises(ConfigError, match="heads=4: must divide the width 6"):
        SideNetwork(FACTS, width=6)


def test_last_with_all_levels_at_the_start_is_miet():
    """MIET is LAST with one injection: where all levels but the first are zero, both are the same network."""
    torch.manual_seed(0)
    last, lae = LAST(8, 3, 2, 4), LAE(8, 3, 2, 4)
    for p in last.parameters():
        nn.init.normal_(p)
    lae.load_state_dict(last.state_dict())
    x = torch.randn(5, *TOKENS)
    levels = torch.stack([x, torch.zeros_like(x), torch.zeros_like(x)], 1)
    torch.testing.assert_close(last(levels), lae(x))
    last.subtract = lae.subtract = True
    torch.testing.assert_close(last(levels), lae(x))


def test_training_starts_as_the_backbones_last_block():
    torch.manual_seed(0)
    cloud, network = small_cloud(D, K), Network().eval()
    cloud.view._backbone = lambda: network
    method, *_ = taught(LastBlock(FACTS, epochs=1, linear_epochs=1, lr=1e-12, weight_decay=0.0), cloud)
    state, block = method.states.states, network.net.blocks[0]
    for name, p in block.named_parameters():
        torch.testing.assert_close(state[f"block.{name}"], p.expand(12, *p.shape))
    x = torch.randn(3, *TOKENS)
    torch.testing.assert_close(method._drawn(method.network).block(x), block(x))


def test_a_trained_last_block_is_loaded_with_its_form():
    cloud = small_cloud(D, K)
    method, *_ = taught(LastBlock(FACTS, epochs=1, linear_epochs=1), cloud)
    again = LastBlock(FACTS)
    again.load_state_dict(method.state_dict())
    assert again.state_shapes == method.state_shapes
    assert method.payload()["block"].numel() == sum(p.numel() for p in Network().net.parameters())


def test_a_last_block_of_another_kind_is_refused():
    cloud = small_cloud(D, K)
    network = Network()
    network.net.blocks[0].attn.proj = nn.Identity()
    cloud.view._backbone = lambda: network
    with pytest.raises(NotApplicable, match="last_block: needs a backbone whose last block is that of a plain vision"):
        LastBlock(FACTS).learn(cloud.view, no_fit)


def test_full_fine_tuning_starts_at_the_backbone():
    torch.manual_seed(0)
    cloud, network = small_cloud(D, K), Network().eval()
    cloud.view._backbone = lambda: network
    method, *_ = taught(FullFinetune(FACTS, epochs=1, linear_epochs=1, lr=1e-12, weight_decay=0.0), cloud)
    (test,) = cloud.chunks("test")
    x_CSD = network.trunk(test.arrays["images"].flatten(0, 1)).view(*test.mask_CS.shape, D)
    linear, states = LAE(D, method.classes, blocks=0, prefix=1), method.states.states
    for client in range(12):
        linear.load_state_dict({name: states[name][client] for name in linear.state_dict()})
        own = states["classes"][client].long()
        expected = linear(x_CSD[client].unsqueeze(1))
        torch.testing.assert_close(method.logits(test)[client][:, own], expected, rtol=1e-4, atol=1e-4)


def test_full_fine_tuning_changes_neither_the_backbone_nor_its_statistics():
    torch.manual_seed(0)
    cloud = small_cloud(D, K, images=20)
    method, again = FullFinetune(FACTS, **FEW), FullFinetune(FACTS, **FEW)
    method.patience = again.patience = None  # the last epoch is kept
    taught(method, cloud)
    again.load_state_dict(method.state_dict())
    before = {name: t.clone() for name, t in method.state_dict().items()}
    again.requires_grad_(False)  # as a loaded run
    personalised(again, cloud)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert (again.states.states["trunk.trunk.0.weight"] - again.net.trunk[0].weight).abs().max() > 1e-2
    (test,) = cloud.chunks("test")
    torch.testing.assert_close(again.logits(test), method.logits(test))


def test_the_training_of_a_vision_transformer_costs_what_the_budget_states():
    cloud = small_cloud(D, K)
    pictures = np.random.default_rng(0).standard_normal((len(cloud.batches.labels), 1, 8, 8)).astype(np.float32)
    cloud.batches.arrays["images"] = pictures
    build = partial(SmallViT, K, dim=D, depth=2, heads=2)
    method = FullFinetune(Facts.of(nn.Linear(D, K), arrays={"images": (1, 8, 8)}, network=build), epochs=2)
    cloud.view._backbone = build
    method.learn(cloud.view, no_fit)
    link = Link(method.name, method.budget(Sizes()))
    # one client: of several, the counter takes the gradient of their convolutions as one without groups
    with FlopCounterMode(display=False) as counter:
        method.personalise(cloud.devices.own(np.array([3])), link, cloud.view)
    assert counter.get_total_flops() // 2 == method.training_macs(Sizes(train=8, val=8, epochs=2))
    assert sum(link.counted.values()) == 16 * 4


def test_full_fine_tuning_without_a_backbone_is_refused():
    with pytest.raises(NotApplicable, match="full_finetune: tunes the backbone, and there are only its features"):
        FullFinetune(Facts.of(nn.Linear(D, K), arrays=ARRAYS))


def test_mixers_have_the_size_of_attention():
    sizes = {
        mixer: sum(p.numel() for p in LAE(384, 20, 1, 16, pool="mean", mixer=mixer).parameters())
        for mixer in ("attention", "perceptron", "convolution")
    }
    assert sizes["perceptron"] == sizes["attention"]
    assert 1 < sizes["convolution"] / sizes["attention"] < 1.02
    with pytest.raises(ConfigError, match="mixer=convolution: does not change the class token; use pool=mean"):
        LAE(8, 3, mixer="convolution")


def test_a_convolution_reads_the_neighbours_of_a_patch():
    torch.manual_seed(0)
    block = Bottleneck(4, 6, prefix=1, convolve=True)
    nn.init.normal_(block.up)
    x = torch.randn(1, 17, 4)
    changed = x.clone()
    changed[0, 1 + 5] += torch.tensor([1.0, -2.0, 0.5, 1.0])  # row 1, column 1 of 4 x 4
    moved = (block(changed) - block(x)).abs().sum(-1)[0] > 1e-6
    near = [row * 4 + column for row in range(3) for column in range(3)]
    assert moved.nonzero()[:, 0].tolist() == [1 + p for p in near]
