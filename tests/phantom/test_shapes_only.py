"""States without numbers, on the meta device or fake, give the shapes of a solve whose budget is all used."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from phantom import BPTT, DEQ, NPG, SHINE, UPG, Broyden, FixedPoint, Implicit, WeightNorm, fixed_point
from tests.phantom.solvers import FEW_STEPS, each

GRADS = {
    "upg": UPG(k=2),
    "upg_checkpoint": UPG(k=2, checkpoint=True),
    "npg": NPG(k=2),
    "implicit": Implicit(solver=Broyden(max_steps=4)),
    "bptt": BPTT(num_steps=2),
}


class Model(nn.Module):
    def __init__(self, deq: DEQ) -> None:
        super().__init__()
        self.deq, self.weight = deq, WeightNorm(torch.ones(4, 4))

    def forward(self, x):
        weight = self.weight()
        return self.deq(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x))


@pytest.mark.parametrize("place", ["meta", "fake"])
@pytest.mark.parametrize("tol", [None, 1e-3])
@pytest.mark.parametrize("grad", GRADS.values(), ids=GRADS)
@each(FEW_STEPS)
def test_forward_and_backward_have_their_shapes(solver, grad, tol, place):
    solver = type(solver)(**{**vars(solver), "tol": tol})
    with FakeTensorMode() if place == "fake" else torch.device("meta"):
        model, x = Model(DEQ(solver=solver, grad=grad)), torch.zeros(3, 4)
        solution = model(x)
        solution.value.square().sum().backward()
        with torch.no_grad():
            again = model(x)
    assert solution.value.shape == again.value.shape == (3, 4)
    assert solution.value.device.type == ("meta" if place == "meta" else "cpu")
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
    if not isinstance(grad, BPTT):
        assert solution.stats.trace.shape == (8, 3), "nothing says that fewer steps are enough"
    assert again.stats.residual.shape == again.stats.converged.shape == (3,)


def test_shine_on_meta():
    x = torch.zeros(3, 4, device="meta", requires_grad=True)
    value = fixed_point(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x), solver=Broyden(), grad=SHINE()).value
    value.sum().backward()
    assert value.shape == x.grad.shape == (3, 4)


def test_a_failure_policy_reads_nothing():
    x = torch.zeros(3, 4, device="meta")
    solution = fixed_point(lambda z: 2 * z + x, x, solver=FixedPoint(max_steps=2), grad=UPG(), on_failure="raise")
    assert solution.value.shape == (3, 4)
