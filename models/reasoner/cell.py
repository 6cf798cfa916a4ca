"""The maps of a recursive reasoner: one state, or a slow and a fast one.

x is the embedded puzzle (B, S, D). A state is one tensor of that shape, or the pair (z_slow, z_fast); the answer is
read from the slow one. The papers write z_H, z_L (HRM) or y, z (TRM).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from models.reasoner.layers import Stack
from phantom.validate import check_count, check_flag, check_lam

Pair = tuple[Tensor, Tensor]
Noise = tuple[Tensor | None, ...]
Rotary = tuple[Tensor, Tensor] | None


class OneSpeed(nn.Module):
    """f(z) = (1 - lam) z + lam stack(z, x) + noise: a looped transformer.

    Args:
        width: D.
        length: S.
        stack: makes the stack from `width` and `length`.
        lam: weight of the new state in every call.
    """

    states: ClassVar[tuple[str, ...]] = ("slow",)

    def __init__(self, *, width: int, length: int, stack: Callable[..., Stack], lam: float) -> None:
        super().__init__()
        check_lam(lam)
        self.stack = stack(width=width, length=length)
        self.lam = lam

    def forward(self, z: Tensor, x: Tensor, rotary: Rotary, noise: Noise) -> Tensor:
        return mix(z, self.stack(z, x, rotary), self.lam, noise[0])


class TwoSpeeds(nn.Module):
    """F(z_slow, z_fast), one cycle: `num_fast` updates of z_fast, then one of z_slow with the new z_fast.

        z_fast <- f_fast(z_fast, z_slow + x),  z_slow <- f_slow(z_slow, z_fast)

    Every call is damped, z <- (1 - lam) z + lam f + noise (EqR, whose paper writes lambda for 1 - lam). x enters z_fast
    alone; that is how one network can serve both roles.

    Args:
        width: D.
        length: S.
        stack: makes a stack from `width` and `length`.
        num_fast: updates of z_fast in a cycle (`L_cycles` of the official codes).
        shared: one stack for both roles (TRM, EqR), or one each (HRM).
        lam: weight of the new state in every call.
    """

    states: ClassVar[tuple[str, ...]] = ("slow", "fast")

    def __init__(
        self, *, width: int, length: int, stack: Callable[..., Stack], num_fast: int, shared: bool, lam: float
    ) -> None:
        super().__init__()
        check_count("num_fast", num_fast, least=1)
        check_lam(lam)
        check_flag("shared", shared)
        self.fast = stack(width=width, length=length)
        self.slow = self.fast if shared else stack(width=width, length=length)
        self.num_fast, self.lam = num_fast, lam

    def forward(
        self,
        z: Pair,
        x: Tensor,
        rotary: Rotary,
        noise: Noise,
        *,
        num_fast: int | None = None,
    ) -> Pair:
        """Return F(z), or the same with another number of fast updates."""
        slow, _ = z
        fast = self.advance(z, x, rotary, noise, num_fast=num_fast)[1]
        new = self.slow(slow, fast, rotary)
        return mix(slow, new, self.lam, noise[0]), fast

    def advance(self, z: Pair, x: Tensor, rotary: Rotary, noise: Noise, *, num_fast: int | None = None) -> Pair:
        """Return z after fast updates alone."""
        slow, fast = z
        injection = slow + x
        for _ in range(self.num_fast if num_fast is None else num_fast):
            fast = mix(fast, self.fast(fast, injection, rotary), self.lam, noise[1])
        return slow, fast


def mix(old: Tensor, new: Tensor, lam: float, noise: Tensor | None) -> Tensor:
    """Return (1 - lam) old + lam new + noise."""
    mixed = new if lam == 1 else old.lerp(new, lam)
    return mixed if noise is None else mixed + noise
