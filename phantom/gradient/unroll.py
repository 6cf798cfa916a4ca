"""Estimators that differentiate a few damped steps: the unrolled phantom gradient, and backpropagation through time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from phantom.gradient.base import GradientEstimator, check_grad_enabled
from phantom.runtime import transforms
from phantom.solution import Solution
from phantom.state import FlatMap
from phantom.validate import check_count, check_lam


@dataclass(frozen=True, kw_only=True)
class UPG(GradientEstimator):
    """Unrolled phantom gradient: differentiate k steps z <- lam f(z) + (1 - lam) z from z_star.

    Eq. (12) and (16), Geng et al. 2021. The value is the state after the k steps. Cost: k evaluations of f with a
    graph, and their k activations; `checkpoint` keeps one state per step and evaluates f once more in backward instead,
    with the same random numbers; a buffer that f moves is moved twice. Supports double backward, which holds z_star
    fixed: the second derivative is that of the k steps alone. Through torch's attention it needs
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around the forward pass, as forward mode does.

    Args:
        k: number of steps, >= 1.
        lam: weight of the new iterate, in (0, 1].
    """

    unrolls: ClassVar[bool] = True

    k: int = 5
    lam: float = 0.5
    checkpoint: bool = False

    def __post_init__(self) -> None:
        check_count("k", self.k, least=1)
        check_lam(self.lam)

    def attach(self, f: FlatMap, solution: Solution) -> Tensor:
        return _unroll(f, solution.z_star, self.k, self.lam, self.checkpoint, solution)


@dataclass(frozen=True, kw_only=True)
class BPTT(GradientEstimator):
    """Backpropagation through time: differentiate `num_steps` damped steps from z0, without a solve.

    The exact gradient of the truncated iteration, and the unrolled pretraining of MDEQ and the DEQ Transformer
    (lam = 1). Cost: `num_steps` evaluations of f with a graph and as many activations, unless `checkpoint`.
    """

    needs_equilibrium: ClassVar[bool] = False
    unrolls: ClassVar[bool] = True

    num_steps: int
    lam: float = 1.0
    checkpoint: bool = False

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps, least=1)
        check_lam(self.lam)

    def attach(self, f: FlatMap, solution: Solution) -> Tensor:
        return _unroll(f, solution.z0, self.num_steps, self.lam, self.checkpoint, solution)


def _unroll(f: FlatMap, z: Tensor, steps: int, lam: float, checkpoint: bool, solution: Solution) -> Tensor:
    check_grad_enabled()
    if checkpoint and transforms.are_active():
        raise RuntimeError("checkpoint=True keeps what torch.func needs out of its reach: use checkpoint=False there")
    for _ in range(steps):
        # a mask drawn inside f must be drawn again as it was; a stream that is being captured has no state to keep
        keep = not (z.is_cuda and torch.cuda.is_current_stream_capturing())
        fz = recompute(f, z, use_reentrant=False, preserve_rng_state=keep) if checkpoint else f(z)
        z = fz if lam == 1 else z.lerp(fz, lam)
        if solution.unrolled is not None:
            solution.unrolled.append(z)
    solution.stats.num_evals += steps
    return z
