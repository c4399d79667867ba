"""Gather: one tensor of tokens from the levels of a vision transformer, or from the stages of a convolutional network.

Source: "Minimal Interaction Separated Tuning" (CVPR 2025, arXiv 2406.17559): z_0 are the tokens after patch embedding
and positions, z_i those after block i, and z_first + ... + z_last is sent. The pooled grid is ours, and so are the
levels of a convolutional network: the output of each stage, averaged to the grid of the last one and brought to the
largest number of channels, is a token for each place, after their mean as class token.

Legend: B images, n tokens, p of them before the patches (class and register tokens), d features, N blocks, J stages
with c channels each, g side of the grid.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from iciia_exp.errors import ConfigError, UserError, check_int
from iciia_exp.seeding import generator

__all__ = ["CHANNELS", "TOKEN_ARRAYS", "Gather", "levels", "stage_levels", "stages", "token_arrays"]


class Gather:
    """Which levels are added up, and how many patches are kept.

    Args:
        first: the first level; 0 is the input of the first block, or the output of the first stage.
        last: the last level, ``first`` to N; null is N.
        grid: g: patches are averaged to g x g; null keeps all.
        levels: number of levels after level 0: N, or J - 1.
        patches: of the network, without class and register tokens.
        what: of the network makes a level.

    Raises a `ConfigError` for ``gather_first``, ``gather_last`` or ``gather_grid`` if the network does not have it.
    """

    def __init__(
        self, first: int, last: int | None, grid: int | None, levels: int, patches: int, what: str = "blocks"
    ) -> None:
        depth = f"the network has {levels + (what == 'stages')} {what}"
        self.first = check_int("gather_first", first, 0, levels, depth)
        self.last = levels if last is None else check_int("gather_last", last, first, levels, depth)
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

#: Held by the one thread that reads values inside of a network.
_READING = threading.Lock()


@contextmanager
def _read_inside(module: nn.Module, found: list[Tensor], inputs: bool = False) -> Iterator[None]:
    """Append a module's outputs, or its ``inputs``, to a list; those of other threads are left out."""
    thread = threading.get_ident()

    def read_output(_: nn.Module, __: Any, output: Tensor) -> None:
        if threading.get_ident() == thread:
            found.append(output)

    def read_input(_: nn.Module, values: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            found.append(values[0])

    register: Any = module.register_forward_pre_hook if inputs else module.register_forward_hook
    handle = register(read_input if inputs else read_output)
    try:
        yield
    finally:
        handle.remove()


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
    found, prefix = [], bool(net.num_prefix_tokens)
    with _READING, _read_inside(net.blocks[0], found, inputs=True):
        last, blocks = net.forward_intermediates(images, return_prefix_tokens=prefix, norm=False, output_fmt="NLC")
    found += [torch.cat([first, patches], 1) for patches, first in blocks] if prefix else blocks
    return found, net.forward_head(last, pre_logits=True)


def stages(net: Any) -> list[nn.Module]:
    """Return the stages of one of timm's convolutional networks; empty if it has none.

    They are the parts of ``blocks`` (MobileNet, EfficientNet) or ``stages`` (ConvNeXt), or ``layer1`` ... (ResNet).
    """
    for name in ("blocks", "stages"):
        if isinstance(parts := getattr(net, name, None), nn.Sequential):
            return [*parts]
    return [layer for i in range(1, 9) if isinstance(layer := getattr(net, f"layer{i}", None), nn.Module)]


#: How the stages of a convolutional network come to one width.
CHANNELS = ("pad", "project")


def stage_levels(net: Any, images: Tensor, channels: str) -> tuple[list[Tensor], Tensor]:
    """Return the levels of one of timm's convolutional networks, [B, 1 + g^2, d] each, and its feature [B, D].

    d is the largest number of channels of a stage. With ``pad`` others get zeros, with ``project`` they are multiplied
    by a fixed matrix c x d with orthonormal rows.
    """
    found: list[Tensor] = []
    with _READING, ExitStack() as stack:
        for stage in stages(net):
            stack.enter_context(_read_inside(stage, found))
        features = net(images)
    info = net.feature_info[-1]
    if any(x.ndim != 4 for x in found) or found[-1].shape[1] != info["num_chs"]:
        shapes = ", ".join(str(list(x.shape[1:])) for x in found)
        raise UserError(f"{type(net).__name__}: its stages give {shapes}, and not channels x height x width; no tokens")
    dim, grid = max(x.shape[1] for x in found), found[-1].shape[-2:]
    return [_as_tokens(x, dim, grid, channels, j) for j, x in enumerate(found)], features


def _as_tokens(x_Bchw: Tensor, dim: int, grid: Sequence[int], channels: str, number: int) -> Tensor:
    tokens_Bnc = nn.functional.adaptive_avg_pool2d(x_Bchw, (grid[0], grid[1])).flatten(2).transpose(1, 2)
    width = tokens_Bnc.shape[2]
    if channels == "pad" or width == dim:
        tokens_Bnd = nn.functional.pad(tokens_Bnc, (0, dim - width))
    else:
        tokens_Bnd = tokens_Bnc @ _orthonormal(width, dim, number).to(tokens_Bnc)
    return torch.cat([tokens_Bnd.mean(1, keepdim=True), tokens_Bnd], 1)


@cache
def _orthonormal(rows: int, columns: int, number: int) -> Tensor:
    """Return a fixed matrix with orthonormal rows, by QR of normal numbers."""
    drawn = torch.from_numpy(generator("gather", number).standard_normal((columns, rows)))
    return torch.linalg.qr(drawn).Q.T.float()


def token_arrays(
    net: Any, images: Tensor, gather: Gather, wanted: frozenset[str], channels: str = "pad"
) -> dict[str, Tensor]:
    """Return arrays of one of timm's networks, from one pass over B images.

    ``features`` [B, D] always; if wanted, ``tokens`` [B, n, d], the sum of the gathered levels; ``levels``
    [B, L, n, d], each of them; and of a vision transformer ``block_input`` [B, n, d], the input of the last block, all
    its tokens. ``channels`` is that of `stage_levels`.
    """
    convolutional = not hasattr(net, "num_prefix_tokens")
    found, features = stage_levels(net, images, channels) if convolutional else levels(net, images)
    arrays, prefix = {"features": features}, 1 if convolutional else net.num_prefix_tokens
    if "tokens" in wanted:
        arrays["tokens"] = gather(found, prefix)
    if "levels" in wanted:
        arrays["levels"] = torch.stack([gather.pooled(z, prefix) for z in found[gather.first : gather.last + 1]], 1)
    if "block_input" in wanted:
        arrays["block_input"] = found[-2]
    return arrays
