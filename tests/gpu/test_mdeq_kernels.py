"""On a GPU: MDEQ's Triton kernels against the plain block, at every number of warps.

Compilers have miscompiled loops over the taps of a convolution at 8 warps and more.
"""

import copy

import pytest
import torch

from models.mdeq.cell import MDEQCell, ResidualBlock

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("num_warps", [4, 8, 16])
@pytest.mark.parametrize(("channels", "size"), [(24, 32), (24, 16), (32, 7), (16, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_the_kernels_give_the_plain_block(dtype, channels, size, num_warps):
    from models.mdeq import kernels

    torch.manual_seed(0)
    block = ResidualBlock(channels, expansion=5, num_groups=8).cuda()
    z = torch.randn(4, channels, size, size, device="cuda").contiguous(memory_format=torch.channels_last)
    u, mask = torch.randn_like(z), (torch.rand(4, channels, 1, 1, device="cuda") > 0.3) / 0.7
    wide = copy.deepcopy(block).double()
    exact = wide(z.double(), wide.bind(u.double(), mask.double()))
    bound = block.bind(u, mask)
    weights = kernels.packed(bound.conv1.to(dtype), bound.conv2.to(dtype))
    norms = (block.norm1, block.norm2, block.norm3)
    found = kernels.residual_block(z.to(dtype), weights, mask, u.to(dtype), norms, num_warps=num_warps)
    error = ((found.double() - exact).norm() / exact.norm()).item()
    assert error < (1e-4 if dtype == torch.float32 else 2e-2)
    assert found.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_a_compiled_cell_with_kernels_is_the_plain_cell():
    torch.manual_seed(0)
    plain = MDEQCell(channels=(24, 24), expansion=5, num_groups=8, num_blocks=1, dropout=0.0).cuda()
    fused = copy.deepcopy(plain)
    fused.fuse()
    fused.compile(fullgraph=True, dynamic=False)
    z = tuple(torch.randn(4, 24, s, s, device="cuda").contiguous(memory_format=torch.channels_last) for s in (32, 16))
    for a, b in zip(fused.bind((z[0], None))(z), plain.bind((z[0], None))(z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
