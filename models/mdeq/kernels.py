"""The residual block of MDEQ as two Triton kernels, for a GPU, channels_last and evaluations without a graph.

With t = relu(GN(conv1(z))) and s = mask * conv2(t) + u the block is GN(relu(GN(s) + z)), as in
`models.mdeq.cell.ResidualBlock`, which stays the definition. The first kernel reads z once per group and writes t; the
second reads t once and writes the output. Means and variances are exact, over values that never leave the registers,
so that the 27 passes of the block around its convolutions are gone.

Shapes: B images, C channels, I = E C inner channels, H x W pixels, G norm groups. An image of z is dense; from one to
the next there may be other parts of a solver's state.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# (a decorated function is Triton's language, not Python's)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.mdeq.group_norm import GroupNorm

MAX_PIXELS = 1024  # of an image: one program holds all of them
MAX_CHANNELS = 128
BLOCK_I = 32  # inner channels that the second kernel reads at a time
MAX_ROOM = 227 * 1024  # bytes of shared memory of a program on a Hopper GPU
SCRATCH = 4 * 1024  # bytes of it for sums over a group
# of a program. Compiled for sm_90 in bfloat16, MDEQ-Tiny's finest branch then spills 0 and 8 bytes a thread; at 4 and
# at 16 warps the second kernel spills 2 KB and 168 bytes. Two stages of float32 exceed the shared memory.
NUM_WARPS, NUM_STAGES = 8, 1
TAPS = tl.constexpr(9)


@triton.jit
def _offsets(PIXELS: tl.constexpr, H, W, tap):
    """Return the pixel that `tap` of a 3x3 convolution reads for every pixel, and whether it lies in the image."""
    p = tl.arange(0, PIXELS)
    y, x = p // W + tap // 3 - 1, p % W + tap % 3 - 1
    return y * W + x, (p < H * W) & (y >= 0) & (y < H) & (x >= 0) & (x < W)


@triton.jit
def conv_norm_relu(
    z,
    weight,
    gamma,
    beta,
    out,
    stride,
    H,
    W,
    eps,
    C: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PIXELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write relu(GN(conv(z))) of one image and one group: z (B, H, W, C), weight (3, 3, C, I), out (B, H, W, I).

    z has `stride` numbers from image to image. A group has GROUP channels, and a column block BLOCK_O of them: what the
    block has beyond is masked.
    """
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel, column = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    inside, own = tl.arange(0, PIXELS) < H * W, column < GROUP
    o = group * GROUP + column
    z += image * stride
    products = tl.zeros((PIXELS, BLOCK_O), dtype=tl.float32)
    for tap in range(TAPS):  # unrolled it spills
        pixel, there = _offsets(PIXELS, H, W, tap)
        rows = tl.load(
            z + pixel[:, None] * C + channel[None, :], mask=there[:, None] & (channel < C)[None, :], other=0.0
        )
        block = tl.load(
            weight + (tap * C + channel)[:, None] * I + o[None, :],
            mask=(channel < C)[:, None] & own[None, :],
            other=0.0,
        )
        products = tl.dot(rows.to(block.dtype), block, products, input_precision=PRECISION)
    known = inside[:, None] & own[None, :]
    mean = tl.sum(products) / (H * W * GROUP)  # what is masked is zero
    centred = tl.where(known, products - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred) / (H * W * GROUP) + eps)
    gamma_o = tl.load(gamma + o, mask=own, other=0.0).to(tl.float32)
    beta_o = tl.load(beta + o, mask=own, other=0.0).to(tl.float32)
    value = tl.maximum(centred * scale * gamma_o[None, :] + beta_o[None, :], 0.0)
    place = image * H * W * I + tl.arange(0, PIXELS)[:, None] * I + o[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=known)


@triton.jit
def _group_norm(s, known, gamma, beta, n, eps, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Return GN of s (P, BLOCK), zero where not `known`, whose groups are GROUP neighbouring columns of n numbers."""
    column = tl.arange(0, BLOCK)
    same = (column[:, None] // GROUP == column[None, :] // GROUP).to(tl.float32)
    mean = tl.sum(same * tl.sum(s, axis=0)[None, :], axis=1) / n
    centred = tl.where(known, s - mean[None, :], 0.0)
    square = tl.sum(same * tl.sum(centred * centred, axis=0)[None, :], axis=1) / n
    return centred * (tl.rsqrt(square + eps) * gamma)[None, :] + beta[None, :]


@triton.jit
def conv_norm_add_norm(
    t,
    weight,
    mask,
    u,
    z,
    gamma2,
    beta2,
    gamma3,
    beta3,
    out,
    stride,
    H,
    W,
    eps,
    C: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PIXELS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_U: tl.constexpr,
):
    """Write GN3(relu(GN2(mask * conv(t) + u) + z)) of one image.

    t (B, H, W, I), weight (3, 3, I, C), mask (B, C); u, z and out (B, H, W, C), z with `stride` from image to image.
    """
    image = tl.program_id(0).to(tl.int64)
    inner, column = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_C)
    inside, own = tl.arange(0, PIXELS) < H * W, column < C
    known = inside[:, None] & own[None, :]
    t += image * H * W * I
    s = tl.zeros((PIXELS, BLOCK_C), dtype=tl.float32)
    CHUNKS: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    for step in range(TAPS * CHUNKS):
        tap, i = step // CHUNKS, step % CHUNKS * BLOCK_I + inner
        pixel, there = _offsets(PIXELS, H, W, tap)
        rows = tl.load(t + pixel[:, None] * I + i[None, :], mask=there[:, None] & (i < I)[None, :], other=0.0)
        block = tl.load(
            weight + (tap * I + i)[:, None] * C + column[None, :], mask=(i < I)[:, None] & own[None, :], other=0.0
        )
        s = tl.dot(rows.to(block.dtype), block, s, input_precision=PRECISION)
    here = tl.arange(0, PIXELS)[:, None] * C + column[None, :]
    place = image * H * W * C + here
    if HAS_MASK:
        s *= tl.load(mask + image * C + column, mask=own, other=0.0).to(tl.float32)[None, :]
    if HAS_U:
        s += tl.load(u + place, mask=known, other=0.0).to(tl.float32)
    n = H * W * GROUP
    gamma, beta = tl.load(gamma2 + column, mask=own, other=0.0), tl.load(beta2 + column, mask=own, other=0.0)
    s = _group_norm(s, known, gamma.to(tl.float32), beta.to(tl.float32), n, eps, GROUP, BLOCK_C)
    rows = tl.load(z + image * stride + here, mask=known, other=0.0)
    s = tl.where(known, tl.maximum(s + rows.to(tl.float32), 0.0), 0.0)
    gamma, beta = tl.load(gamma3 + column, mask=own, other=0.0), tl.load(beta3 + column, mask=own, other=0.0)
    s = _group_norm(s, known, gamma.to(tl.float32), beta.to(tl.float32), n, eps, GROUP, BLOCK_C)
    tl.store(out + place, s.to(out.dtype.element_ty), mask=known)


class Packed(NamedTuple):
    """What the kernels read of a block's weights, fixed during a solve.

    Args:
        conv1: (3, 3, C, I); its dtype and that of `conv2` is that of the products.
        conv2: (3, 3, I, C).
        precision: of products of float32, in Triton's words.
        room: bytes of shared memory that a program of the device may have.
    """

    conv1: Tensor
    conv2: Tensor
    precision: str
    room: int


def packed(conv1: Tensor, conv2: Tensor) -> Packed:
    """Return the 3x3 weights (I, C, 3, 3) and (C, I, 3, 3) as the kernels read them, without a graph."""
    # torch allows TF32 by this switch, which its compiler cannot read inside f; bfloat16 products do not look at it
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    room = MAX_ROOM
    if conv1.is_cuda:
        room = torch.cuda.get_device_properties(conv1.device).shared_memory_per_block_optin
    return Packed(*(weight.detach().permute(2, 3, 1, 0).contiguous() for weight in (conv1, conv2)), precision, room)


INTERPRETED = not isinstance(conv_norm_relu, triton.JITFunction)


def fits(z: Tensor, weights: Packed, num_groups: int) -> bool:
    """Return whether the kernels serve z (B, C, H, W), whose inner channels are in `num_groups` groups."""
    batch, channels, height, width = z.shape
    group = weights.conv1.shape[-1] // num_groups
    return (
        (z.is_cuda or INTERPRETED)
        and batch > 0
        and height * width <= MAX_PIXELS
        and max(channels, group) <= MAX_CHANNELS
        and shared_memory(channels, group, height * width, weights.conv1.element_size()) <= weights.room
        and z.dtype in (torch.float32, torch.bfloat16)
        and z[:1].is_contiguous(memory_format=torch.channels_last)
    )


def shared_memory(channels: int, group: int, pixels: int, item: int) -> int:
    """Return the bytes of shared memory of the larger kernel's programs: an image, and a block of a weight."""
    first = block_of(channels) * (block_of(pixels) + block_of(group))
    second = BLOCK_I * (block_of(pixels) + block_of(channels))
    return item * max(first, second) + SCRATCH


def residual_block(
    z: Tensor,
    weights: Packed,
    mask: Tensor | None,
    u: Tensor | None,
    norms: tuple[GroupNorm, GroupNorm, GroupNorm],
    *,
    num_warps: int = NUM_WARPS,
) -> Tensor:
    """Return the residual block of z (B, C, H, W), in its dtype and dense in channels_last; see `fits`.

    Args:
        weights: by `packed`.
        mask: (B, C, 1, 1) or None.
        u: (B, C, H, W) or None; made channels_last where it is not.
        norms: of the block, in order.
        num_warps: of a program.
    """
    batch, channels, height, width = z.shape
    inner, groups = weights.conv1.shape[-1], norms[0].num_groups
    t = torch.empty((batch, height, width, inner), device=z.device, dtype=weights.conv2.dtype)
    out = torch.empty_like(z, memory_format=torch.channels_last)
    u = None if u is None else u.contiguous(memory_format=torch.channels_last)
    affine = [parameter for norm in norms for parameter in (norm.weight, norm.bias)]
    common: dict[str, Any] = {
        "C": channels,
        "I": inner,
        "BLOCK_C": block_of(channels),
        "PIXELS": block_of(height * width),
        "PRECISION": weights.precision,
        "num_warps": num_warps,
        "num_stages": NUM_STAGES,
    }
    conv_norm_relu[(batch, groups)](
        *(z, weights.conv1, *affine[:2], t, z.stride(0), height, width, norms[0].eps),
        GROUP=inner // groups,
        BLOCK_O=block_of(inner // groups),
        **common,
    )
    conv_norm_add_norm[(batch,)](
        *(t, weights.conv2, z if mask is None else mask, z if u is None else u, z, *affine[2:]),
        *(out, z.stride(0), height, width, norms[1].eps),
        GROUP=channels // groups,
        BLOCK_I=BLOCK_I,
        HAS_MASK=mask is not None,
        HAS_U=u is not None,
        **common,
    )
    return out


def block_of(size: int) -> int:
    """Return the side of the block that holds `size` numbers: matrix units want powers of two, and 16 at least."""
    return max(16, triton.next_power_of_2(size))
