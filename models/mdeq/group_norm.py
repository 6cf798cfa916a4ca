"""Group normalisation at its price: the memory format stays, and compiled code gets a form that it makes fast."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu and He, 2018) that keeps the memory format of its input.

    torch's kernel does so on a CPU. On a GPU it returns the contiguous format, and every convolution would turn it
    back. Compiled for a CPU, torch splits the kernel into loops over the few channels of a group; the form below loops
    over all of them.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.device.type == "cpu":
            return self.from_channel_means(x)
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return (
            super()
            .forward(x)
            .contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        )

    def from_channel_means(self, x: Tensor) -> Tensor:
        """Return the same (B, C, H, W) from the mean and the mean square of every channel, in at least float32.

        Two passes over x, as wide as C. The variance is E x^2 - (E x)^2: it loses the digits in which a group's mean
        square exceeds its variance.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        group = torch.arange(self.num_channels, device=x.device) // (self.num_channels // self.num_groups)
        # (C, C): every channel gets the average of its group; no matmul, which TF32 and autocast would round
        average = (group[:, None] == group).to(wide.dtype) * (self.num_groups / self.num_channels)
        mean = (wide.mean((2, 3))[:, None] * average).sum(2)
        square = (wide.square().mean((2, 3))[:, None] * average).sum(2)
        scale = ((square - mean.square()).clamp_min(0) + self.eps).rsqrt() * self.weight
        shift = self.bias - mean * scale
        return (wide * scale[:, :, None, None] + shift[:, :, None, None]).to(x.dtype)
