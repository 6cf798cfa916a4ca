"""GroupNorm that keeps channels_last on a GPU and compiles to fast code on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu and He, 2018) that keeps the memory format of its input.

    On a CPU, torch's kernel does so. On a GPU it returns the contiguous format, and every convolution would convert it
    back. Compiled for a CPU, torch's kernel becomes loops over the few channels of a group; `from_channel_means` loops
    over all channels.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.device.type == "cpu":
            return self.from_channel_means(x)
        channels_last = x.stride(1) == 1  # also of the first channels of a wider image
        kept = torch.channels_last if channels_last else torch.contiguous_format
        return super().forward(x).contiguous(memory_format=kept)

    def from_channel_means(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, H, W) by the mean and the mean square of every channel, in float32 or wider.

        Two passes over x, each over all C channels. The variance is E x^2 - (E x)^2, which loses
        log10(mean square / variance) digits.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        group = torch.arange(self.num_channels, device=x.device) // (self.num_channels // self.num_groups)
        # (C, C) gives every channel the average of its group; no matmul, which TF32 and autocast would round
        average = (group[:, None] == group).to(wide.dtype) * (self.num_groups / self.num_channels)
        mean = (wide.mean((2, 3))[:, None] * average).sum(2)
        square = (wide.square().mean((2, 3))[:, None] * average).sum(2)
        scale = ((square - mean.square()).clamp_min(0) + self.eps).rsqrt() * self.weight
        shift = self.bias - mean * scale
        return (wide * scale[:, :, None, None] + shift[:, :, None, None]).to(x.dtype)
