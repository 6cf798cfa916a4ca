"""The equilibrium cell of MDEQ: residual blocks per resolution, fusion across resolutions, 1x1 mixing.

Shapes: B images, C_i channels and H_i x W_i pixels of branch i (0 the finest), E expansion, G norm groups.
Source: Bai et al., *Multiscale Deep Equilibrium Models* (2020), with the details of the code of Geng et al. 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mdeq.convolution import Convolution, Padded, Plain, Tied
from models.mdeq.group_norm import GroupNorm
from phantom import WeightNorm, variational_mask
from phantom.layers import cast_for_autocast, check_dropout
from phantom.validate import check_triton

if TYPE_CHECKING:
    from models.mdeq.kernels import Packed

Branches = tuple[Tensor, ...]  # one (B, C_i, H_i, W_i) tensor per branch
Masks = tuple[tuple[Tensor | None, ...], ...]  # per branch, per block
Weights = tuple[Tensor, ...]


class BoundBlock(NamedTuple):
    """Effective weights, dropout mask and injection of one residual block, fixed during a solve.

    Args:
        mask: (B, C, 1, 1), or None for no dropout.
        u: (B, C, H, W), or None for zeros.
        packed: both weights as the kernels read them, where they are used.
    """

    conv1: Tensor
    conv2: Tensor
    mask: Tensor | None
    u: Tensor | None
    packed: Packed | None = None


class Bound(NamedTuple):
    """The tensors that the cell keeps fixed during a solve.

    Args:
        blocks: per branch, per block.
        fusion: weights of the stages of T_ij, per target i and source j.
        post_fuse: effective weight of the last convolution, per branch.
    """

    blocks: tuple[tuple[BoundBlock, ...], ...]
    fusion: tuple[tuple[Weights, ...], ...]
    post_fuse: Weights


class ResidualBlock(nn.Module):
    """One residual block of a branch; its 3x3 convolutions (C -> E C -> C) are weight-normalised.

    t = GN(mask * conv2(relu(GN(conv1(z)))) + u) + z, and the output is GN(relu(t)).
    """

    fused = False  # set by `MDEQCell.fuse`
    convolution: Convolution = Plain()  # and this by `fuse` and `pad`

    def __init__(self, channels: int, *, expansion: int, num_groups: int) -> None:
        super().__init__()
        inner = expansion * channels
        self.conv1 = WeightNorm(nn.Conv2d(channels, inner, 3, bias=False).weight)
        self.norm1 = GroupNorm(num_groups, inner)
        self.conv2 = WeightNorm(nn.Conv2d(inner, channels, 3, bias=False).weight)
        self.norm2 = GroupNorm(num_groups, channels)
        self.norm3 = GroupNorm(num_groups, channels)

    def bind(self, u: Tensor | None, mask: Tensor | None) -> BoundBlock:
        """Compute the effective weights of one solve."""
        weights = cast_for_autocast(self.conv1()), cast_for_autocast(self.conv2())
        packed = None
        if self.fused:
            from models.mdeq import kernels

            packed = kernels.packed(*weights)
        first, second = map(self.convolution.bind, weights)
        return BoundBlock(first, second, mask, u, packed)

    def forward(self, z: Tensor, bound: BoundBlock) -> Tensor:
        if bound.packed is not None and not torch.is_grad_enabled():
            from models.mdeq import kernels

            norms = (self.norm1, self.norm2, self.norm3)
            if kernels.fits(z, bound.packed, self.norm1.num_groups):
                return kernels.residual_block(z, bound.packed, bound.mask, bound.u, norms)
        # in place, under autograd too: no operation here saves a tensor that the next one overwrites
        t = self.norm1(self.convolution(z, bound.conv1, self.norm1.num_channels)).relu_()
        t = self.convolution(t, bound.conv2, self.norm2.num_channels)
        if bound.mask is not None:
            t = t.mul_(bound.mask)
        if bound.u is not None:
            t = t.add_(bound.u)
        return self.norm3(self.norm2(t).add_(z).relu_())


class PostFuse(nn.Module):
    """Mix the channels of a fused branch: GN(conv1x1(relu(s))), with weight normalisation and half as many groups."""

    convolution: Convolution = Plain()

    def __init__(self, channels: int, *, num_groups: int) -> None:
        super().__init__()
        self.conv = WeightNorm(nn.Conv2d(channels, channels, 1, bias=False).weight)
        self.norm = GroupNorm(num_groups // 2, channels)

    def bind(self) -> Tensor:
        """Compute the effective weight of one solve."""
        return self.convolution.bind(cast_for_autocast(self.conv()))

    def forward(self, s: Tensor, weight: Tensor) -> Tensor:
        return self.norm(self.convolution(s.relu_(), weight, self.norm.num_channels))


class Stage(nn.Module):
    """One stage of a transition between branches: GN(conv(x)), then relu where another stage follows."""

    convolution: Convolution = Plain()

    def __init__(self, conv: nn.Conv2d, *, num_groups: int, relu: bool) -> None:
        super().__init__()
        self.conv = conv
        self.norm = GroupNorm(num_groups, conv.out_channels)
        self.relu = relu

    def bind(self) -> Tensor:
        """Return the weight of one solve."""
        return self.convolution.bind(cast_for_autocast(self.conv.weight))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        x = self.norm(self.convolution(x, weight, self.norm.num_channels, stride=self.conv.stride[0]))
        return x.relu_() if self.relu else x


class MDEQCell(nn.Module):
    """The map F of MDEQ: residual blocks per branch, then a sum over all branches in every branch.

    b_i = block_i(z_i, u_i); s_i = sum_j T_ij(b_j) with T_ii the identity; F_i = GN(conv1x1(relu(s_i))). From a coarser
    branch (j > i) T_ij is a 1x1 convolution, GN and nearest upsampling; from a finer one (j < i), i - j stages of
    strided 3x3 convolution and GN, with relu between stages.

    Args:
        channels: C_i, finest branch first.
        expansion: E, ratio of inner to outer channels of a residual block.
        num_groups: G, groups of every GroupNorm; the post-fuse norm has G // 2.
        num_blocks: residual blocks per branch; only the first receives the injection.
        dropout: probability of the variational dropout in each residual block.
    """

    # ModuleLists: by branch and block, by target and source, by branch
    branches: Any
    fusion: Any
    post_fuse: Any

    def __init__(
        self, *, channels: Sequence[int], expansion: int, num_groups: int, num_blocks: int, dropout: float
    ) -> None:
        super().__init__()
        check_dropout(dropout)
        self.channels = tuple(channels)
        self.dropout = dropout
        self.branches = nn.ModuleList(
            nn.ModuleList(ResidualBlock(c, expansion=expansion, num_groups=num_groups) for _ in range(num_blocks))
            for c in self.channels
        )
        levels = range(len(self.channels))
        self.fusion = nn.ModuleList(
            nn.ModuleList(_transition(self.channels, source=j, target=i, num_groups=num_groups) for j in levels)
            for i in levels
        )
        self.post_fuse = nn.ModuleList(PostFuse(c, num_groups=num_groups) for c in self.channels)

    def fuse(self) -> None:
        """Let evaluations without a graph use the Triton kernels of `models.mdeq.kernels`, where these serve the state.

        Those with a graph share one weight gradient, see `models.mdeq.convolution.Tied`.

        Raises:
            ValueError: Triton is not installed.
        """
        check_triton()
        for module in self.branches.modules():
            if isinstance(module, ResidualBlock):
                module.fused = True
        self._convolve_by(Tied())

    def pad(self) -> None:
        """Let convolutions see channels padded to what matrix units like, see `models.mdeq.convolution.Padded`."""
        self._convolve_by(Padded())

    def _convolve_by(self, convolution: Convolution) -> None:
        for module in self.modules():
            if isinstance(module, (ResidualBlock, PostFuse, Stage)):
                module.convolution = convolution

    def bind(
        self, injection: tuple[Tensor | None, ...], *, masks: Masks | None = None
    ) -> Callable[[Branches], Branches]:
        """Return f(z) = F(z, u) with injection, effective weights and dropout masks fixed.

        Args:
            injection: u_i of every branch, None for zeros; u_0 is always a tensor.
            masks: dropout mask (B, C_i, 1, 1) or None of every block; None draws them here.
        """
        if masks is None:
            assert injection[0] is not None, "u_0 is always a tensor"
            masks = self._draw(injection[0])
        blocks = tuple(
            tuple(
                block.bind(u if j == 0 else None, mask) for j, (block, mask) in enumerate(zip(row, drawn, strict=True))
            )
            for row, drawn, u in zip(self.branches, masks, injection, strict=True)
        )
        fusion = tuple(tuple(tuple(stage.bind() for stage in stages) for stages in row) for row in self.fusion)
        return partial(self, bound=Bound(blocks, fusion, tuple(layer.bind() for layer in self.post_fuse)))

    def forward(self, z: Branches, bound: Bound) -> Branches:
        """Apply F once. Everything that varies is an argument, so `cell.compile()` makes one graph."""
        b = []
        for x, row, bound_row in zip(z, self.branches, bound.blocks, strict=True):
            for block, bound_block in zip(row, bound_row, strict=True):
                x = block(x, bound_block)
            b.append(x)
        layers = zip(self.post_fuse, bound.fusion, bound.post_fuse, strict=True)
        return tuple(layer(self._fuse(i, b, weights), weight) for i, (layer, weights, weight) in enumerate(layers))

    def _fuse(self, i: int, b: list[Tensor], weights: tuple[Weights, ...]) -> Tensor:
        """Return s_i, a new tensor that the caller may overwrite; b does not change."""

        def moved(j: int) -> Tensor:
            x = b[j]
            for stage, weight in zip(self.fusion[i][j], weights[j], strict=True):
                x = stage(x, weight)
            return _resize(x, b[i].shape[-2:])

        # the first T_ij(b_j) with j != i is a new tensor: add the other terms to it in place
        first = int(i == 0)
        s = moved(first)
        for j in range(len(b)):
            if j != first:
                s = s.add_(moved(j))
        return s

    def _draw(self, u: Tensor) -> Masks:
        dtype = self.post_fuse[0].norm.weight.dtype  # autocast may give u a narrower dtype
        return tuple(
            tuple(
                variational_mask(
                    (u.shape[0], c, 1, 1), p=self.dropout, training=self.training, device=u.device, dtype=dtype
                )
                for _ in row
            )
            for c, row in zip(self.channels, self.branches, strict=True)
        )


def _transition(channels: tuple[int, ...], *, source: int, target: int, num_groups: int) -> nn.ModuleList:
    """Return the stages of T_ij (target i, source j), none of the identity; the cell upsamples."""
    a, b = channels[source], channels[target]
    if source > target:
        return nn.ModuleList([Stage(nn.Conv2d(a, b, 1, bias=False), num_groups=num_groups, relu=False)])
    stages = []
    for level in range(source + 1, target + 1):
        last = level == target
        conv = nn.Conv2d(a, b if last else a, 3, stride=2, padding=1, bias=False)
        stages.append(Stage(conv, num_groups=num_groups, relu=not last))
    return nn.ModuleList(stages)


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="nearest")
