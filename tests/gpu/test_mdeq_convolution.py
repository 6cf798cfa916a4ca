"""On a GPU: the forms of MDEQ's convolutions against the plain ones, eager, compiled and under autocast."""

import copy

import pytest
import torch

from models.mdeq.cell import MDEQCell
from models.mdeq.convolution import Padded, Tied

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def results(cell, *, dtype, autocast):
    """Return the state after three steps and the gradients of everything, in one vector each."""
    torch.manual_seed(1)
    shapes = [(4, 24, size, size) for size in (32, 16)]
    u, *z = (torch.randn(shape, device="cuda", dtype=torch.float64) for shape in (shapes[0], *shapes))
    u, *z = (t.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_() for t in (u, *z))
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        f, state = cell.bind((u, None)), tuple(z)
        for _ in range(3):
            state = tuple(a.lerp(b.to(a.dtype), 0.5) for a, b in zip(state, f(state), strict=True))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in state)
    gradients = torch.autograd.grad(sum(t.double().sin().sum() for t in state), [u, *z, *cell.parameters()])
    return [torch.cat([t.double().flatten() for t in found]) for found in (state, gradients)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("form", [Padded, Tied])
def test_a_form_rounds_like_the_plain_cell(form, autocast, compiled):
    torch.manual_seed(0)
    plain = MDEQCell(channels=(24, 24), expansion=5, num_groups=8, num_blocks=1, dropout=0.0).cuda()
    plain = plain.to(memory_format=torch.channels_last)
    exact = results(copy.deepcopy(plain).double(), dtype=torch.float64, autocast=False)
    other = copy.deepcopy(plain)
    other._convolve_by(form())
    if compiled:
        other.compile(fullgraph=True, dynamic=False)
    errors = []
    for cell in (other, plain):
        found = results(cell, dtype=torch.float32, autocast=autocast)
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)])
    for error, of_plain in zip(*errors, strict=True):
        assert error < 3 * of_plain + 1e-5


def test_a_shared_weight_gradient_is_captured_in_a_cuda_graph():
    torch.manual_seed(0)
    cell = MDEQCell(channels=(24, 24), expansion=5, num_groups=8, num_blocks=1, dropout=0.0).cuda()
    cell._convolve_by(Tied())
    z = tuple(torch.randn(4, 24, size, size, device="cuda") for size in (16, 8))

    def step():
        f = cell.bind((z[0], None))
        return torch.autograd.grad(sum(t.square().sum() for t in f(f(z))), list(cell.parameters()))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for t in z:
        t.normal_()
    expected = step()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * b.abs().max().item())
