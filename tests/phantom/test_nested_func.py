"""torch.func around a solve whose map solves another one: the inner backward is differentiated by its cotangent."""

import torch
from torch import Tensor, func

from phantom import NPG, Implicit, fixed_point
from tests.phantom.problems import DTYPE
from tests.phantom.test_func import EXACT, SOLVERS, WEIGHT, X, equilibrium, nested


def test_a_solve_inside_f_in_reverse_mode_twice():
    """The forward mode of the outer solve differentiates the inner one by its cotangent."""

    def loss(scale: Tensor) -> Tensor:
        return nested(WEIGHT, scale * X, grad=None).square().sum()

    one, step = torch.ones((), dtype=DTYPE), 1e-6
    ends = [func.grad(loss)(one + sign * step) for sign in (1, -1)]
    found = func.grad(func.grad(loss))(one)
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-7)


def test_an_estimate_inside_f_has_forward_mode():
    def solve(x: Tensor, outer, inner) -> Tensor:
        def f(z: Tensor) -> Tensor:
            return torch.tanh(equilibrium(0.5 * WEIGHT, z, grad=inner) @ WEIGHT.mT) + x

        return fixed_point(f, torch.zeros_like(X), solver=SOLVERS["broyden"], grad=outer).value

    pairs = ((NPG(k=60, lam=1.0), NPG(k=40, lam=1.0)), (Implicit(solver=SOLVERS["broyden"]), None))
    found, exact = (func.jvp(lambda x, pair=pair: solve(x, *pair), (X,), (X.cos(),))[1] for pair in pairs)
    torch.testing.assert_close(found, exact, rtol=0, atol=EXACT)
