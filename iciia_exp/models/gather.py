"""Gather: one tensor of tokens from the levels of a vision transformer.

Source: "Minimal Interaction Separated Tuning" (CVPR 2025, arXiv 2406.17559): z_0 are the tokens after patch embedding
and positions, z_i those after block i, and z_first + ... + z_last is sent. The pooled grid is ours.

Legend: B images, n tokens, p of them before the patches (class and register tokens), d features, N blocks, g side of
the pooled grid.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from iciia_exp.errors import ConfigError, check_int

__all__ = ["TOKEN_ARRAYS", "Gather", "levels", "token_arrays"]


class Gather:
    """Which levels are added up, and how many patches are kept.

    Args:
        first: the first level, 0 to N; 0 is the input of the first block.
        last: the last level, ``first`` to N; null is N.
        grid: g: patches are averaged to g x g; null keeps all.
        blocks: N.
        patches: of the network, without class and register tokens.

    Raises a `ConfigError` for ``gather_first``, ``gather_last`` or ``gather_grid`` if the network does not have it.
    """

    def __init__(self, first: int, last: int | None, grid: int | None, blocks: int, patches: int) -> None:
        depth = f"the network has {blocks} blocks"
        self.first = check_int("gather_first", first, 0, blocks, depth)
        self.last = blocks if last is None else check_int("gather_last", last, first, blocks, depth)
        side = int(patches**0.5)
        if grid is not None:
            check_int("gather_grid", grid, 1, side, f"the network has {patches} patches")
            if side**2 != patches:
                raise ConfigError("gather_grid", grid, f"the network's {patches} patches are no square; use null")
        self.grid = grid

    def __call__(self, levels: Sequence[Tensor], prefix: int) -> Tensor:
        """Return the tokens of N + 1 levels [B, n, d] in one tensor [B, p + g^2, d]; ``prefix`` is p."""
        return self.pooled(torch.stack([*levels[self.first : self.last + 1]]).sum(0), prefix)

    def pooled(self, tokens_Bnd: Tensor, prefix: int) -> Tensor:
        """Return tokens with their patches averaged to the grid."""
        if self.grid is None:
            return tokens_Bnd
        first_Bpd, patches_Bnd = tokens_Bnd[:, :prefix], tokens_Bnd[:, prefix:]
        side = int(patches_Bnd.shape[1] ** 0.5)
        picture_Bdss = patches_Bnd.transpose(1, 2).unflatten(2, (side, -1))
        pooled_Bdgg = nn.functional.adaptive_avg_pool2d(picture_Bdss, self.grid)
        return torch.cat([first_Bpd, pooled_Bdgg.flatten(2).transpose(1, 2)], 1)


#: Names of the arrays of `token_arrays`.
TOKEN_ARRAYS = frozenset({"tokens", "levels", "block_input"})


def token_arrays(net: Any, images: Tensor, gather: Gather, wanted: frozenset[str]) -> dict[str, Tensor]:
    """Return arrays of one of timm's vision transformers, from one pass over B images.

    ``features`` [B, D] always; if wanted, ``tokens`` [B, n, d], the sum of the gathered levels; ``levels``
    [B, L, n, d], each of them; ``block_input`` [B, n, d], the input of the last block, all its tokens.
    """
    found, features = levels(net, images)
    arrays, prefix = {"features": features}, net.num_prefix_tokens
    if "tokens" in wanted:
        arrays["tokens"] = gather(found, prefix)
    if "levels" in wanted:
        arrays["levels"] = torch.stack([gather.pooled(z, prefix) for z in found[gather.first : gather.last + 1]], 1)
    if "block_input" in wanted:
        arrays["block_input"] = found[-2]
    return arrays


#: Held by the one thread whose input of the first block is being read.
_READING = threading.Lock()


def levels(net: Any, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the levels z_0 ... z_N of one of timm's vision transformers, [B, n, d] each, and its feature [B, D].

    Class and register tokens come first. The final norm is not part of z_N.
    """
    if isinstance(net, VisionTransformer):
        x_Bnd = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(images))))
        found = [x_Bnd]
        for block in net.blocks:
            x_Bnd = block(x_Bnd)
            found.append(x_Bnd)
        return found, net.forward_head(net.norm(x_Bnd), pre_logits=True)
    # BEiT, EVA-02 ...: timm's `forward_intermediates` has no z_0
    found, thread, prefix = [], threading.get_ident(), bool(net.num_prefix_tokens)

    def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            found.append(inputs[0])

    with _READING:
        handle = net.blocks[0].register_forward_pre_hook(read)
        try:
            last, blocks = net.forward_intermediates(images, return_prefix_tokens=prefix, norm=False, output_fmt="NLC")
        finally:
            handle.remove()
    found += [torch.cat([first, patches], 1) for patches, first in blocks] if prefix else blocks
    return found, net.forward_head(last, pre_logits=True)
