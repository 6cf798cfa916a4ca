"""The post-norm block of HRM, TRM and EqR, without biases and without norm weights.

B puzzles, S positions (prefix and cells), D width, h head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phantom.validate import check_count, check_number

EPS = 1e-5
ROTARY_BASE = 10_000.0
# standard deviation of a standard normal cut off at +-2
CUT_DEVIATION = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


def cut_normal_(tensor: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """Fill `tensor` from a normal cut off at two sigma, with sigma = std / 0.8796 so that `std` is what comes out."""
    sigma = std / CUT_DEVIATION
    return nn.init.trunc_normal_(tensor, std=sigma, a=-2 * sigma, b=2 * sigma, generator=generator)


def linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a linear map without bias, of weights with standard deviation 1 / sqrt(in_features)."""
    layer = nn.Linear(in_features, out_features, bias=False)
    cut_normal_(layer.weight.data, in_features**-0.5)
    return layer


def rms_norm(x: Tensor) -> Tensor:
    """Return x / sqrt(mean(x^2) + 1e-5) over the last axis, computed in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, wide.shape[-1:], eps=EPS).to(x.dtype)


def hidden_width(width: int, expansion: float, multiple: int) -> int:
    """Return the inner width of a SwiGLU: `width` * `expansion` * 2 / 3, rounded up to a multiple of `multiple`.

    Raises:
        ValueError: `expansion` or `multiple` is out of range.
    """
    check_number("expansion", expansion, "> 0", also=": the inner width is a multiple of the outer one")
    check_count("multiple", multiple, least=1)
    return multiple * max(1, -(-round(width * expansion * 2 / 3) // multiple))


class SwiGLU(nn.Module):
    """x -> (silu(gate) * value) W_down with [gate, value] = x W_up, over the last axis.

    Args:
        width: of x.
        hidden: of gate and value.

    Source: Shazeer, *GLU variants improve transformer* (2020).
    """

    def __init__(self, *, width: int, hidden: int) -> None:
        super().__init__()
        self.up = linear(width, 2 * hidden)
        self.down = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Attention(nn.Module):
    """Self-attention over all positions, without a mask, with rotary positions where `rotary` is given.

    Source: Su et al., *RoFormer* (2021); see `rotate` for the pairing of channels.
    """

    def __init__(self, *, width: int, num_heads: int) -> None:
        super().__init__()
        check_count("num_heads", num_heads, least=1)
        if width % (2 * num_heads):
            raise ValueError(f"d_model={width} must be a multiple of 2 * num_heads={2 * num_heads}")
        self.num_heads = num_heads
        self.query_key_value = linear(width, 3 * width)
        self.output = linear(width, width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, length, width = x.shape
        parts = self.query_key_value(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # (B, heads, S, h) each
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, width))


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn channel pairs of `x` (B, heads, S, h) by the angles of their positions, of tables (S, axes, h / axes).

    The channels of a head are split among the axes; in each part, of size s, channel i turns with channel i + s / 2.
    """
    wide = torch.promote_types(x.dtype, torch.float32)  # the angles of far positions have no room in bfloat16
    parts = x.to(wide).unflatten(-1, cosines.shape[1:])
    first, second = parts.chunk(2, dim=-1)
    turned = parts * cosines.to(wide) + torch.cat([-second, first], dim=-1) * sines.to(wide)
    return turned.flatten(-2).to(x.dtype)


def rotary_tables(positions: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (S, axes, h / axes) in float64.

    `positions` (S, axes) are numbers, or rows and columns. Pair i of a part of size s turns by
    position * base^(-2i / s), with base 10000.
    """
    size = head_size // positions.shape[1]
    rates = ROTARY_BASE ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = positions.double()[:, :, None] * rates
    angles = torch.cat([angles, angles], dim=2)
    return angles.cos(), angles.sin()


class AttentionBlock(nn.Module):
    """a = norm(x + Attention(x)); x' = norm(a + SwiGLU(a)).

    Args:
        width: D.
        length: S; not needed.
        num_heads: heads of the attention.
        expansion: of the SwiGLU.
        multiple: its inner width is rounded up to a multiple of this (official: 256).
    """

    def __init__(self, *, width: int, length: int, num_heads: int, expansion: float, multiple: int) -> None:
        super().__init__()
        self.mix = Attention(width=width, num_heads=num_heads)
        self.mlp = SwiGLU(width=width, hidden=hidden_width(width, expansion, multiple))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        x = rms_norm(x + self.mix(x, rotary))
        return rms_norm(x + self.mlp(x))


class MixerBlock(nn.Module):
    """a = norm over positions of (x + SwiGLU over positions(x)); x' = norm(a + SwiGLU(a)).

    The first norm runs over the positions of one channel, not over the channels of one position. S is fixed at
    construction; the block needs no positional encoding.
    """

    def __init__(self, *, width: int, length: int, expansion: float, multiple: int) -> None:
        super().__init__()
        self.mix = SwiGLU(width=length, hidden=hidden_width(length, expansion, multiple))
        self.mlp = SwiGLU(width=width, hidden=hidden_width(width, expansion, multiple))

    def forward(self, x: Tensor, rotary: None) -> Tensor:
        across = x.mT
        x = rms_norm(across + self.mix(across)).mT
        return rms_norm(x + self.mlp(x))


class Stack(nn.Module):
    """f(h, injection) = blocks(h + injection): one addition in front, `num_layers` blocks.

    Args:
        width: D.
        length: S.
        num_layers: blocks.
        block: makes a block from `width` and `length`.
    """

    def __init__(self, *, width: int, length: int, num_layers: int, block: type[nn.Module]) -> None:
        super().__init__()
        check_count("num_layers", num_layers, least=1)
        self.blocks = nn.ModuleList(block(width=width, length=length) for _ in range(num_layers))

    def forward(self, h: Tensor, injection: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        h = h + injection
        for block in self.blocks:
            h = block(h, rotary)
        return h
