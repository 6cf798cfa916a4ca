"""What surrounds the equilibrium of MDEQ against a plain re-statement: stem, stage 0 and head, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mdeq.head import Bottleneck, MDEQHead, make_stage0, make_stem

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def randomise(module: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value that no part can do without, and return the module in float64."""
    torch.manual_seed(0)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return module


def normalise(x: Tensor, norm: nn.BatchNorm2d, training: bool) -> Tensor:
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    if training:
        mean, variance = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=0)
    y = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return y if norm.weight is None else y * norm.weight[:, None, None] + norm.bias[:, None, None]


def block(x: Tensor, layers: nn.Sequential, training: bool, *, stride: int, padding: int) -> Tensor:
    """Return relu(BN(conv(x))) of the first two of `layers`."""
    conv, norm = layers[0], layers[1]
    return normalise(F.conv2d(x, conv.weight, conv.bias, stride, padding), norm, training).clamp_min(0)


def bottleneck(x: Tensor, part: Bottleneck, training: bool) -> Tensor:
    y = normalise(F.conv2d(x, part.conv1.weight), part.bn1, training).clamp_min(0)
    y = normalise(F.conv2d(y, part.conv2.weight, padding=1), part.bn2, training).clamp_min(0)
    y = normalise(F.conv2d(y, part.conv3.weight), part.bn3, training)
    if not isinstance(part.shortcut, nn.Identity):
        x = normalise(F.conv2d(x, part.shortcut[0].weight), part.shortcut[1], training)
    return (y + x).clamp_min(0)


@pytest.mark.parametrize("training", [False, True])
def test_the_head(training):
    """Branches from fine to coarse, each added to the strided one before; then 1x1, the mean over pixels, a matrix."""
    head = MDEQHead(channels=(8, 6, 6), head_channels=(2, 3, 2), final_channels=5, num_classes=4)
    randomise(head).train(training)
    z = tuple(torch.randn(3, c, size, size, dtype=torch.float64) for c, size in ((8, 9), (6, 5), (6, 3)))
    y = bottleneck(z[0], head.incre[0], training)
    for i in (1, 2):
        y = bottleneck(z[i], head.incre[i], training) + block(y, head.downsamp[i - 1], training, stride=2, padding=1)
    y = block(y, head.final, training, stride=1, padding=0)
    pooled = torch.stack([image.reshape(5, 9).sum(dim=1) / 9 for image in y])
    expected = pooled @ head.classifier.weight.T + head.classifier.bias
    torch.testing.assert_close(head(z), expected, **CLOSE)
    assert {type(part.shortcut) for part in head.incre} == {nn.Identity, nn.Sequential}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("num_downsamples", "strides"), [(0, (1, 1)), (1, (2, 1)), (2, (2, 2))])
def test_the_stem(num_downsamples, strides, training):
    stem = randomise(make_stem(2, 6, num_downsamples=num_downsamples)).train(training)
    images = torch.randn(3, 2, 9, 9, dtype=torch.float64)
    expected = block(images, stem[:3], training, stride=strides[0], padding=1)
    expected = block(expected, stem[3:], training, stride=strides[1], padding=1)
    torch.testing.assert_close(stem(images), expected, **CLOSE)


@pytest.mark.parametrize("training", [False, True])
def test_stage_0(training):
    stage = randomise(make_stage0(6)).train(training)
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(stage(x), block(x, stage, training, stride=1, padding=0), **CLOSE)
