"""On a GPU: the Triton kernels of Broyden's two passes against the plain ones, at every number of warps."""

import pytest
import torch

from phantom import Broyden
from phantom.solve import solve
from tests.phantom.interpreted_broyden import PASSES, errors_of_the_passes
from tests.phantom.problems import randn, tanh_contraction

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CASES = [*PASSES, (128, 30720, 22, 32), (1, 3_000_001, 5, 8)]
SETTINGS = {"all": {}, "ring": {"memory": 4}, "compiled": {"compile": True}}


@pytest.mark.parametrize("num_warps", [4, 8, 16])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_kernels_give_the_plain_passes(dtype, case, num_warps):
    plain, own = errors_of_the_passes(*case, dtype=dtype, device="cuda", num_warps=num_warps)
    for a, b in zip(plain, own, strict=True):
        assert b <= 5 * max(a, torch.finfo(dtype).eps) and b < 1e-4


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_solve_takes_the_plain_steps(settings):
    weight, x = 0.1 * randn(40, 40, seed=1).cuda(), randn(5, 40, seed=2).cuda()
    found = [
        solve(lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x), Broyden(max_steps=12, tol=None, **more))
        for more in (settings, settings | {"kernels": True})
    ]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found[1][1].trace, found[0][1].trace, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_solve_with_kernels_is_a_cuda_graph(settings):
    """It waits for nothing, and its graph gives the same numbers for another input."""
    solver = Broyden(max_steps=12, tol=None, kernels=True, **settings)
    weight, x = 0.1 * randn(40, 40, seed=1).cuda(), randn(5, 40, seed=2).cuda()

    def run():
        return solve(lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x), solver)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    x.copy_(randn(5, 40, seed=3))
    graph.replay()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(captured, expected, rtol=1e-9, atol=1e-9)


def test_a_failed_row_leaves_the_others_alone():
    problem = tanh_contraction()
    target = problem.z_star.cuda()
    found = []
    for spoilt in (0.0, torch.nan):
        spoil = torch.tensor([[0.0], [spoilt], [0.0]], dtype=target.dtype, device="cuda")
        found.append(
            solve(
                lambda z, spoil=spoil: 0.5 * torch.sin(z) + target + spoil * (z - z),
                torch.zeros_like(target),
                Broyden(max_steps=9, tol=None, kernels=True),
            )[0]
        )
    assert torch.equal(found[0][::2], found[1][::2])
