"""Group normalisation: the compiled form against the definition, in every number format it meets."""

import pytest
import torch
from torch import Tensor

from models.mdeq.group_norm import GroupNorm


def make(channels: int, groups: int, dtype: torch.dtype) -> GroupNorm:
    torch.manual_seed(0)
    norm = GroupNorm(groups, channels)
    with torch.no_grad():
        norm.weight.normal_(1, 0.3)
        norm.bias.normal_()
    return norm.to(dtype)


def defined(norm: GroupNorm, x: Tensor) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) of every image's groups, times weight, plus bias, in float64."""
    y = x.double().reshape(len(x), norm.num_groups, -1)
    y = (y - y.mean(2, keepdim=True)) / (y.var(2, correction=0, keepdim=True) + norm.eps).sqrt()
    return y.reshape(x.shape) * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]


def images(channels: int, *, mean: float, dtype: torch.dtype) -> Tensor:
    x = torch.randn(3, channels, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (x * torch.linspace(0.5, 2, channels, dtype=x.dtype)[:, None, None] + mean).to(dtype)


@pytest.mark.parametrize(("channels", "groups"), [(24, 8), (24, 4), (12, 12), (6, 1)])
def test_channel_means_give_the_definition_and_its_gradients(channels, groups):
    norm = make(channels, groups, torch.float64)
    x = images(channels, mean=0.7, dtype=torch.float64).requires_grad_()
    found, expected = norm.from_channel_means(x), defined(norm, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, norm.weight, norm.bias]
    for a, b in zip(
        torch.autograd.grad(found.sin().sum(), inputs),
        torch.autograd.grad(expected.sin().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("mean", "error"), [(0.0, 3e-6), (3.0, 2e-5), (30.0, 2e-3)])
def test_a_large_mean_costs_digits_in_float32(mean, error):
    norm = make(24, 8, torch.float32)
    x = images(24, mean=mean, dtype=torch.float32)
    torch.testing.assert_close(norm.from_channel_means(x).double(), defined(norm, x), rtol=0, atol=error)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_a_constant_image_gives_a_finite_answer(value):
    """Rounding may make a variance of zero negative, and the square root of that NaN."""
    norm = make(24, 8, torch.float32)
    x = torch.full((2, 24, 4, 4), value) * (1 + 1e-7 * torch.arange(24.0)[:, None, None])
    assert norm.from_channel_means(x).isfinite().all()


def test_bfloat16_is_rounded_once_at_the_end():
    norm = make(24, 8, torch.float32)
    x = images(24, mean=0.5, dtype=torch.bfloat16)
    found = norm.from_channel_means(x)
    assert found.dtype == norm(x).dtype == torch.bfloat16
    assert torch.equal(found, norm.from_channel_means(x.float()).bfloat16())


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_eager_and_compiled_agree_and_keep_the_memory_format(memory_format):
    norm = make(24, 8, torch.float32)
    x = images(24, mean=0.5, dtype=torch.float32).contiguous(memory_format=memory_format)
    seen = []

    def eager(graph, inputs):
        seen.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    found = torch.compile(norm, backend=eager)(x)
    assert any("rsqrt" in name for name in seen[0])  # the form for compiled code, not torch's kernel
    assert found.is_contiguous(memory_format=memory_format)
    assert norm(x).is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(found, norm(x), rtol=1e-5, atol=1e-5)
