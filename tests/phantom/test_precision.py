"""Number formats: float32 solver arithmetic under autocast, TF32 and bfloat16, and gradients that survive it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phantom import UPG, FixedPoint, Implicit, fixed_point
from phantom.solve import solve
from tests.phantom import cases
from tests.phantom.problems import DTYPE, randn
from tests.phantom.solvers import FEW_STEPS, each


@each(FEW_STEPS)
def test_solver_arithmetic_ignores_autocast(solver):
    """f below has no operation that autocast touches: the iterates must be the same bit for bit."""
    x = randn(3, 8, seed=9).float()

    def f(z: Tensor) -> Tensor:
        return 0.9 * z.roll(1, dims=1).tanh() + x

    z, stats, _ = solve(f, torch.zeros_like(x), solver)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_cast, stats_cast, memory = solve(f, torch.zeros_like(x), solver)
    assert torch.equal(z, z_cast) and torch.equal(stats.trace, stats_cast.trace)
    assert memory is None or memory.gram.dtype == torch.float32


@each(FEW_STEPS)
def test_a_bf16_state_is_solved_in_float32(solver):
    x = randn(3, 8, seed=9).bfloat16()
    seen = []

    def f(z: Tensor) -> Tensor:
        seen.append(z.dtype)
        return 0.5 * z + x

    with torch.no_grad():
        solution = fixed_point(f, torch.zeros_like(x), solver=solver, grad=UPG(k=1, lam=1.0))
    assert set(seen) == {torch.bfloat16} and solution.value.dtype == torch.bfloat16
    assert solution.stats.residual.dtype == torch.float32
    torch.testing.assert_close(solution.value.float(), 2 * x.float(), rtol=0.03, atol=0.03)


@each(FEW_STEPS)
def test_low_precision_products_stay_out_of_the_solver(solver):
    """TF32 or bfloat16 matrix products, allowed for f by torch's global switch, must not reach the Gram matrices."""
    backend = torch.backends.mkldnn.matmul
    inside, outside = set(), set()

    class Watched(type(solver)):
        def propose(self, memory, z, g):
            inside.add(backend.fp32_precision)
            return super().propose(memory, z, g)

    def f(z: Tensor) -> Tensor:
        outside.add(backend.fp32_precision)
        return 0.5 * z + 1

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        allowed = backend.fp32_precision
        solve(f, torch.zeros(2, 3), Watched(**vars(solver)))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert inside == {"ieee"} and outside == {allowed} and allowed != "ieee"


def perceptron(weights: list[Tensor], x: Tensor):
    return lambda z: torch.tanh(F.linear(torch.relu(F.linear(z, weights[0])), weights[1])) + x


@cases.each()
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_autocast_reaches_every_leaf_weight(grad, state):
    """The solve casts the weights under no_grad first: a cached cast without a graph would cut the gradient."""
    weights = [(0.15 * randn(16, 16, seed=seed)).float().requires_grad_() for seed in (40, 41)]
    x = randn(3, 16, seed=42).float().requires_grad_()
    solver = FixedPoint(max_steps=12, tol=None)
    if isinstance(grad, Implicit):
        grad = Implicit(solver=type(grad.solver)(max_steps=12, tol=None))

    def gradients() -> list[Tensor]:
        value = fixed_point(perceptron(weights, x), torch.zeros(3, 16, dtype=state), solver=solver, grad=grad).value
        assert value.dtype == state
        return list(torch.autograd.grad(value.float().square().sum(), [*weights, x]))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradients()
    if state == torch.bfloat16:
        return  # without autocast a bfloat16 state would meet float32 weights
    for a, b in zip(cast, gradients(), strict=True):
        assert a.dtype == torch.float32
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999
        torch.testing.assert_close(a.norm(), b.norm(), rtol=0.02, atol=0)


@cases.each()
def test_a_bf16_model_without_autocast(grad):
    weights = [(0.15 * randn(16, 16, seed=seed)).bfloat16().requires_grad_() for seed in (40, 41)]
    x = randn(3, 16, seed=42).bfloat16().requires_grad_()
    solver = FixedPoint(max_steps=12, tol=None)
    if isinstance(grad, Implicit):
        grad = Implicit(solver=type(grad.solver)(max_steps=12, tol=None))
    half = fixed_point(perceptron(weights, x), torch.zeros_like(x), solver=solver, grad=grad).value
    assert half.dtype == torch.bfloat16
    low = torch.autograd.grad(half.float().square().sum(), [*weights, x])
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in (*weights, x)]
    full = fixed_point(
        perceptron(exact_leaves[:2], exact_leaves[2]), torch.zeros(3, 16, dtype=DTYPE), solver=solver, grad=grad
    ).value
    high = torch.autograd.grad(full.square().sum(), exact_leaves)
    for a, b in zip(low, high, strict=True):
        assert torch.cosine_similarity(a.double().flatten(), b.flatten(), dim=0) > 0.99


def test_threads_leave_the_switch_as_the_user_set_it():
    backend, before = torch.backends.mkldnn.matmul, torch.get_float32_matmul_precision()
    x = randn(4, 8, seed=9).float()
    try:
        for precision in ("medium", "highest"):
            torch.set_float32_matmul_precision(precision)
            allowed = backend.fp32_precision
            for _ in range(5):
                with ThreadPoolExecutor(8) as pool:
                    done = [
                        pool.submit(solve, lambda z: 0.5 * z + x, torch.zeros_like(x), FEW_STEPS["broyden"])
                        for _ in range(16)
                    ]
                values = [future.result()[0] for future in done]
                assert backend.fp32_precision == allowed
                assert all(torch.equal(value, values[0]) for value in values)
    finally:
        torch.set_float32_matmul_precision(before)
