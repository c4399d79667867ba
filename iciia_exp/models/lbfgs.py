"""L-BFGS: minimises a smooth loss of a few numbers."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["minimise"]


def minimise(loss: Callable[..., Tensor], *start: Tensor, most: int = 100) -> list[Tensor]:
    """Return values that minimise ``loss(*values)``, by L-BFGS with a strong-Wolfe line search.

    Where the search goes to numbers that are not finite, the best values before are returned.

    Args:
        loss: returns a scalar; it must not use inference tensors.
        start: initial values; not changed.
        most: iterations, at most.
    """
    with torch.inference_mode(False), torch.enable_grad():
        values = [value.detach().clone().requires_grad_() for value in start]
        optimizer = torch.optim.LBFGS(values, max_iter=most, line_search_fn="strong_wolfe")

        best, lowest = [value.detach().clone() for value in values], math.inf

        def closure() -> Tensor:
            nonlocal best, lowest
            optimizer.zero_grad()
            result = loss(*values)
            result.backward()
            if result.item() < lowest:  # false for NaN
                best, lowest = [value.detach().clone() for value in values], result.item()
            return result

        optimizer.step(closure)
        found = [value.detach() for value in values]
        finite = all(bool(value.isfinite().all()) for value in found) and bool(loss(*found).isfinite())
    return found if finite else best
