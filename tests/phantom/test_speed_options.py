"""Every option that makes a solve or a step faster gives the same numbers, within the tolerance stated here."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.mdeq.model import MDEQ
from models.synthetic import SyntheticMap
from phantom import DEQ, NPG, UPG, Anderson, Broyden, FixedPoint, Implicit, fixed_point
from phantom.diagnostics import cosine, norm_ratio
from phantom.engine.speed import compile_cell
from phantom.solve import replace_rows, solve
from tests.phantom.problems import linear_nonsymmetric, randn, tanh_contraction
from tests.phantom.solvers import FEW_STEPS, each
from tests.phantom.solvers import SOLVERS as SOLVERS_TO_TOL

FUSED = 1e-9  # between fused and separate arithmetic in float64, over solves that amplify rounding
ESTIMATORS = {
    "upg": UPG(k=2, lam=0.5),
    "npg": NPG(k=3, lam=0.5),
    "implicit": Implicit(solver=Broyden(max_steps=6, tol=None)),
}
SOLVERS = {
    "broyden": {"max_steps": 12, "tol": None},
    "broyden_ring": {"max_steps": 12, "tol": None, "memory": 4},
    "broyden_tol": {"max_steps": 40, "tol": 1e-9},
}


@pytest.mark.parametrize("settings", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("make", [linear_nonsymmetric, tanh_contraction], ids=lambda make: make.__name__)
def test_a_fused_broyden_takes_the_same_steps(make, settings):
    problem = make()
    z, stats, _ = solve(problem.f, problem.z0, Broyden(**settings))
    fused, own, _ = solve(problem.f, problem.z0, Broyden(**settings, compile=True))
    assert own.num_steps.tolist() == stats.num_steps.tolist() and own.num_evals == stats.num_evals
    torch.testing.assert_close(fused, z, rtol=FUSED, atol=FUSED)
    torch.testing.assert_close(own.trace, stats.trace, rtol=1e-6, atol=FUSED)


@pytest.mark.parametrize("solver_class", [FixedPoint, Anderson])
def test_a_fused_loop_takes_the_same_steps(solver_class):
    problem = tanh_contraction()
    z, stats, _ = solve(problem.f, problem.z0, solver_class(max_steps=9, tol=None))
    fused, own, _ = solve(problem.f, problem.z0, solver_class(max_steps=9, tol=None, compile=True))
    torch.testing.assert_close(fused, z, rtol=FUSED, atol=FUSED)
    torch.testing.assert_close(own.trace, stats.trace, rtol=1e-6, atol=FUSED)


@each(FEW_STEPS | {f"{name}_to_tol": solver for name, solver in SOLVERS_TO_TOL.items()})
@pytest.mark.parametrize("stop", ["relative", "absolute"])
def test_a_solve_in_place_takes_the_same_steps(solver, stop):
    problem, solver = tanh_contraction(), replace(solver, stop=stop)
    z, stats, _ = solve(problem.f, problem.z0, solver)
    again, own, _ = solve(problem.f, problem.z0, solver, in_place=True)
    assert torch.equal(again, z) and torch.equal(own.trace, stats.trace)


@each(FEW_STEPS)
@pytest.mark.parametrize("parts", [1, 2])
def test_what_f_returns_is_left_alone_unless_it_is_given_away(solver, parts):
    """A map may keep what it returned, or return a tensor that it needs again."""
    target, returned = randn(4, 6, seed=8), []

    def f(z):
        states = [0.5 * (part + target) for part in z] if parts > 1 else [0.5 * (z + target)]
        returned.extend((state, state.clone()) for state in states)
        return tuple(states) if parts > 1 else states[0]

    z0 = tuple(torch.zeros(4, 6, dtype=target.dtype) for _ in range(parts))
    fixed_point(f, z0 if parts > 1 else z0[0], solver=solver, grad=NPG(k=2, lam=0.5))
    assert len(returned) == 9 * parts
    for state, copy in returned:
        assert torch.equal(state, copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 6, 8])
@pytest.mark.parametrize("order", ["rows", "columns", "offset"])
def test_rows_are_replaced_to_the_bit(dtype, width, order):
    z, best = randn(3, width, seed=9).to(dtype), randn(3, width, seed=10).to(dtype)
    z[0, 0], z[1, -1], best[1, 0] = torch.nan, torch.inf, -0.0
    if order == "columns":
        z, best = z.T.contiguous().T, best.T.contiguous().T
    if order == "offset":
        z = torch.cat([z.new_zeros(1), z.flatten()])[1:].view(z.shape)
    expected = torch.stack([best[0], z[1], best[2]])
    kept = replace_rows(best, z, torch.tensor([False, True, False]))
    assert kept is best
    torch.testing.assert_close(kept, expected, rtol=0, atol=0, equal_nan=True)


def tiny(grad, *, compiled: bool = False, channels_last: bool = True) -> MDEQ:
    torch.manual_seed(0)
    model = MDEQ(
        in_channels=3,
        num_classes=5,
        channels=[4, 4],
        head_channels=[2, 2],
        final_channels=8,
        num_downsamples=0,
        expansion=2,
        num_groups=2,
        num_blocks=1,
        dropout=0.0,
        init="default",
        channels_last=channels_last,
        deq=DEQ(solver=Broyden(max_steps=6, tol=None), grad=grad),
    )
    if compiled:
        compile_cell(model)
    return model


def gradients(model: MDEQ, images: Tensor) -> list[Tensor]:
    logits, (solution,) = model(images)
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(images)))
    return [*solution.z_star, loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("grad", ESTIMATORS.values(), ids=ESTIMATORS)
def test_a_compiled_cell_has_the_same_gradients(grad):
    """Adjoint estimators run one evaluation with a graph eagerly, and another one, of z alone, compiled."""
    images = randn(3, 3, 8, 8, seed=1)
    expected = gradients(tiny(grad).double(), images)
    found = gradients(tiny(grad, compiled=True).double(), images)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("grad", ESTIMATORS.values(), ids=ESTIMATORS)
def test_bfloat16_in_the_gradient_part_leaves_the_solve_alone(grad):
    images = randn(3, 3, 8, 8, seed=2).float()
    exact, mixed = tiny(grad), tiny(grad)
    mixed.deq.gradient_precision = torch.bfloat16
    expected, found = gradients(exact, images), gradients(mixed, images)
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(a, b)
    # a cell that expands, as every untrained MDEQ: the adjoint amplifies the rounding of f's derivatives
    assert cosine(found[3:], expected[3:]) > 0.95
    assert not all(torch.equal(a, b) for a, b in zip(found[3:], expected[3:], strict=True)), "bfloat16 must have acted"


@pytest.mark.parametrize("grad", ESTIMATORS.values(), ids=ESTIMATORS)
def test_bfloat16_in_the_gradient_part_costs_little_where_f_contracts(grad):
    torch.manual_seed(0)
    cell, x = SyntheticMap(dim=32, spectral_norm=0.9, activation="tanh"), randn(8, 32, seed=6).float()
    solver, cotangent = FixedPoint(max_steps=50, tol=None), randn(8, 32, seed=7).float()
    results = []
    for dtype in (None, torch.bfloat16):
        solution = fixed_point(cell.bind(x), torch.zeros(8, 32), solver=solver, grad=grad, gradient_precision=dtype)
        results.append(torch.autograd.grad(solution.value, list(cell.parameters()), cotangent))
    assert cosine(results[1], results[0]) > 0.9999
    assert norm_ratio(results[1], results[0]).item() == pytest.approx(1, abs=0.01)


def test_bfloat16_in_the_gradient_part_acts_on_f_alone():
    """The steps of UPG run f under autocast; their damped mixture stays float32."""
    weight, x = 0.1 * randn(6, 6, seed=3).float(), randn(4, 6, seed=4).float()
    seen = []

    def f(z: Tensor) -> Tensor:
        seen.append((z.dtype, (z @ weight.T).dtype))
        return torch.tanh(z @ weight.T + x)

    solver = FixedPoint(max_steps=2, tol=None)
    solution = fixed_point(
        f, torch.zeros(4, 6), solver=solver, grad=UPG(k=2, lam=0.5), gradient_precision=torch.bfloat16
    )
    assert seen == [(torch.float32, torch.float32)] * 3 + [(torch.float32, torch.bfloat16)] * 2
    assert solution.value.dtype == torch.float32


@pytest.mark.parametrize("grad", ESTIMATORS.values(), ids=ESTIMATORS)
def test_channels_last_has_the_same_gradients(grad):
    images = randn(3, 3, 8, 8, seed=5)
    expected = gradients(tiny(grad, channels_last=False).double(), images)
    found = gradients(tiny(grad).double(), images)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
