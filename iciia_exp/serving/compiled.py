"""Compiled steps: the step of a method as one program, for serving.

Legend: P kept images, E numbers kept of each, D features.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iciia_exp.errors import UserError, first_line
from iciia_exp.methods.adapt.base import Adaptive

__all__ = ["compiled_step"]

#: Probabilities, state, and whether x is finite, of an image and what is kept.
Step = Callable[..., tuple[Tensor, Tensor, Tensor]]

#: Compiled steps by backend and length of history.
Programs = dict[tuple[str, int], Any]


class _Step(torch.nn.Module):
    """A method's step for compilation: probabilities, state, and whether x is finite."""

    def __init__(self, method: Adaptive) -> None:
        super().__init__()
        self.method = method

    def forward(self, x_1D: Tensor, past_1PE: Tensor, mask_1P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_1K, own_1E = self.method.step(x_1D, past_1PE, mask_1P)
        return self.method.task.probabilities(logits_1K), own_1E, x_1D.isfinite().all()


def compiled_step(method: Adaptive, programs: Programs, history: int, backend: str) -> Step:
    """Return the compiled step of a method for one length of history, from ``programs`` or added to them.

    Args:
        method: whose step is compiled.
        programs: by backend and length of history; one for all sessions of a run.
        history: number of past images.
        backend: ``inductor``, or another one of `torch.compile`.
    """
    if (backend, history) not in programs:
        try:
            step = _Step(method).eval()
            if backend == "inductor":
                made = _ahead_of_time(step, torch.zeros(1, history, method.state_width))
            else:
                made = torch.compile(step, dynamic=False, fullgraph=True, backend=backend)
        except Exception as error:
            raise UserError(f"compile={backend}: {first_line(error)}") from error
        programs[backend, history] = made
    return programs[backend, history]


def _ahead_of_time(step: _Step, past_1PE: Tensor) -> Step:
    """Return a library without Python calls: a third of the time of `torch.compile` behind a network."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    mask_1P = torch.ones(past_1PE.shape[:2], dtype=torch.bool)
    with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(step, (torch.zeros(1, step.method.dim), past_1PE.clone(), mask_1P.clone()))
        # tuned kernels for products of one row take a third of the classifier's time
        options: dict[str, Any] = {"package_path": f"{folder}/step.pt2", "inductor_configs": {"max_autotune": True}}
        return aoti_load_package(aoti_compile_and_package(program, **options))
