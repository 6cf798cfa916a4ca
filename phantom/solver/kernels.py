"""Broyden's two passes over the stored steps as two Triton kernels, for states on a GPU.

Their plain forms, `ring.project` and `broyden._combine`, stay the definition. Every program holds one block of one
problem's state and walks the stored steps, so that a pass reads every number once. Sums over a problem are sums of
those over its blocks, in a fixed order.

Shapes: B problems, D unknowns each, n stored steps; float32 or float64, in which everything is added up.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# (a decorated function is Triton's language, not Python's)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phantom.runtime.host import has_numbers

# numbers of a state that a program holds, and its warps. Compiled for sm_90 in float32 a thread has 39 or 48 registers:
# a multiprocessor then holds ten programs or more, with 80 KB on their way. Not tuned on a GPU
BLOCK, NUM_WARPS = 2048, 4


@triton.jit
def _locate(program, D, BLOCK: tl.constexpr):
    """Return the problem of a program, where its block begins in (B, D), and how many numbers are left from there."""
    blocks = tl.cdiv(D, BLOCK)
    problem, begin = (program // blocks).to(tl.int64), program % blocks * BLOCK
    return problem, problem * D + begin, D - begin


@triton.jit(do_not_specialize=["n"])
def write_products(steps, v, products, n, stride, D, BLOCK: tl.constexpr):
    """Write <s_j, v> over one block: steps (n, B, D) with `stride` B D, v (B, D), products (B, blocks, n)."""
    program, d = tl.program_id(0), tl.arange(0, BLOCK)
    _, begin, left = _locate(program, D, BLOCK)
    own = tl.load(v + begin + d, mask=d < left, other=0.0)
    steps += begin
    products += program.to(tl.int64) * n
    for j in range(n):
        tl.store(products + j, tl.sum(own * tl.load(steps + d, mask=d < left, other=0.0)))
        steps += stride


@triton.jit(do_not_specialize=["n", "width"])
def write_step(steps, weights, scale, z, g, step, moved, squares, n, width, stride, D, BLOCK: tl.constexpr):
    """Write s = g / scale + sum_j w_j s_j, z + s and |s|^2 of one block.

    steps (n, B, D) with `stride` B D; weights (B, width), of which n count; scale (B,); squares (B, blocks); the
    others (B, D).
    """
    program, d = tl.program_id(0), tl.arange(0, BLOCK)
    problem, begin, left = _locate(program, D, BLOCK)
    s = tl.load(g + begin + d, mask=d < left, other=0.0) / tl.load(scale + problem)
    steps += begin
    weights += problem * width
    for j in range(n):
        s += tl.load(weights + j) * tl.load(steps + d, mask=d < left, other=0.0)
        steps += stride
    tl.store(step + begin + d, s, mask=d < left)
    tl.store(moved + begin + d, s + tl.load(z + begin + d, mask=d < left, other=0.0), mask=d < left)
    tl.store(squares + program, tl.sum(s * s))


INTERPRETED = not isinstance(write_step, triton.JITFunction)  # by TRITON_INTERPRET=1, which needs no GPU


def check_state(z: Tensor) -> None:
    """Raise ValueError unless the kernels can read `z`."""
    if not has_numbers(z) or not (z.is_cuda or INTERPRETED):
        raise ValueError(
            f"kernels=True needs a state of numbers on a GPU, got a {type(z).__name__} on {z.device}: leave it out here"
        )


def project(stored: Tensor, v: Tensor, *, num_warps: int = NUM_WARPS) -> Tensor:
    """Return <s_j, v> (B, n) of the stored steps (n, B, D), which are contiguous, and v (B, D)."""
    n, (batch, width), v = len(stored), v.shape, v.contiguous()
    products = v.new_empty((batch, triton.cdiv(width, BLOCK), n))
    with torch.cuda.device_of(v):
        write_products[(batch * products.shape[1],)](
            stored, v, products, n, batch * width, width, BLOCK=BLOCK, num_warps=num_warps
        )
    return products.sum(1)


def combine(
    step: Tensor,
    stored: Tensor,
    weights: Tensor,
    scale: Tensor,
    z: Tensor,
    g: Tensor,
    *,
    num_warps: int = NUM_WARPS,
) -> tuple[Tensor, Tensor]:
    """Write s = g / scale + sum_j w_j s_j into `step` (B, D), which is contiguous; return z + s (B, D), |s|^2 (B,).

    Args:
        stored: (n, B, D) steps s_j, contiguous; `step` is none of them.
        weights: (B, >= n), rows contiguous, of which the first n count.
        scale: (B, 1).
    """
    (batch, width), moved = step.shape, torch.empty_like(step)
    squares = step.new_empty((batch, triton.cdiv(width, BLOCK)))
    with torch.cuda.device_of(step):
        write_step[(squares.numel(),)](
            *(stored, weights, scale, z.contiguous(), g.contiguous(), step, moved, squares),
            *(len(stored), weights.stride(0), batch * width, width),
            BLOCK=BLOCK,
            num_warps=num_warps,
        )
    return moved, squares.sum(1)
