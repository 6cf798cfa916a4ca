"""Every gradient estimator against an independent oracle: dense Jacobians, differences, steps unrolled by hand."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from phantom import BPTT, DEQ, NPG, UPG, Broyden, FixedPoint, Implicit, JacobianRegularizer, fixed_point
from tests.phantom.cases import ADJOINT, BATCH, DIM, ESTIMATORS, SOLVE, Case, close, each
from tests.phantom.problems import DTYPE, Regression, TanhMap, randn

EXACT = 1e-10  # against dense oracles at an equilibrium as exact as float64 has
SAME = 1e-12  # between two ways to do the same arithmetic


@each("implicit", "implicit_anderson")
def test_implicit_is_the_dense_solution(grad):
    case = Case()
    close(case.gradients(grad), case.carry(case.exact_adjoint()), EXACT)


@each("implicit", "implicit_anderson")
def test_implicit_passes_gradcheck(grad):
    cell = TanhMap(3, seed=3)

    def equilibrium(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        def f(z: Tensor) -> Tensor:
            return torch.tanh(z @ weight.mT + bias) + x

        return fixed_point(f, torch.zeros_like(x), solver=SOLVE, grad=grad).value

    x = randn(2, 3, seed=4).requires_grad_()
    weight, bias = cell.weight.detach().requires_grad_(), cell.bias.detach().requires_grad_()
    assert torch.autograd.gradcheck(equilibrium, (weight, bias, x), eps=1e-6, atol=1e-8, rtol=1e-6)


@each("implicit", "implicit_anderson")
def test_implicit_has_the_closed_form_of_a_linear_map(grad):
    a = randn(5, 5, seed=1) * 0.2
    x = randn(3, 5, seed=2).requires_grad_()
    g = randn(3, 5, seed=3)
    value = fixed_point(lambda z: z @ a.T + x, torch.zeros(3, 5, dtype=DTYPE), solver=SOLVE, grad=grad).value
    inverse = torch.linalg.inv(torch.eye(5, dtype=DTYPE) - a)
    close([value], [x @ inverse.T], EXACT)
    close(torch.autograd.grad(value, x, g), [g @ inverse], EXACT)


def test_implicit_reports_its_solve():
    case = Case()
    grad = Implicit(solver=FixedPoint(max_steps=500, tol=1e-9))
    solution = case.solve(grad)
    assert solution.stats.adjoint is None and solution.stats.num_vjps == 0
    solution.value.backward(case.cotangent)
    adjoint = solution.stats.adjoint
    assert adjoint.converged.all() and (adjoint.residual < 1e-9).all()
    assert solution.stats.num_vjps == adjoint.num_evals == int(adjoint.num_steps.max())
    # u = 0, where the map is g itself, needs no vjp, and has the relative residual 1
    torch.testing.assert_close(adjoint.trace[0], torch.ones(BATCH, dtype=DTYPE))


def test_implicit_problems_are_independent():
    case = Case()
    case.cotangent[1] = 0
    gradient = case.gradients(ESTIMATORS["implicit"])[2]
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))
    close([gradient], [case.exact_adjoint()], EXACT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_implicit_does_not_hide_a_cotangent_that_is_not_finite(value):
    """The solver keeps its best finite iterate, zero: as a gradient that would pass for an answer."""
    case = Case()
    case.cotangent[1, 2] = value
    gradient = case.gradients(ESTIMATORS["implicit"])[2]
    assert not gradient[1].isfinite().all()
    others = [0, 2, 3]
    close([gradient[others]], [case.exact_adjoint()[others]], EXACT)


def test_implicit_without_progress_is_the_one_step_gradient():
    """J = -3: one step from u = 0 has a larger residual than u = 0, whose gradient would be zero."""
    x = torch.ones(1, 2, dtype=DTYPE, requires_grad=True)
    grad = Implicit(solver=FixedPoint(max_steps=1, tol=1e-9))
    solution = fixed_point(lambda z: -3 * z + x, torch.full_like(x, 0.25).detach(), solver=SOLVE, grad=grad)
    (gradient,) = torch.autograd.grad(solution.value.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x)) and not solution.stats.adjoint.converged.any()


@pytest.mark.parametrize("lam", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_npg_misses_the_exact_adjoint_by_a_power_of_b(k, lam):
    """u_exact - u = (B^T)^k u_exact; df/dx is the identity, so the gradient of x is u itself."""
    case = Case()
    exact = case.exact_adjoint()
    damped = lam * case.jacobian + (1 - lam) * torch.eye(DIM, dtype=DTYPE)
    error = torch.linalg.matrix_power(damped.mT, k) @ exact[:, :, None]
    solution = case.solve(NPG(k=k, lam=lam))
    (u,) = torch.autograd.grad(solution.value, case.x, case.cotangent)
    close([exact - u], [error[:, :, 0]], EXACT)
    assert solution.stats.num_vjps == k - 1


@pytest.mark.parametrize("lam", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_upg_equals_npg_at_an_exact_fixed_point(k, lam):
    case = Case()
    close(case.gradients(UPG(k=k, lam=lam)), case.gradients(NPG(k=k, lam=lam)), EXACT)


def test_upg_differs_from_npg_away_from_it():
    case = Case()
    coarse = {"z0": torch.zeros_like(case.z_star), "solver": FixedPoint(max_steps=2, tol=None)}
    upg, npg = case.gradients(UPG(k=5, lam=0.5), **coarse), case.gradients(NPG(k=5, lam=0.5), **coarse)
    assert (upg[0] - npg[0]).norm() > 1e-3 * npg[0].norm()


@pytest.mark.parametrize("grad", [UPG(k=1, lam=1.0), NPG(k=1, lam=1.0)], ids=["upg", "npg"])
def test_one_step_by_hand(grad):
    case = Case()
    close(case.gradients(grad), case.carry(case.cotangent), EXACT)
    # and at a coarse solve: the ordinary gradient of one evaluation
    z = torch.zeros_like(case.z_star)
    for _ in range(3):
        z = case.map.bind(case.x)(z).detach()
    expected = torch.autograd.grad(case.map.bind(case.x)(z), case.leaves, case.cotangent)
    coarse = {"z0": torch.zeros_like(z), "solver": FixedPoint(max_steps=3, tol=None)}
    close(case.gradients(grad, **coarse), expected, SAME)


@pytest.mark.parametrize("lam", [0.5, 1.0])
@pytest.mark.parametrize("estimator", [UPG, NPG])
def test_many_terms_are_the_implicit_gradient(estimator, lam):
    case = Case()
    close(case.gradients(estimator(k=400, lam=lam)), case.carry(case.exact_adjoint()), EXACT)


@each()
def test_every_leaf_gets_a_gradient(grad):
    for gradient in Case().gradients(grad):
        assert gradient.isfinite().all() and (gradient != 0).all()


def test_values_follow_the_convention():
    """At a coarse solve: UPG gives h_k, the adjoint family f(z_star), no_grad z_star, BPTT its own last state."""
    case = Case()
    f = case.map.bind(case.x.detach())
    coarse = {"z0": torch.zeros_like(case.z_star), "solver": FixedPoint(max_steps=3, tol=None)}
    z = torch.zeros_like(case.z_star)
    for _ in range(3):
        z = f(z)
    expected = {"adjoint": f(z), "no_grad": z, "upg": z, "bptt": torch.zeros_like(z)}
    for _ in range(5):
        expected["upg"] = 0.5 * f(expected["upg"]) + 0.5 * expected["upg"]
    for _ in range(6):
        expected["bptt"] = f(expected["bptt"])
    for name in ADJOINT:
        close([case.solve(ESTIMATORS[name], **coarse).value], [expected["adjoint"]], SAME)
    close([case.solve(ESTIMATORS["upg"], **coarse).value], [expected["upg"]], SAME)
    solution = case.solve(ESTIMATORS["bptt"], **coarse)
    close([solution.value, solution.z_star], [expected["bptt"]] * 2, SAME)
    assert solution.stats.num_evals == 6 and not solution.z_star.requires_grad
    for name, grad in ESTIMATORS.items():
        with torch.no_grad():
            solution = case.solve(grad, **coarse)
        assert not solution.value.requires_grad
        close([solution.value, solution.z_star], [expected["no_grad"]] * 2, SAME)
        if name != "bptt":
            assert not case.solve(grad, **coarse).z_star.requires_grad


def test_attach_without_grad_is_an_error():
    case = Case()
    for grad in ESTIMATORS.values():
        with torch.no_grad():
            solution = case.solve(grad)
            with pytest.raises(RuntimeError, match="needs grad"):
                grad.attach(case.map.bind(case.x), solution)


@each()
def test_estimators_do_not_look_at_training(grad):
    """The gradient of an energy in evaluation mode, such as a force, is the same gradient."""
    model = Regression(DEQ(solver=FixedPoint(max_steps=4, tol=None), grad=grad))
    x = randn(BATCH, 3, seed=5).requires_grad_()
    gradients = []
    for training in (True, False):
        model.train(training)
        value = model(x)
        gradients.append((value.detach(), *torch.autograd.grad(value.square().sum(), [x, *model.parameters()])))
        assert value.requires_grad
        with torch.no_grad():
            assert not model(x).requires_grad
    close(*gradients, 0.0)


def test_eval_solver_is_chosen_by_training_alone():
    deq = DEQ(
        solver=FixedPoint(max_steps=3, tol=None), grad=NPG(k=1, lam=1.0), eval_solver=Broyden(max_steps=7, tol=None)
    )
    x = randn(2, 3, seed=1)
    assert deq(lambda z: 0.5 * z + x, torch.zeros_like(x)).stats.num_evals == 4 + 1
    deq.eval()
    assert deq(lambda z: 0.5 * z + x, torch.zeros_like(x)).stats.num_evals == 8 + 1


@each()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda deq: pickle.loads(pickle.dumps(deq))])
def test_a_layer_that_was_used_is_copied_whole(grad, copied):
    case = Case()
    deq = DEQ(solver=FixedPoint(max_steps=5, tol=None), grad=grad)

    def gradient(deq: DEQ) -> Tensor:
        value = deq(case.map.bind(case.x), torch.zeros_like(case.x)).value
        return torch.autograd.grad(value, case.x, case.cotangent)[0]

    expected = gradient(deq)
    twin = copied(deq)
    assert torch.equal(gradient(twin), expected)
    twin.solver = FixedPoint(max_steps=1, tol=None)
    assert torch.equal(gradient(deq), expected), "they share no settings"


@pytest.mark.parametrize("lam", [0.6, 1.0])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_bptt_is_the_loop_written_out(lam, checkpoint):
    case = Case()
    z0 = randn(BATCH, DIM, seed=20)
    z = z0
    for _ in range(7):
        z = (1 - lam) * z + lam * (torch.tanh(z @ case.map.weight.T + case.map.bias) + case.x)
    expected = torch.autograd.grad(z, case.leaves, case.cotangent)
    close(case.gradients(BPTT(num_steps=7, lam=lam, checkpoint=checkpoint), z0=z0), expected, SAME)


@pytest.mark.parametrize("k", [1, 4])
def test_upg_checkpoint_changes_nothing_but_memory(k):
    case = Case()
    coarse = {"z0": torch.zeros_like(case.z_star), "solver": FixedPoint(max_steps=2, tol=None)}
    close(
        case.gradients(UPG(k=k, lam=0.5), **coarse), case.gradients(UPG(k=k, lam=0.5, checkpoint=True), **coarse), 0.0
    )
    kept = []
    for checkpoint in (False, True):
        saved = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.add(t.data_ptr()) or t, lambda t: t):
            case.solve(UPG(k=k, lam=0.5, checkpoint=checkpoint), **coarse)
        kept.append(len(saved))
    assert kept[1] <= kept[0] and (k == 1 or kept[1] < kept[0])  # one step may keep nothing but the state


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("estimator", [UPG, BPTT])
def test_unrolling_can_be_differentiated_twice(estimator, checkpoint):
    """The derivative of a squared gradient norm, against central differences of that norm at the same z_star."""
    case = Case()
    start = randn(BATCH, DIM, seed=21)
    nothing = FixedPoint(max_steps=0, tol=None)
    settings = {"k": 3, "lam": 0.5} if estimator is UPG else {"num_steps": 3, "lam": 0.5}
    grad = estimator(**settings, checkpoint=checkpoint)

    def penalty(create_graph: bool) -> Tensor:
        value = case.solve(grad, z0=start, solver=nothing).value
        gradients = torch.autograd.grad((value * case.cotangent).sum(), case.leaves, create_graph=create_graph)
        return sum(g.square().sum() for g in gradients)

    second = torch.autograd.grad(penalty(True), case.leaves)
    for leaf, derivative in zip(case.leaves, second, strict=True):
        direction = randn(*leaf.shape, seed=22)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf.add_(direction, alpha=sign * 1e-5)
            ends.append(penalty(False))
            with torch.no_grad():
                leaf.add_(direction, alpha=-sign * 1e-5)
        difference = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close((derivative * direction).sum(), difference, rtol=1e-7, atol=1e-7)


@each("npg", "one_step")
@pytest.mark.parametrize("loss", ["linear", "quadratic"])
def test_the_phantom_adjoint_refuses_a_second_derivative(grad, loss):
    """Also where the cotangent is a constant, and a part of the second derivative would exist."""
    case = Case()
    value = case.solve(grad).value
    scalar = value.sum() if loss == "linear" else value.square().sum()
    gradients = torch.autograd.grad(scalar, case.leaves, create_graph=True)
    close(gradients, torch.autograd.grad(scalar, case.leaves), 0.0)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="use UPG"):
            torch.autograd.grad(gradient.square().sum(), case.leaves, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UPG(k=0, lam=0.5), "k=0 must be an integer >= 1"),
        (lambda: NPG(k=2.0, lam=0.5), "k=2.0 must be an integer >= 1"),
        (lambda: UPG(k=1, lam=1.5), "lam=1.5 must be in (0, 1]"),
        (lambda: NPG(k=1, lam=0), "lam=0 must be in (0, 1]"),
        (lambda: BPTT(num_steps=0), "num_steps=0 must be an integer >= 1"),
        (lambda: Implicit(solver=FixedPoint(max_steps=0, tol=None)), "solver.max_steps=0 must be an integer >= 1"),
        (lambda: Implicit(solver="broyden"), "solver must be a Solver"),
        (lambda: DEQ(solver=SOLVE, grad="upg"), "grad must be a GradientEstimator"),
        (lambda: DEQ(solver="broyden", grad=UPG(k=1, lam=1.0)), "solver must be a Solver"),
        (lambda: DEQ(solver=Broyden), "got the class Broyden: call it, Broyden()"),
        (lambda: DEQ(grad=NPG), "got the class NPG: call it, NPG()"),
        (lambda: DEQ(on_failure="loud"), "choose one of useless, ignore, warn, raise, or a function of Stats"),
        (lambda: DEQ(solver=SOLVE, eval_solver=3), "eval_solver must be a Solver such as Broyden"),
        (lambda: DEQ(solver=SOLVE, grad=UPG(k=1, lam=1.0), regularizer=0.1), "regularizer must be callable"),
        (lambda: DEQ(regularizer=JacobianRegularizer), "such as JacobianRegularizer(), or None, got <class"),
    ],
)
def test_impossible_settings_name_themselves(make, message):
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    assert message in str(error.value)


def test_unknown_settings_are_refused():
    for make in (lambda: UPG(k=1, lam=1.0, tau=0.5), lambda: Implicit(solver=SOLVE, k=9), lambda: UPG(5, 0.5)):
        with pytest.raises(TypeError):
            make()


def test_checkpointed_steps_draw_their_masks_again():
    w = randn(6, 6, seed=1).mul_(0.2).requires_grad_()
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        value = fixed_point(
            lambda z: torch.nn.functional.dropout(torch.tanh(z @ w.T + 1), 0.5),
            torch.ones(4, 6, dtype=DTYPE),
            solver=FixedPoint(max_steps=0, tol=None),
            grad=UPG(k=3, lam=0.5, checkpoint=checkpoint),
        ).value
        torch.manual_seed(5)
        found.append(torch.autograd.grad(value.sum(), w)[0])
    assert torch.equal(*found)


def test_the_regulariser_does_not_ask_for_training_mode():
    deq = DEQ(solver=SOLVE, grad=UPG(k=1, lam=1.0), regularizer=lambda f, z: f(z).square().mean()).eval()
    assert deq(lambda z: 0.5 * z + 1, torch.zeros(2, 3, dtype=DTYPE)).penalty is not None
