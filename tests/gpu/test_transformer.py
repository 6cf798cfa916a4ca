"""On a GPU: the cell of the DEQ Transformer at the paper's odd width has the numbers of the CPU, by fused attention."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.deq_transformer.attention import sinusoids
from tests.models.transformers import make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_heads_of_width_70_are_attended_by_a_fused_kernel(dtype, close):
    cell = make(dtype=torch.float32, d_model=700, num_heads=10, d_inner=800).cell
    u, history, z = torch.randn(2, 9, 2100), torch.randn(2, 4, 700), torch.randn(2, 5, 700)
    positions = sinusoids(9, 700, device=torch.device("cpu"), dtype=torch.float32)
    v = torch.randn_like(z)

    def gradients(device: str) -> list[torch.Tensor]:
        cell.to(device).zero_grad()
        x = z.to(device).requires_grad_()
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            out = cell.bind(u.to(device), history.to(device), positions.to(device))(x)
        out.float().backward(v.to(device))
        return [t.detach().float().cpu() for t in (out, x.grad, cell.attention.qkv.weight_v.grad)]

    expected = gradients("cpu")
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]):  # refuses what neither can take
        found = gradients("cuda")
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= close * b.norm()
