"""Inference: batch norm folded into convolutions, channels last, the same features.

MobileNetV2 at 128 px on two CPU cores: about 3 times the images per second (benchmarks/bench_extraction.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

__all__ = ["faster"]

_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS = (nn.Conv2d, nn.Conv3d)


def _pairs(net: nn.Module, example: Tensor) -> list[tuple[Any, Any]]:
    """Return the (convolution, norm) pairs in which the norm reads exactly what the convolution wrote.

    Found by running the network once and comparing tensors by identity, which needs no tracing of its control flow.
    Modules that run more than once are left alone.
    """
    runs: dict[nn.Module, int] = {}
    wrote: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensor is kept, so that its id stays its own
    found: list[tuple[Any, Any]] = []

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        runs[module] = runs.get(module, 0) + 1
        if isinstance(module, _CONVS):
            wrote[id(output)] = (module, output)
        elif inputs and id(inputs[0]) in wrote:
            found.append((wrote.pop(id(inputs[0]))[0], module))

    # convolutions of subclasses (padding worked out as they run) compute with their own weights all the same
    hooks = [m.register_forward_hook(after) for m in net.modules() if isinstance(m, (*_CONVS, *_NORMS))]
    try:
        net(example)
    finally:
        for hook in hooks:
            hook.remove()
    once = [(conv, norm) for conv, norm in found if runs[conv] == runs[norm] == 1]
    return [(conv, norm) for conv, norm in once if norm.running_mean is not None]


def _fold(pairs: list[tuple[Any, Any]], net: nn.Module) -> Callable[[], None]:
    """Fold every norm into its convolution, in place; returns what takes it back."""
    undo: list[Callable[[], None]] = []
    conv_of = {norm: conv for conv, norm in pairs}
    fused: dict[nn.Module, nn.Module] = {}  # norm: what takes its place; a norm can have two places and run in one
    for parent in list(net.modules()):
        children: list[tuple[str, Any]] = list(parent.named_children())
        for name, norm in children:
            if (conv := conv_of.get(norm)) is None:
                continue
            undo.append(partial(setattr, parent, name, norm))
            if norm in fused:
                setattr(parent, name, fused[norm])
                continue
            undo.append(partial(setattr, conv, "weight", conv.weight))
            undo.append(partial(setattr, conv, "bias", conv.bias))
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            # timm's norms carry their activation with them
            rest = [m for m in norm.children() if not isinstance(m, nn.Identity)]
            fused[norm] = rest[0] if len(rest) == 1 else nn.Sequential(*rest)
            setattr(parent, name, fused[norm])

    def take_back() -> None:
        for step in undo:
            step()

    return take_back


@torch.no_grad()
def faster(net: nn.Module, example: Tensor, tolerance: float = 1e-3) -> list[str]:
    """Make a frozen network in evaluation mode give the same features faster, in place; return what was done.

    Args:
        net: maps [B, ...] to [B, D].
        example: a normalised input [B, ...], on the network's device.
        tolerance: largest difference of a feature, relative to the largest feature; a step that exceeds it (a
            convolution whose result is used twice, say) is taken back.
    """
    want, done = net(example), []

    def same() -> bool:
        return bool((net(example) - want).abs().max() <= tolerance * want.abs().max().clamp(min=1e-12))

    if pairs := _pairs(net, example):
        undo = _fold(pairs, net)
        if same():
            done.append("batch norm folded")
        else:
            undo()
    if example.ndim == 4:
        net.to(memory_format=torch.channels_last)
        if same():
            done.append("channels last")
        else:
            net.to(memory_format=torch.contiguous_format)
    return done
