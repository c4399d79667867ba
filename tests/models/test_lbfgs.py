"""L-BFGS returns finite values, also where a step overflows."""

import torch

from iciia_exp.models.lbfgs import minimise


def test_the_minimum_of_a_bowl():
    (found,) = minimise(lambda x: (x - torch.tensor([1.0, -2.0])).square().sum(), torch.zeros(2))
    torch.testing.assert_close(found, torch.tensor([1.0, -2.0]))


def test_a_search_that_overflows_returns_the_best_values_before():
    def loss(x):
        return -1e3 * x.sum() + torch.where(x > 1, torch.inf, 0.0).sum() * x.sum()

    start = torch.tensor([0.0])
    (found,) = minimise(loss, start)
    assert found.isfinite().all()
    assert loss(found) <= loss(start)
