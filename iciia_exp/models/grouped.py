"""Grouped projection with shuffle, in the forms that a CPU computes fastest."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GroupedLinear"]


# Groups are joined until a block is about this wide: on a CPU, 40 x 40 is the fastest for blocks of 5 x 5, though seven
# eighths of it are zeros (benchmarks/bench_iciia.py). For fewer vectors, joining costs more than it saves.
_JOINED_WIDTH, _JOINED_VECTORS = 48, 16

# A convolution needs no more outputs than a vector register holds, and its layout makes the shuffle cheap.
_CONVOLVED_OUTPUTS, _CONVOLVED_VECTORS = 16, 64

# Without AVX-512, a convolution of fewer inputs than a vector register holds is slower than the products.
_CONVOLVED_INPUTS = 1 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8

_CONVOLVE = torch.backends.mkldnn.is_available()


def _recording() -> bool:
    """Return whether calls are being recorded (`torch.export`, `torch.compile`, tracing)."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class GroupedLinear(nn.Module):
    """A linear map whose weight is block-diagonal, followed by a shuffle of the output across groups.

    Inputs are cut into ``groups`` neighbouring slices, one for each block. The result, [groups, out/groups], is
    transposed and flattened, so that neighbouring outputs come from different groups; the bias is added after the
    shuffle. With one group it is `torch.nn.Linear`, with the same parameter shapes.

    Shapes: input [..., in_features], output [..., out_features]; weight [out, in] for one group, else
    [G, out/G, in/G]; bias [out].
    """

    def __init__(self, in_features: int, out_features: int, groups: int = 1, shuffle: bool = True) -> None:
        super().__init__()
        if in_features % groups or out_features % groups:
            raise ValueError(f"groups={groups} does not divide {in_features} -> {out_features}")
        self.in_features, self.out_features, self.groups, self.shuffle = in_features, out_features, groups, shuffle
        shape = (out_features // groups, in_features // groups)
        self.weight = nn.Parameter(torch.empty(shape if groups == 1 else (groups, *shape)))
        self.bias = nn.Parameter(torch.empty(out_features))
        self._kept: dict[str, tuple[tuple[int, ...], tuple[Tensor, ...]]] = {}  # forms of frozen weights
        self.reset_parameters()

    def blocks(self) -> Tensor:
        """Return the weight as [G, out/G, in/G]."""
        return self.weight.view(self.groups, self.out_features // self.groups, self.in_features // self.groups)

    def reset_parameters(self) -> None:
        """Initialise as `torch.nn.Linear` does, per group: kaiming-uniform(sqrt 5), bias in +-1/sqrt(in/G)."""
        for block in self.blocks():
            nn.init.kaiming_uniform_(block, a=math.sqrt(5))
        bound = 1.0 / math.sqrt(self.in_features // self.groups)
        nn.init.uniform_(self.bias, -bound, bound)

    def reset_attention_parameters(self) -> None:
        """Initialise as an attention projection, per group: xavier-uniform, zero bias."""
        for block in self.blocks():
            nn.init.xavier_uniform_(block)
        nn.init.zeros_(self.bias)

    @property
    def joined(self) -> int:
        """Number of neighbouring groups that are computed as one block."""
        return self._most_joined(_JOINED_WIDTH // (self.in_features // self.groups))

    def _most_joined(self, most: int) -> int:
        most = min(self.groups, max(1, most))
        return max(m for m in range(1, most + 1) if self.groups % m == 0)

    def _in_form(self, form: str, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return the weights in the form that ``make`` gives them, kept while they are frozen and unchanged.

        Weights in training are converted every time: a fused optimiser changes them and not their version number.
        """
        parameters = self.weight, self.bias
        if any(p.requires_grad or p.is_inference() for p in parameters) or _recording():
            self._kept.clear()
            return make()
        state = tuple(number for p in parameters for number in (p._version, p.data_ptr()))
        if form not in self._kept or self._kept[form][0] != state:
            self._kept[form] = state, make()
        return self._kept[form][1]

    def _matrices(self) -> tuple[Tensor]:
        """Return the weight as [G/J, J*in/G, out/G*J] for J joined groups, zero between different groups.

        Outputs of a block are ordered by (output of a group, group), so that the shuffle moves runs of J numbers.
        """
        blocks_BJoi = self.blocks().unflatten(0, (-1, self.joined))
        joined_BJioJ = torch.diag_embed(blocks_BJoi.permute(0, 3, 2, 1), dim1=1, dim2=4)
        return (joined_BJioJ.flatten(3).flatten(1, 2),)

    def _kernels(self) -> tuple[Tensor, Tensor]:
        """Return weight [out, J*in/G, 1, 1] and bias [out] of a convolution, outputs ordered by group."""
        joined = self._most_joined(_CONVOLVED_OUTPUTS // (self.out_features // self.groups))
        blocks_BJoi = self.blocks().unflatten(0, (-1, joined))
        joined_BJoJi = torch.diag_embed(blocks_BJoi.permute(0, 2, 3, 1), dim1=1, dim2=3)
        bias = self.bias.view(-1, self.groups).t().flatten() if self.shuffle else self.bias
        return joined_BJoJi.reshape(self.out_features, -1, 1, 1), bias

    def _convolved(self, x: Tensor, vectors: int) -> bool:
        """Return whether a convolution is faster: 2 to 5 times on a CPU, but seldom with its gradient."""
        if not _CONVOLVE or _recording() or vectors < _CONVOLVED_VECTORS:
            return False
        if self.in_features // self.groups < _CONVOLVED_INPUTS:
            return False
        recorded = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        return x.device.type == "cpu" and x.dtype == torch.float32 and not recorded

    def _convolve(self, x: Tensor, vectors: int) -> Tensor:
        """Project, add the bias and shuffle, as `forward`.

        Vectors become the pixels of images, channels last. The layout decides the speed (benchmarks/bench_iciia.py): a
        single thread needs 16 images or more; wide blocks are fastest with columns of pixels, narrow blocks with rows,
        and blocks of 16 x 16 with squares.
        """
        weight, bias = self._in_form("kernels", self._kernels)
        width, threads = weight.shape[1], torch.get_num_threads()
        images = 16 if threads == 1 else 1 if width > 16 else min(16, threads)
        pixels = -(-vectors // images)
        shape = (pixels, 1) if width > 16 else (1, pixels)
        if width == 16 and vectors >= 256:
            pixels, shape = 16, (4, 4)
        lead = x.shape[:-1]
        if short := -vectors % pixels:
            x = F.pad(x.reshape(vectors, -1), (0, 0, 0, short))
        x_NDhw = x.reshape(-1, *shape, self.in_features).permute(0, 3, 1, 2)
        y_NEhw = F.conv2d(x_NDhw, weight, bias, groups=self.in_features // width)
        if self.shuffle:
            y_NEhw = torch.native_channel_shuffle(y_NEhw, self.groups)
        y_NhwE = y_NEhw.permute(0, 2, 3, 1)
        if short:
            y_NhwE = y_NhwE.reshape(-1, self.out_features)[:vectors]
        return y_NhwE.reshape(*lead, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Project, shuffle, add the bias; costs in*out/G multiply-accumulates per vector (see `joined`)."""
        if self.groups == 1:
            return F.linear(x, self.weight, self.bias)
        lead, vectors = x.shape[:-1], x.numel() // self.in_features
        if self._convolved(x, vectors):
            return self._convolve(x, vectors)
        # exported for any number of vectors, it must not depend on it
        joined = self.joined if isinstance(vectors, int) and vectors >= _JOINED_VECTORS else 1
        blocks, outputs = self.groups // joined, self.out_features // self.groups
        x_BMi = x.reshape(vectors, blocks, -1).transpose(0, 1)
        weight_Bio = self.weight.transpose(1, 2) if joined == 1 else self._in_form("matrices", self._matrices)[0]
        y_BMoJ = torch.bmm(x_BMi, weight_Bio).view(blocks, vectors, outputs, joined)
        # [B, M, o, J] -> [M, o, B, J]: the outputs of one group end up G apart
        y = y_BMoJ.permute(1, 2, 0, 3) if self.shuffle else y_BMoJ.permute(1, 0, 3, 2)
        return y.reshape(*lead, self.out_features).add_(self.bias)  # in place: the reshape has just copied

    def extra_repr(self) -> str:
        """Return the sizes for ``repr``."""
        return f"{self.in_features}, {self.out_features}, groups={self.groups}, shuffle={self.shuffle}"
