"""ICIIA against the released layout's test vectors, and properties every version must keep."""

import json

import pytest
import torch
from safetensors import safe_open

from iciia_exp.models.iciia import ICIIA


def test_reference_vectors(reference):
    cases = 0
    with safe_open(reference / "iciia_vectors.safetensors", "pt") as file:
        meta = file.metadata()
        names = sorted({k.split("/")[0] for k in file.keys()})  # noqa: SIM118
        for case in names:
            keys = [k for k in file.keys() if k.startswith(f"{case}/")]  # noqa: SIM118
            state = {k.removeprefix(f"{case}/state/"): file.get_tensor(k) for k in keys if "/state/" in k}
            sizes = json.loads(meta[case]) if case in meta else {}
            heads = int(sizes.get("heads", sizes.get("num_heads", 4)))
            model = ICIIA.from_reference(state, heads, sizes.get("shuffle", True)).eval()
            inputs = {k.rsplit("_", 1)[-1]: file.get_tensor(k) for k in keys if "/input_" in k}
            wants = {s: file.get_tensor(f"{case}/logits_{s}") for s in inputs}
            for s, x in inputs.items():
                x_CSD = x.reshape(-1, *x.shape[-2:])
                want = wants[s].reshape(*x_CSD.shape[:2], -1)
                torch.testing.assert_close(model(x_CSD), want, atol=1e-5, rtol=1e-5)
                cases += 1
            # padded among other clients
            longest = max(x.shape[-2] for x in inputs.values())
            rows = [(s, row) for s, x in inputs.items() for row in x.reshape(-1, *x.shape[-2:])]
            x_CSD = torch.randn(len(rows), longest, model.dim)
            mask_CS = torch.zeros(len(rows), longest, dtype=torch.bool)
            for c, (_, row) in enumerate(rows):
                x_CSD[c, : len(row)], mask_CS[c, : len(row)] = row, True
            got = model(x_CSD, mask_CS)
            for c, (s, row) in enumerate(rows):
                want = wants[s].reshape(-1, *wants[s].shape[-2:])
                same = [w for w, x in zip(want, inputs[s].reshape(-1, *row.shape), strict=True) if torch.equal(x, row)]
                torch.testing.assert_close(got[c, : len(row)], same[0], atol=1e-5, rtol=1e-5)
    assert cases >= 4


@pytest.fixture(params=[(1, 1), (4, 2), (32, 1)], ids=lambda p: f"G{p[0]}-N{p[1]}")
def model(request):
    torch.manual_seed(0)
    return ICIIA(32, 5, request.param[1], 4, request.param[0]).eval()


def test_permuting_a_client_s_images_permutes_the_logits(model):
    x = torch.randn(2, 6, 32)
    order = torch.randperm(6)
    torch.testing.assert_close(model(x)[:, order], model(x[:, order]), atol=1e-5, rtol=1e-5)


def test_what_is_padded_changes_nothing(model):
    x = torch.randn(3, 6, 32)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, 4:] = mask[2, 1:] = False
    y = model(x, mask)
    noise = torch.where(mask[..., None], x, torch.randn_like(x) * 100)
    torch.testing.assert_close(model(noise, mask)[mask], y[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(x[:1, :4]), y[:1, :4], atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter_of_every_group(model):
    model.train()
    for _ in range(3):
        model(torch.randn(4, 8, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if "qkv.bias" not in name:  # keys' biases cancel in the softmax
            assert (parameter.grad != 0).float().mean() > 0.9, name


def test_sizes_must_divide():
    with pytest.raises(ValueError, match="num_groups=3 does not divide D=32; valid: 1, 2, 4, 8, 16, 32"):
        ICIIA(32, 5, num_groups=3)
    with pytest.raises(ValueError, match="num_heads=5"):
        ICIIA(32, 5, num_heads=5)


def test_a_foreign_checkpoint_is_refused():
    with pytest.raises(ValueError, match="released layout"):
        ICIIA.from_reference({"weight": torch.zeros(1)})
