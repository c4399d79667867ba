"""L-BFGS minimiser: a smooth loss of a few numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["minimise"]


def minimise(loss: Callable[..., Tensor], *start: Tensor, most: int = 100) -> list[Tensor]:
    """Return values with which ``loss(*values)`` is least, from ``start`` on, by L-BFGS with a line search.

    Args:
        loss: gives a scalar; the tensors it uses are no inference tensors.
        start: where to begin; they stay as they are.
        most: iterations.
    """
    with torch.inference_mode(False), torch.enable_grad():
        values = [value.detach().clone().requires_grad_() for value in start]
        optimizer = torch.optim.LBFGS(values, max_iter=most, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            result = loss(*values)
            result.backward()
            return result

        optimizer.step(closure)
    return [value.detach() for value in values]
