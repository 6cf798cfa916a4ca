"""The stem of MDEQ, which makes the injection, and its classification head."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

BOTTLENECK = 4  # a head bottleneck of h planes ends in 4 h channels, as in ResNet


def make_stem(in_channels: int, channels: int, *, num_downsamples: int) -> nn.Sequential:
    """Return two (conv3x3, BatchNorm, relu); the first `num_downsamples` convolutions have stride 2."""
    strides = [2 if num_downsamples > i else 1 for i in range(2)]
    return nn.Sequential(
        *_conv_norm_relu(in_channels, channels, kernel=3, stride=strides[0], bias=False),
        *_conv_norm_relu(channels, channels, kernel=3, stride=strides[1], bias=False),
    )


def make_stage0(channels: int) -> nn.Sequential:
    """Return the 1x1 block that turns the stem's output into the injection of the finest branch."""
    return nn.Sequential(*_conv_norm_relu(channels, channels, kernel=1, stride=1, bias=False))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution (C -> h -> h -> 4 h), plus shortcut, then relu.

    The three norms of the main path are not affine; the shortcut's norm is.
    """

    def __init__(self, channels: int, planes: int) -> None:
        super().__init__()
        out = BOTTLENECK * planes
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes, affine=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes, affine=False)
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out, affine=False)
        self.shortcut = (
            nn.Identity()
            if channels == out
            else nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y)).relu_()
        return self.bn3(self.conv3(y)).add_(self.shortcut(x)).relu_()


class MDEQHead(nn.Module):
    """Turn the branches of an equilibrium into logits.

    y = incre_0(z_0), then y = incre_{i+1}(z_{i+1}) + downsamp_i(y) up to the coarsest branch; final 1x1 convolution,
    global average, linear classifier.

    Args:
        channels: C_i of the branches, finest first.
        head_channels: h_i, planes of the bottleneck of branch i.
        final_channels: input features of the classifier.
    """

    def __init__(
        self, *, channels: Sequence[int], head_channels: Sequence[int], final_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        wide = [BOTTLENECK * h for h in head_channels]
        self.incre = nn.ModuleList(Bottleneck(c, h) for c, h in zip(channels, head_channels, strict=True))
        self.downsamp = nn.ModuleList(
            nn.Sequential(*_conv_norm_relu(a, b, kernel=3, stride=2, bias=True)) for a, b in pairwise(wide)
        )
        self.final = nn.Sequential(*_conv_norm_relu(wide[-1], final_channels, kernel=1, stride=1, bias=True))
        self.classifier = nn.Linear(final_channels, num_classes)

    def forward(self, z: tuple[Tensor, ...]) -> Tensor:
        y = self.incre[0](z[0])
        for incre, downsamp, x in zip(self.incre[1:], self.downsamp, z[1:], strict=True):
            y = incre(x) + downsamp(y)
        return self.classifier(self.final(y).mean(dim=(2, 3)))


def _conv_norm_relu(a: int, b: int, *, kernel: int, stride: int, bias: bool) -> list[nn.Module]:
    conv = nn.Conv2d(a, b, kernel, stride=stride, padding=kernel // 2, bias=bias)
    return [conv, nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
