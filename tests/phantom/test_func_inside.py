"""torch.func inside of f: what its transforms wrap is neither read from outside nor a leaf of the map."""

import pytest
import torch
from torch import func

from phantom import NPG, Implicit, fixed_point
from tests.phantom.problems import DTYPE
from tests.phantom.test_func import SOLVERS, WEIGHT, X, close


@pytest.mark.parametrize("grad", [NPG(k=2), Implicit(solver=SOLVERS["broyden"])], ids=["npg", "implicit"])
def test_a_gradient_per_problem_inside_f_that_reads_nothing(grad):
    """Nothing that f reads needs a gradient, and the leaves that func.grad makes under vmap are its own."""
    energy = func.vmap(func.grad(lambda z: (z @ WEIGHT @ z).sin()))
    found = fixed_point(lambda z: X - 0.1 * energy(z), torch.zeros_like(X), solver=SOLVERS["broyden"], grad=grad)
    assert not found.value.requires_grad
    close(found.value, X - 0.1 * energy(found.value))


def test_the_second_derivative_of_descent_per_problem():
    """Rows of equal w at the minimum of w^4 / 4 + c w^2 / 2 - w, by steps of vmap(grad); dw/dc = -w / (3 w^2 + c)."""
    c = torch.tensor([1.0, 2.0], dtype=DTYPE, requires_grad=True)
    slope = func.vmap(func.grad(lambda w, c: (w**4 / 4 + c * w**2 / 2 - w).sum()))
    grad, zeros = Implicit(solver=SOLVERS["broyden"]), torch.zeros(2, 3, dtype=DTYPE)
    w = fixed_point(lambda w: w - 0.2 * slope(w, c), zeros, solver=SOLVERS["broyden"], grad=grad).value
    (first,) = torch.autograd.grad(w.sum(), c, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), c)
    root, stiff = w.detach(), 3 * w.detach() ** 2 + c.detach()[:, None]
    rate = -root / stiff
    close(first.detach(), rate.sum(dim=1))
    close(second, (-(2 * rate + 6 * root * rate**2) / stiff).sum(dim=1))
