"""LAE against the formulas' vectors, and its closed forms against PyTorch's counter."""

import json

import pytest
import torch
from safetensors import safe_open

from iciia_exp.cost import count_macs
from iciia_exp.errors import ConfigError
from iciia_exp.models.lae import LAE, prefix_tokens


@pytest.mark.parametrize("case", ["miet0", "miet1"])
@pytest.mark.parametrize("pool", ["class", "mean"])
@pytest.mark.parametrize("subtract", [False, True])
def test_it_is_the_formula(reference, case, pool, subtract):
    with safe_open(reference / "miet_route_formula_vectors.safetensors", "pt") as file:
        sizes = json.loads(file.metadata()[case])
        want = {k.removeprefix(f"{case}/"): file.get_tensor(k) for k in file.keys() if k.startswith(case)}  # noqa: SIM118
    net = LAE(sizes["d"], sizes["classes"], sizes["m"], sizes["r"], sizes["heads"], pool, subtract=subtract)
    state = {"norm.weight": want["final_ln_w"], "norm.bias": want["final_ln_b"]}
    state |= {"head.weight": want["head_w"], "head.bias": want["head_b"]}
    for i in range(sizes["m"]):
        names = {"norm.weight": "ln_w", "norm.bias": "ln_b", "query": "A_q", "key": "A_k", "value": "A_v", "up": "A_up"}
        state |= {f"blocks.{i}.{own}": want[f"block{i}/{theirs}"] for own, theirs in names.items()}
    net.load_state_dict(state)
    gathered = want["z"][:, : sizes["k"] + 1].sum(1)
    torch.testing.assert_close(gathered, want["gathered"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net.stream(gathered), want["stream"], atol=1e-5, rtol=1e-5)
    name = f"logits_{'class_token' if pool == 'class' else 'mean'}{'_subtract' * subtract}"
    torch.testing.assert_close(net(gathered), want[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("blocks", "rank", "heads"), [(0, 4, 1), (1, 4, 2), (3, 6, 3)])
@pytest.mark.parametrize("pool", ["class", "mean", "both"])
def test_costs_are_the_closed_forms(blocks, rank, heads, pool):
    n, d, classes = 17, 24, 7
    net = LAE(d, classes, blocks, rank, heads, pool)
    assert count_macs(net, torch.randn(1, n, d)) == net.macs(n)
    inputs = 2 * d if pool == "both" else d
    trained = blocks * (4 * d * rank + 2 * d) + 2 * d + inputs * classes + classes
    assert sum(p.numel() for p in net.parameters()) == trained


def test_published_costs():
    """ViT-B/16 at 224 pixels: a block of rank 16 has 10.9 M MACs and 50,688 parameters."""
    net = LAE(768, 10, 1, 16)
    assert round((net.macs(197) - 7680) / 1e6, 1) == 10.9
    assert sum(p.numel() for p in net.blocks.parameters()) == 50_688


def test_both_is_the_class_token_and_the_mean():
    torch.manual_seed(0)
    both, token, mean = (LAE(8, 4, 2, 4, pool=pool) for pool in ("both", "class", "mean"))
    for p in both.parameters():
        torch.nn.init.normal_(p)
    state = both.state_dict()
    for part, columns in ((token, slice(8)), (mean, slice(8, 16))):
        part.load_state_dict(state | {"head.weight": state["head.weight"][:, columns]})
    x = torch.randn(3, 10, 8)
    torch.testing.assert_close(both(x), token(x) + mean(x) - both.head.bias)


def test_it_starts_as_the_linear_classifier():
    x = torch.randn(3, 10, 8)
    deep, linear = LAE(8, 4, 2, 4), LAE(8, 4, 0)
    for net in (deep, linear):
        torch.nn.init.normal_(net.head.weight, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(deep(x), linear(x))


def test_bad_values():
    for arguments, message in (
        ({"heads": 3}, "heads=3: must divide the rank 16"),
        ({"pool": "max"}, "pool=max: must be one of class, mean, both"),
        ({"prefix": 0}, "pool=class: the backbone has no class token; use mean"),
        ({"blocks": 0, "subtract": True}, "subtract=True: needs blocks"),
    ):
        with pytest.raises(ConfigError, match=message):
            LAE(8, 4, **arguments)
    assert [prefix_tokens(n) for n in (65, 257, 17, 49)] == [1, 1, 1, 0]
