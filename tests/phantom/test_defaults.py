"""Five lines: defaults, numbers of numpy, forms of the state, and what a solve says about itself."""

import dataclasses
import tomllib
import warnings
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch.utils import _pytree as pytree

import phantom
from phantom import (
    DEQ,
    NPG,
    UPG,
    AdjointEstimator,
    Anderson,
    Broyden,
    FixedPoint,
    GradientEstimator,
    Implicit,
    JacobianRegularizer,
    SolveError,
    SolveWarning,
    SpectralNorm,
    WeightNorm,
    describe,
    fixed_point,
    report,
)
from phantom.diagnostics import spectral_radius
from tests.phantom.cases import close
from tests.phantom.problems import DTYPE, randn, with_radius

Z = torch.zeros(2, 3)

ROOT = Path(__file__).resolve().parents[2]
Pair = namedtuple("Pair", "h c")


def contraction() -> tuple[Tensor, Tensor, Tensor]:
    """Return W, x, and the solution of z = z W^T + x by a dense solve."""
    weight, x = with_radius(0.7, 5, seed=1), randn(3, 5, seed=2)
    return weight, x, torch.linalg.solve(torch.eye(5, dtype=DTYPE) - weight, x.mT).mT


def test_a_function_and_a_guess_are_enough():
    weight, x, truth = contraction()
    for call in (fixed_point, phantom.DEQ()):
        torch.testing.assert_close(
            call(lambda z: z @ weight.mT + x, torch.zeros_like(x)).z_star, truth, rtol=0, atol=1e-2
        )


@pytest.mark.parametrize("solver", [Broyden(), Anderson(), FixedPoint()], ids=str)
@pytest.mark.parametrize("grad", [UPG(), NPG(), Implicit()], ids=str)
def test_every_default_works(solver, grad):
    weight, x, truth = contraction()
    x.requires_grad_()
    solution = fixed_point(lambda z: z @ weight.mT + x, torch.zeros_like(x), solver=solver, grad=grad)
    assert solution.stats.converged.all()
    torch.testing.assert_close(solution.z_star, truth, rtol=0, atol=1e-2)
    (gradient,) = torch.autograd.grad(solution.value.sum(), x)
    exact = torch.linalg.solve(torch.eye(5, dtype=DTYPE) - weight.mT, torch.ones(3, 5, dtype=DTYPE).mT).mT
    if isinstance(grad, Implicit):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-4)
    assert torch.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > 0.8


def test_a_solver_for_one_call():
    weight, x, _ = contraction()
    deq = phantom.DEQ(solver=FixedPoint(max_steps=3, tol=None), confirm=False)
    with torch.no_grad():
        assert deq(lambda z: z @ weight.mT + x, torch.zeros_like(x)).stats.num_evals == 4
        one = deq(lambda z: z @ weight.mT + x, torch.zeros_like(x), solver=FixedPoint(max_steps=8, tol=None))
    assert one.stats.num_evals == 9 and deq.solver.max_steps == 3


@pytest.mark.parametrize("name", ["solver", "grad"])
def test_classes_are_refused_before_the_solve(name):
    calls = []
    with pytest.raises(TypeError, match=f"{name} must be a .*: call it"):
        fixed_point(lambda z: calls.append(z) or z, torch.zeros(2, 3), **{name: Broyden if name == "solver" else UPG})
    assert not calls


def test_numbers_of_numpy_are_numbers():
    solver = Anderson(
        max_steps=np.int64(7), tol=np.float32(1e-3), memory=np.int32(3), lam=np.float64(0.5), ridge=np.float32(0)
    )
    assert fixed_point(
        lambda z: 0.5 * z + 1, torch.zeros(2, 3), solver=solver, grad=UPG(k=np.int64(2))
    ).value.shape == (2, 3)
    for make in (
        lambda: FixedPoint(max_steps=np.float64(3.0)),
        lambda: FixedPoint(tol=np.bool_(True)),
        lambda: UPG(k=True),
    ):
        with pytest.raises(ValueError):
            make()


def test_messages_speak_python():
    with pytest.raises(ValueError, match=r"None \(null in YAML\)"):
        FixedPoint(tol="1e-3")


def test_leaves_of_the_configs_write_every_value():
    """A default is for Python: what a run does is read in its config."""
    found = 0
    groups = ("solver", "eval_solver", "adjoint_solver", "grad")
    for path in sorted(path for group in groups for path in ROOT.glob(f"configs/{group}/*.yaml")):
        leaf = yaml.safe_load(path.read_text())
        for node in (leaf, *(leaf or {}).values()):
            target = node.get("_target_", "") if isinstance(node, dict) else ""
            kind = getattr(phantom, target.removeprefix("phantom."), None) if target.startswith("phantom.") else None
            if kind not in (None, phantom.Rollout) and target.count(".") == 1 and dataclasses.is_dataclass(kind):
                assert {field.name for field in dataclasses.fields(kind) if field.init} <= node.keys(), path
                found += 1
    assert found >= 10


def test_the_version_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert phantom.__version__ == project["version"] and phantom.diagnostics.cosine


@pytest.mark.parametrize("grad", [UPG(k=3), NPG(k=3), Implicit()], ids=str)
@pytest.mark.parametrize(
    "form",
    [
        lambda a, b: {"h": a, "c": b},
        lambda a, b: [a, b],
        lambda a, b: Pair(a, b),
        lambda a, b: {"deep": [(a,), {"c": b}]},
        lambda a, b: (a, [b]),
    ],
    ids=["dict", "list", "namedtuple", "nested", "mixed"],
)
def test_states_of_any_form(grad, form):
    """The same numbers as the tuple of the same tensors."""
    weight = with_radius(0.7, 6, seed=3).requires_grad_()
    x, start = randn(4, 6, seed=4), randn(4, 6, seed=5)

    def run(join):
        def f(z):
            whole = torch.tanh(torch.cat(pytree.tree_leaves(z), dim=1) @ weight.mT + x)
            return join(whole[:, :2], whole[:, 2:])

        solution = fixed_point(f, join(start[:, :2], start[:, 2:]), solver=Broyden(tol=1e-9), grad=grad)
        return solution, torch.autograd.grad(pytree.tree_leaves(solution.value)[1].square().sum(), weight)

    solution, gradient = run(form)
    expected, own = run(lambda a, b: (a, b))
    assert (
        pytree.tree_structure(solution.value)
        == pytree.tree_structure(form(0, 0))
        == pytree.tree_structure(solution.z_star)
    )
    close(pytree.tree_leaves(solution.value), expected.value, 0.0)
    close(gradient, own, 0.0)


@pytest.mark.parametrize("answer", [lambda z: list(z.values()), lambda z: {"c": z["c"], "x": z["h"]}, lambda z: z["h"]])
def test_another_form_than_that_of_the_guess(answer):
    with pytest.raises(ValueError, match="f must return the form of z0, a dict of tensors"):
        fixed_point(answer, {"h": torch.zeros(2, 3), "c": torch.zeros(2, 3)})


def test_mixed_dtypes_name_the_way_out():
    with pytest.raises(ValueError, match=r"share dtype and device.*\.to\(dtype\)"):
        fixed_point(lambda z: z, {"h": torch.zeros(2, 3), "c": torch.zeros(2, 3).double()})


def test_solutions_are_pytrees():
    solution = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3), grad=NPG())
    twice = pytree.tree_map(
        lambda leaf: 2 * leaf if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, solution
    )
    assert type(twice) is phantom.Solution and torch.equal(twice.value, 2 * solution.value)
    assert torch.equal(twice.stats.residual, 2 * solution.stats.residual)
    assert torch.equal(twice.stats.converged, solution.stats.converged)


TURN = 0.7 * torch.linalg.qr(randn(4, 4, seed=7))[0].float()
FAILURES = {
    "budget": (lambda z: 0.9 * z + 1, FixedPoint(max_steps=5), "ran out of steps: raise max_steps"),
    "growth": (lambda z: 3 * z + 1, FixedPoint(max_steps=30), "diverged"),
    "rows": (
        lambda z: 0.99 * torch.diag(torch.ones(3), -1) @ z + torch.eye(4)[:, :1],
        FixedPoint(max_steps=2),
        r"z0\[None\]",
    ),
    "floor": (lambda z: torch.tanh(z @ TURN) + 0.3, FixedPoint(max_steps=300, tol=1e-12), "rounding of float32"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failed_solve_is_noticed(kind, monkeypatch):
    f, solver, words = FAILURES[kind]
    z0 = torch.zeros(4, 4)
    with pytest.raises(SolveError, match=words) as caught:
        fixed_point(f, z0, solver=solver, on_failure="raise")
    assert "residual" in str(caught.value) and "steps" in str(caught.value)
    with pytest.warns(SolveWarning, match=words):
        fixed_point(f, z0, solver=solver, on_failure="warn")
    seen = []
    stats = fixed_point(f, z0, solver=solver, on_failure=seen.append).stats
    assert len(seen) == 1 and seen[0] is stats and words.replace("\\", "") in describe(stats)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixed_point(f, z0, solver=solver, on_failure="ignore")
    monkeypatch.setattr(report, "_said", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            fixed_point(f, z0, solver=solver)
    assert len(caught) == (kind in ("growth", "rows")), "by default, once, and only where the outcome is no answer"


def test_a_solve_that_worked_says_so():
    stats = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3), on_failure="raise").stats
    assert "2 of 2 problems converged" in describe(stats)
    fixed = fixed_point(
        lambda z: 0.5 * z + 1, torch.zeros(2, 3), solver=FixedPoint(max_steps=2, tol=None), on_failure="raise"
    )
    assert "a fixed budget" in describe(fixed.stats)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: WeightNorm(torch.nn.Linear(3, 3)), TypeError, "weight must be a tensor, got Linear: pass its weight"),
        (lambda: SpectralNorm(torch.nn.Conv2d(3, 3, 1)), TypeError, "weight must be a tensor, got Conv2d"),
        (lambda: JacobianRegularizer()(Z, Z), TypeError, "f must be a map of states, got a tensor .*: pass f itself"),
        (lambda: spectral_radius(Z, Z), TypeError, r"pass f itself, and not its value f\(z\)"),
        (lambda: fixed_point(Z, Z), TypeError, "f must be a map of states"),
    ],
)
def test_what_a_user_types_first_is_answered(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_solution_is_described_by_its_statistics():
    solution = fixed_point(lambda z: 0.5 * z + 1, Z)
    assert describe(solution) == describe(solution.stats)


def test_a_warning_names_the_line_of_the_user():
    few = FixedPoint(max_steps=2, tol=1e-9)
    deq, x = DEQ(solver=few, on_failure="warn", grad=Implicit(solver=few)), Z.clone().requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = deq(lambda z: 0.9 * z + x + 1, Z).value
        value.sum().backward()
    assert len(caught) == 2 and {warning.filename for warning in caught} == {__file__}


@dataclass(frozen=True, kw_only=True)
class Wrong(FixedPoint):
    """A solver that makes the mistake `how`."""

    how: str

    def propose(self, memory, z, g):
        if self.how == "writes":
            z += g
            return z
        return {"shape": (z + g)[0], "dtype": (z + g).half(), "none": None}[self.how]


@dataclass(frozen=True, kw_only=True)
class WrongEstimator(AdjointEstimator):
    how: str

    def cotangent(self, vjp, g, stats, history):
        return g[:1] if self.how == "shape" else None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("writes", "propose has written to its argument z"),
        ("shape", r"propose must return the next iterate, a tensor \(2, 3\) of torch.\w+, got a tensor \(3,\)"),
        ("dtype", r"got a tensor \(2, 3\) of torch.float16"),
        ("none", "got NoneType"),
    ],
)
def test_a_solver_of_ones_own_that_errs_is_told(how, message):
    with pytest.raises(ValueError, match=message):
        fixed_point(lambda z: 0.5 * z + 1, Z.clone(), solver=Wrong(how=how))


@pytest.mark.parametrize(("how", "message"), [("shape", r"got a tensor \(1, 3\)"), ("none", "got NoneType")])
def test_an_estimator_of_ones_own_that_errs_is_told(how, message):
    x = Z.clone().requires_grad_()
    value = fixed_point(lambda z: 0.5 * z + x, Z, grad=WrongEstimator(how=how)).value
    with pytest.raises(
        ValueError, match=r"WrongEstimator.cotangent must return u \(2, 3\), the shape of g, " + message
    ):
        value.sum().backward()


def test_an_attach_of_ones_own_that_errs_is_told():
    class Pair(GradientEstimator):
        def attach(self, f, solution):
            return solution.z_star, None

    with pytest.raises(
        ValueError, match=r"Pair.attach must return a tensor \(2, 3\), the shape of z_star, got a tuple"
    ):
        fixed_point(lambda z: 0.5 * z + 1, Z, grad=Pair())


@pytest.mark.parametrize(
    "z0",
    [
        torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)], layout=torch.jagged),
        torch.zeros(2, 3).to_sparse(),
    ],
    ids=["jagged", "sparse"],
)
def test_ragged_and_sparse_states_are_refused(z0):
    with pytest.raises(TypeError, match="z0 must be of dense tensors, neither nested nor sparse: pad what is ragged"):
        fixed_point(lambda z: 0.5 * z, z0)


def test_the_defaults_of_solvers_and_estimators():
    shared = {"max_steps": 50, "tol": 1e-4, "stop": "relative", "norm": "l2", "sync_every": 1}
    assert Anderson() == Anderson(**shared, memory=6, lam=1.0, ridge=1e-6)
    assert Broyden() == Broyden(**shared, memory=None) and FixedPoint() == FixedPoint(**shared)
    assert (NPG(), UPG(), Implicit().solver) == (NPG(k=5, lam=0.5), UPG(k=5, lam=0.5), Broyden(tol=1e-6))
