"""Cost: multiply-accumulates (MACs) in closed form, and a counter for backbones.

One multiply-accumulate counts as one operation. Norms, softmax, residuals and biases are left out; the classifier
belongs to the backbone's cost (paper, Table 2 and supplement).

Legend: S images of a client, D features, G groups, N layers.

Derivation, per image and layer: the fused q/k/v projection maps D to 3 D, the output projection and the two of the
MLP map D to D, together 6 D^2 weights. With G groups every D x D matrix is block-diagonal, with G blocks of (D/G)^2
entries: 6 D^2 / G. Attention of one query to S keys is S D for the scores and S D for the weighted sum: 2 S D. The
number of heads cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = [
    *("attention_macs", "count_macs", "count_step_macs", "counted", "overheads"),
    *("streaming_attention_macs", "training_bytes"),
]

_Made = TypeVar("_Made")


def attention_macs(images: int, dim: int, groups: int, layers: int) -> int:
    """Return the MACs of ICIIA's encoder on a sequence of ``images``: (6 S D^2 / G + 2 S^2 D) N.

    Swin-B with ICIIA-B (D = 1024, N = 3, 16 images) is published as 0.30 G:

    >>> round(attention_macs(16, 1024, 1, 3) / 1e9, 2)
    0.3
    """
    return (6 * images * dim * dim // groups + 2 * images * images * dim) * layers


def streaming_attention_macs(images: int, dim: int, groups: int, layers: int) -> int:
    """Return the MACs of the newest of ``images``, keys and values of the others kept: (6 D^2 / G + 2 S D) N.

    >>> streaming_attention_macs(16, 1024, 1, 3) * 16 == attention_macs(16, 1024, 1, 3)
    True
    """
    return (6 * dim * dim // groups + 2 * images * dim) * layers


def overheads(
    sequence_macs: int | None, streaming_macs: int | None, images: int, backbone_macs: int | None
) -> dict[str, float | None]:
    """Return the added cost in percent of the backbone's cost of one image, by three conventions.

    ``published``: the whole sequence of S images. ``per_image``: that divided by S. ``streaming``: one more image while
    the history's keys and values are kept (causal attention, or one layer); None for a method that cannot keep state.
    All are None if the backbone's cost is unknown.
    """
    if backbone_macs is None:
        return dict.fromkeys(("published", "per_image", "streaming"))
    share = 100.0 / backbone_macs
    return {
        "published": None if sequence_macs is None else sequence_macs * share,
        "per_image": None if sequence_macs is None else sequence_macs / images * share,
        "streaming": None if streaming_macs is None else streaming_macs * share,
    }


def training_bytes(module: torch.nn.Module, shape: tuple[int, ...], batch: int, moments: int = 2) -> int:
    """Return the memory that training takes at least, in bytes, with float32 numbers.

    It holds the parameters, gradients and moments of those that are trained, a batch of inputs, and what PyTorch keeps
    of it for the backward pass. Workspace of single operations is left out.

    Args:
        module: maps a batch [B, ...] to one tensor; it may be on the meta device.
        shape: of one input.
        batch: B.
        moments: that the optimiser keeps of a parameter: 2 of Adam, 0 of plain SGD.
    """
    import torch

    parameters = list(module.parameters())
    sizes = {p.untyped_storage()._cdata: p.nbytes for p in parameters}
    inputs = torch.empty(batch, *shape, device=parameters[0].device)
    kept = [inputs.untyped_storage()]  # held, so that no other storage gets its address
    sizes[kept[0]._cdata] = inputs.nbytes

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in sizes:
            sizes[storage._cdata] = storage.nbytes()
            kept.append(storage)
        return tensor

    module.train()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(inputs)
    return sum(sizes.values()) + (1 + moments) * sum(p.nbytes for p in parameters if p.requires_grad)


def counted(work: Callable[[], _Made]) -> tuple[int, _Made]:
    """Return the MACs of some work by PyTorch's counter, and its result: matrix products and convolutions, no biases.

    The fast path of `torch.nn.TransformerEncoderLayer`, which the counter does not see, is off meanwhile.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            made = work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2, made  # the counter reports 2 operations per multiply-accumulate


def count_macs(module: torch.nn.Module, *inputs: Any) -> int:
    """Count the MACs of one forward pass in evaluation mode, as `counted` does."""
    import torch

    mode = module.training
    module.eval()
    try:
        with torch.no_grad():
            return counted(lambda: module(*inputs))[0]
    finally:
        module.train(mode)


def count_step_macs(module: torch.nn.Module, inputs: torch.Tensor, trained: Collection[str] | None = None) -> int:
    """Count the MACs of logits and of the gradients of the parameters named ``trained``; None: of all."""
    import torch

    mode, before = module.training, {name: p.requires_grad for name, p in module.named_parameters()}
    try:
        for name, p in module.named_parameters():
            p.requires_grad_(trained is None or name in trained)
        own = [p for p in module.parameters() if p.requires_grad]
        module.eval()
        with torch.enable_grad():
            return counted(lambda: torch.autograd.grad(module(inputs).sum(), own, allow_unused=True))[0]
    finally:
        module.train(mode)
        for name, p in module.named_parameters():
            p.requires_grad_(before[name])
