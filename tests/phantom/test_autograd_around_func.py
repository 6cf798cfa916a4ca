"""autograd around a transform of torch.func that is over, where a solve is differentiated once more."""

import pytest
import torch
from torch import Tensor, func

from phantom import Implicit, fixed_point
from tests.phantom.problems import DTYPE
from tests.phantom.test_func import SOLVERS, WEIGHT, X, close, equilibrium, newton


def vmapped(solve):
    return lambda x: func.vmap(func.vmap(solve, (None, 0)), (0, None))(torch.stack([WEIGHT, WEIGHT.mT]), x[:, None])


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_a_vectorised_jacobian_of_autograd_around_vmap(strategy):
    jacobian = torch.autograd.functional.jacobian
    found, expected = (
        jacobian(vmapped(solve), X, vectorize=True, strategy=strategy) for solve in (equilibrium, newton)
    )
    close(found, expected)


def test_a_batched_gradient_with_a_graph_around_vmap_is_refused_in_a_sentence():
    """It had no graph through the equilibrium: beside another term, the second derivative was silently partial."""
    with pytest.raises(RuntimeError, match="around the whole model"):
        torch.autograd.functional.jacobian(vmapped(equilibrium), X, vectorize=True, create_graph=True)


def test_two_orders_around_a_transform_are_refused_where_f_is_affine():
    """The Jacobian of an affine map is a constant, by which no derivative of the linear solve was refused.

    With dz/dx = (I - w)^{-1} the exact answer is known: the one order around is 2 / (1 - w)^3.
    """

    def sensitivity(w: Tensor) -> Tensor:
        def solve(x: Tensor) -> Tensor:
            solver = SOLVERS["plain"]
            return fixed_point(
                lambda z: w * z + x, torch.zeros_like(x), solver=solver, grad=Implicit(solver=solver)
            ).value

        return func.jacrev(solve)(torch.ones(1, 1, dtype=DTYPE)).square().sum()

    w = torch.tensor(0.5, dtype=DTYPE, requires_grad=True)
    (first,) = torch.autograd.grad(sensitivity(w), w, create_graph=True)
    torch.testing.assert_close(first.detach(), 2 / (1 - w.detach()) ** 3)
    with pytest.raises(RuntimeError, match="each order is a transform of its own"):
        torch.autograd.grad(first, w)
