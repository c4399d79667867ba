"""L-BFGS: minimises a smooth loss of a few numbers."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["minimise"]


def minimise(loss: Callable[..., Tensor], *start: Tensor, most: int = 100) -> list[Tensor]:
    """Return values that minimise ``loss(*values)``, by L-BFGS with a strong-Wolfe line search.

    Args:
        loss: returns a scalar; it must not use inference tensors.
        start: initial values; not changed.
        most: iterations, at most.
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
