"""Dropout by 16 random bits a value does what PyTorch's does."""

import pytest
import torch

from iciia_exp.models.fast_dropout import Dropout, drop


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_as_often_and_as_much_as_pytorchs(p):
    torch.manual_seed(0)
    x = torch.ones(501, 401)
    y = drop(x, p)
    assert sorted(y.unique().tolist()) == pytest.approx([0.0, 1 / (1 - p)], rel=1e-4)
    zero = (y == 0).float()
    error = 4 * (p * (1 - p) / x.numel()) ** 0.5
    assert abs(zero.mean() - p) < error
    # neighbours, of one random number and of two, know nothing of each other
    flat = zero.flatten() - p
    for step in (1, 2, 3, 4, 5, 8, 401):
        assert abs((flat[step:] * flat[:-step]).mean()) < 4 * p * (1 - p) / x.numel() ** 0.5


def test_gradients_are_those_of_what_was_kept():
    torch.manual_seed(0)
    x = torch.rand(7, 5, dtype=torch.float64, requires_grad=True)
    y = drop(x, 0.3)
    y.sum().backward()
    assert torch.equal(x.grad * x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 4), (3,), (2, 3, 5), ()])
def test_any_shape_and_type(shape, dtype):
    y = drop(torch.ones(shape, dtype=dtype), 0.5)
    assert (y.shape, y.dtype) == (shape, dtype)


def test_nothing_and_all():
    x = torch.rand(100)
    assert torch.equal(drop(x, 0.0), x)
    assert torch.equal(drop(x, 1.0), torch.zeros(100))


def test_in_training_alone_and_by_the_seed():
    x, module = torch.rand(50, 50), Dropout(0.2)
    assert module.eval()(x) is x
    module.train()
    torch.manual_seed(1)
    first, second = module(x), module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first)
    assert not torch.equal(first, second)
