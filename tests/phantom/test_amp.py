"""Mixed precision with float16 and a GradScaler: the gradients of every estimator, scaled and unscaled."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from phantom import BPTT, DEQ, NPG, SHINE, UPG, Anderson, Broyden, FixedPoint, Implicit, describe, fixed_point, report

HALF = 2.0**-10  # the rounding of float16
SOLVERS = {"plain": FixedPoint(max_steps=40, tol=1e-3), "broyden": Broyden(max_steps=20, tol=1e-3)}
GRADS = {
    "upg": UPG(k=3),
    "upg_checkpoint": UPG(k=3, checkpoint=True),
    "npg": NPG(k=3),
    "implicit": Implicit(solver=Broyden(max_steps=20, tol=1e-3)),
    "implicit_absolute": Implicit(solver=Anderson(max_steps=20, tol=1e-3, stop="absolute", norm="max")),
    "shine": SHINE(),
    "bptt": BPTT(num_steps=6),
}


class Model(nn.Module):
    """Linear encoder, f(z) = tanh(W z + u), linear head."""

    def __init__(self, deq: DEQ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.inner, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.deq = deq
        with torch.no_grad():
            self.inner.weight.copy_(0.7 * torch.linalg.qr(self.inner.weight)[0])

    def forward(self, x: Tensor) -> Tensor:
        u = self.encoder(x)
        return self.head(self.deq(lambda z: torch.tanh(self.inner(z) + u), torch.zeros_like(u)).value)


def gradients(
    model: nn.Module, *, factor: float = 1.0, scale: float | None = None, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, bool, float]:
    """Return the unscaled gradients of `factor` times a loss near 1, whether the step was skipped, the next scale."""
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = factor * model(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found = [parameter.grad.clone() for parameter in model.parameters()]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler.step(optimizer)
    skipped = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    scaler.update()
    return torch.cat([g.flatten() for g in found]), skipped, scaler.get_scale()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def case(solver: str, grad: str, **settings) -> tuple[Tensor, bool, float]:
    return gradients(Model(DEQ(solver=SOLVERS[solver], grad=GRADS[grad])), **settings)


CASES = [(solver, grad) for solver in SOLVERS for grad in GRADS if (solver, grad) != ("plain", "shine")]


@pytest.mark.parametrize(("solver", "grad"), CASES)
def test_scaled_gradients_are_those_without_scaling(solver, grad):
    plain, _, _ = case(solver, grad)
    if grad != "shine":  # whose inverse depends on the path of the solve, down to its rounding
        assert relative(plain, case(solver, grad, dtype=torch.float32)[0]) < 2 * HALF
    scaled, skipped, scale = case(solver, grad, scale=2.0**10)
    assert relative(scaled, plain) < HALF and not skipped and scale == 2.0**10


@pytest.mark.parametrize(("solver", "grad"), CASES)
def test_a_scaled_loss_does_not_underflow(solver, grad):
    """A loss of 1e-6 loses half of its gradient without a scaler, and none of it with one."""
    plain, _, _ = case(solver, grad)
    small, _, _ = case(solver, grad, factor=2.0**-20, scale=2.0**20)
    assert relative(small * 2.0**20, plain) < HALF
    lost, _, _ = case(solver, grad, factor=2.0**-20)
    assert relative(lost * 2.0**20, plain) > 0.3, "the test above would prove nothing"


@pytest.mark.parametrize(("solver", "grad"), CASES)
def test_an_overflow_is_seen_and_its_step_skipped(solver, grad):
    found, skipped, scale = case(solver, grad, scale=2.0**40)
    assert not found.isfinite().all() and skipped and scale == 2.0**39


@pytest.mark.parametrize("scale", [1.0, 2.0**14])
def test_the_adjoint_solve_is_the_same_at_every_scale(scale):
    model = Model(DEQ(solver=SOLVERS["broyden"], grad=GRADS["implicit"]))
    u = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.float16):
        solution = model.deq(lambda z: torch.tanh(model.inner(z) + u), torch.zeros_like(u))
    # the state is float32 here, so that the products alone are float16
    solution.value.backward(scale * torch.ones(6, 8))
    adjoint = solution.stats.adjoint
    assert not adjoint.fallback.any() and not adjoint.diverged.any()
    assert adjoint.converged.all() and adjoint.num_steps.max() < 12


def test_bfloat16_needs_no_scaler():
    exact, _, _ = case("broyden", "implicit", dtype=torch.float32)
    assert relative(case("broyden", "implicit", dtype=torch.bfloat16)[0], exact) < 16 * HALF


def test_a_dtype_that_autocast_does_not_have_is_refused():
    for make in (lambda: DEQ(gradient_precision=torch.float32), lambda: solve_with(torch.float64)):
        with pytest.raises(ValueError, match=r"gradient_precision=torch\.float\d\d is no dtype of autocast"):
            make()


def solve_with(dtype: torch.dtype):
    return fixed_point(lambda z: 0.5 * z, torch.zeros(2, 3), gradient_precision=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", [FixedPoint, Anderson, Broyden])
def test_a_solve_stops_at_the_rounding_of_what_f_computes_in(solver, dtype):
    """A tolerance below it is never met; the steps up to there are those of float32, and hardly more."""
    model = Model(DEQ(solver=solver(max_steps=60, tol=1e-5), on_failure="ignore"))
    u, z0 = model.encoder(torch.randn(6, 5, generator=torch.Generator().manual_seed(1))), torch.zeros(6, 8)

    def solve(enabled: bool):
        grad = Implicit(solver=solver(max_steps=60, tol=1e-5))
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            solution = fixed_point(
                lambda z: torch.tanh(model.inner(z) + u), z0, solver=model.deq.solver, grad=grad, on_failure="ignore"
            )
        gradient = torch.autograd.grad(solution.value.square().sum(), model.inner.weight, retain_graph=True)[0]
        return solution, gradient

    (wide, exact), (coarse, found) = solve(False), solve(True)
    rounding = torch.finfo(dtype).eps
    for narrow, full in ((coarse.stats, wide.stats), (coarse.stats.adjoint, wide.stats.adjoint)):
        assert bool(full.converged.all()) and bool((narrow.converged | narrow.stalled).all())
        assert len(narrow.trace) <= 1.5 * len(full.trace) and narrow.residual.max() <= rounding
        assert not narrow.stalled.any() or f"stopped at the rounding of {str(dtype)[6:]}" in describe(narrow)
    assert bool(coarse.stats.stalled.any()) and relative(coarse.z_star, wide.z_star) < rounding
    assert relative(found, exact) < 4 * rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_start_at_the_rounding_is_an_answer(dtype, monkeypatch):
    monkeypatch.setattr(report, "_said", set())
    torch.manual_seed(0)
    w, x = (0.7 * torch.linalg.qr(torch.randn(8, 8))[0]).to(dtype), torch.randn(2, 8).to(dtype)

    def f(z):
        return torch.tanh(z @ w + x)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        z = fixed_point(f, torch.zeros(2, 8, dtype=dtype), solver=FixedPoint(tol=1e-9), on_failure="ignore").z_star
        stats = fixed_point(f, z, solver=FixedPoint(tol=1e-9)).stats
    assert len(stats.trace) <= 4 and bool((stats.stalled | stats.converged).all())


def test_the_backward_of_a_state_stops_at_the_rounding_too():
    found = []

    class Noted(Implicit):
        def cotangent(self, vjp, g, stats, history):
            u = super().cotangent(vjp, g, stats, history)
            found.append(stats.adjoint)
            return u

    model, grad = Model(DEQ()), Noted(solver=Broyden(max_steps=60, tol=1e-6))
    x = 0.3 * torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = fixed_point(
            lambda z: torch.tanh(2 * model.inner(z) + x), torch.zeros(6, 8), grad=grad, states=(2,), on_failure="ignore"
        )
        torch.autograd.grad(solution.states[0].square().sum(), model.inner.weight)
    (adjoint,) = found
    assert adjoint.stalled.any() and len(adjoint.trace) < 40


def test_a_fixed_budget_is_run_whole_under_autocast():
    model = Model(DEQ(solver=FixedPoint(max_steps=40, tol=None)))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        stats = model.deq(lambda z: torch.tanh(model.inner(z)), torch.ones(6, 8)).stats
    assert len(stats.trace) == 41 and not stats.stalled.any()


def test_autocast_leaves_float64_alone():
    w = 0.7 * torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        stats = fixed_point(
            lambda z: torch.tanh(z @ w + 1), torch.zeros(2, 8, dtype=torch.float64), solver=FixedPoint(tol=1e-6)
        ).stats
    assert stats.converged.all() and stats.computed_in is None
