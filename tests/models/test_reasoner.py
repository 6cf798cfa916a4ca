"""The recursive reasoner: drawn weights, rotary positions, gradients against dense linear algebra, bad input."""

from functools import partial

import pytest
import torch
from scipy import stats

from models.reasoner import Reasoner
from models.reasoner.layers import MixerBlock, hidden_width, linear, rotary_tables, rotate
from models.reasoner.supervision import Supervision
from phantom import BPTT, DEQ, NPG, SHINE, UPG, FixedPoint, Implicit, JacobianRegularizer, Rollout, SolveError
from tests.models.reasoners import ATTENTION, MIXER, TIGHT, batch, make
from tests.phantom.attentions import Attentions

# ------------------------------------------------------------------------------------------------ layers


def test_weights_have_exactly_the_standard_deviation_asked_for():
    torch.manual_seed(0)
    weight = linear(400, 500).weight
    assert weight.std().item() == pytest.approx(400**-0.5, rel=0.01)
    cut = stats.truncnorm(-2, 2).std()
    assert weight.abs().max().item() * 400**0.5 == pytest.approx(2 / cut, rel=1e-3)


def test_inner_widths():
    assert [hidden_width(m, 4, 256) for m in (512, 81, 97, 916, 64, 16)] == [1536, 256, 512, 2560, 256, 256]
    assert hidden_width(16, 0.01, 8) == 8


def test_attention_sees_distances_alone():
    query, key = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def product(i: int, j: int) -> float:
        tables = rotary_tables(torch.tensor([[i], [j]]), 6)
        turned = rotate(torch.cat([query, key], dim=2), *tables)[0, 0]
        return (turned[0] @ turned[1]).item()

    assert product(3, 7) == pytest.approx(product(13, 17), rel=1e-12)
    assert product(3, 7) != pytest.approx(product(3, 8), rel=1e-3)


def test_far_positions_are_turned_in_float32():
    """bfloat16 has 8 bits: an angle's cosine in it, and its products, would lose as much again as the answer does."""
    x = torch.randn(1, 4, 916, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    tables = rotary_tables(torch.arange(916)[:, None], 64)
    exact = rotate(x.double(), *tables)
    assert rotate(x, *tables).dtype == torch.bfloat16
    error = (rotate(x, *tables).double() - exact).norm() / exact.norm()
    rounded = (exact.bfloat16().double() - exact).norm() / exact.norm()
    assert error < 1.01 * rounded


def test_rows_and_columns_turn_a_half_of_the_channels_each():
    x = torch.randn(1, 1, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[0, 0], [0, 5], [3, 0], [3, 5]])
    turned = rotate(x, *rotary_tables(places, 8))
    for i, (row, column) in enumerate(places.tolist()):
        for half, position in ((slice(0, 4), row), (slice(4, 8), column)):
            a, b = x[0, 0, i, half].chunk(2)
            z = torch.complex(a, b) * torch.exp(1j * position * 10_000.0 ** (-torch.arange(2) / 2.0)).to(
                torch.complex128
            )
            torch.testing.assert_close(turned[0, 0, i, half], torch.cat([z.real, z.imag]), rtol=1e-6, atol=1e-6)


def test_the_mixer_normalises_over_positions():
    block = MixerBlock(width=5, length=7, expansion=1, multiple=4).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        block.mlp.down.weight.zero_()
        mixed = x.mT + block.mix(x.mT)
        mixed = mixed / (mixed.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
        expected = mixed.mT / (mixed.mT.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(block(x, None), expected, rtol=1e-12, atol=1e-12)


def test_a_penalty_differentiates_attention_twice_and_leaves_the_solve_its_kernel():
    inputs, _ = batch(2)
    calls = []
    for regularizer in (None, JacobianRegularizer()):
        solver = FixedPoint(max_steps=3, tol=None)
        deq = DEQ(solver=solver, grad=UPG(k=1, lam=1.0), regularizer=regularizer)
        model = make(block=ATTENTION, deq=deq)
        with Attentions() as attentions:
            solution = model.step(inputs, model.start_state(inputs)).solution
        calls.append(attentions.fused)
    assert calls[0] == calls[1] > 3
    state = tuple(part.detach() for part in solution.z_star)
    x = model.embed(inputs).detach()
    weights = [model.cell.fast.blocks[0].mix.query_key_value.weight, model.cell.fast.blocks[0].mlp.up.weight]

    def penalty(*_) -> torch.Tensor:
        torch.manual_seed(3)
        return JacobianRegularizer()(model.bind(x), state)

    assert penalty() > 0
    assert torch.autograd.gradcheck(penalty, weights, fast_mode=True)


# ------------------------------------------------------------------------------------------------ gradients

CELLS = {
    "mixer": {"block": MIXER},
    "attention": {"block": ATTENTION},
    "two networks": {"block": MIXER, "shared": False},
    "damped": {"block": MIXER, "lam": 0.7},
    "one state": {"block": ATTENTION, "speeds": 1},
}


class Dense:
    """The equilibrium of one supervision step by iteration, and J at it by one derivative per entry."""

    def __init__(self, model: Reasoner, inputs: torch.Tensor) -> None:
        self.model, self.inputs = model, inputs
        self.parameters = [p for name, p in model.named_parameters() if not name.startswith(("readout", "halting"))]
        with torch.no_grad():
            z = model.start_state(inputs)
            f = model.bind(model.embed(inputs))
            for _ in range(400):
                z = f(z)
        self.z = z
        shapes = [part.shape for part in (z if isinstance(z, tuple) else (z,))]
        sizes = [shape.numel() for shape in shapes]

        def unflat(v: torch.Tensor):
            parts = tuple(p.view(s) for p, s in zip(v.split(sizes), shapes, strict=True))
            return parts if len(parts) > 1 else parts[0]

        def vector(state) -> torch.Tensor:
            return torch.cat([part.reshape(-1) for part in (state if isinstance(state, tuple) else (state,))])

        point = vector(z)
        self.value = vector(f_with_graph(model, inputs, unflat(point)))
        self.residual = (self.value - point).norm().item()
        self.jacobian = torch.autograd.functional.jacobian(
            lambda v: vector(f_with_graph(model, inputs, unflat(v))), point
        )
        # the loss is linear in the slow state, so that its cotangent is a constant
        self.cotangent = torch.zeros_like(point)
        count = shapes[0].numel()
        self.cotangent[:count] = torch.randn(count, dtype=point.dtype, generator=torch.Generator().manual_seed(7))

    def gradient(self, u: torch.Tensor) -> torch.Tensor:
        """Return u^T dF/dtheta."""
        return torch.cat([g.flatten() for g in torch.autograd.grad(self.value, self.parameters, u, retain_graph=True)])

    def estimate(self, grad) -> torch.Tensor:
        self.model.deq.grad = grad
        x = self.model.embed(self.inputs)
        value = self.model.deq(self.model.bind(x), self.z).value
        slow = value[0] if isinstance(value, tuple) else value
        loss = slow.flatten() @ self.cotangent[: slow.numel()]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.parameters)])

    def exact(self) -> torch.Tensor:
        eye = torch.eye(len(self.jacobian), dtype=self.jacobian.dtype)
        return self.gradient(torch.linalg.solve(eye - self.jacobian.T, self.cotangent))

    def neumann(self, k: int, lam: float) -> torch.Tensor:
        """Return the gradient with u = lam sum_{i<k} (B^T)^i g."""
        b = lam * self.jacobian.T + (1 - lam) * torch.eye(len(self.jacobian), dtype=self.jacobian.dtype)
        u, term = torch.zeros_like(self.cotangent), lam * self.cotangent
        for _ in range(k):
            u, term = u + term, b @ term
        return self.gradient(u)


def f_with_graph(model: Reasoner, inputs: torch.Tensor, z):
    return model.bind(model.embed(inputs))(z)


@pytest.fixture(scope="module", params=CELLS)
def dense(request) -> Dense:
    return Dense(make(contracting=True, **CELLS[request.param]), batch(2)[0])


def test_the_cell_contracts_here(dense):
    assert dense.residual < 1e-12
    assert 0.1 < torch.linalg.eigvals(dense.jacobian).abs().max() < 0.95


def test_the_implicit_gradient_is_the_dense_one(dense):
    torch.testing.assert_close(dense.estimate(Implicit(solver=TIGHT)), dense.exact(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("k", "lam"), [(1, 1.0), (3, 1.0), (4, 0.5)])
def test_phantom_gradients_are_their_neumann_sums(dense, k, lam):
    expected = dense.neumann(k, lam)
    for grad in (NPG(k=k, lam=lam), UPG(k=k, lam=lam)):
        torch.testing.assert_close(dense.estimate(grad), expected, rtol=1e-8, atol=1e-9)
    assert torch.linalg.vector_norm(expected - dense.exact()) > 1e-3 * torch.linalg.vector_norm(expected)


def test_many_steps_of_backpropagation_reach_the_exact_gradient(dense):
    torch.testing.assert_close(dense.estimate(BPTT(num_steps=200)), dense.exact(), rtol=1e-7, atol=1e-8)


def test_exact_gradient_against_finite_differences():
    model = make(contracting=True, deq=DEQ(solver=TIGHT, grad=Implicit(solver=TIGHT)))
    inputs, labels = batch(2)
    weight = model.cell.fast.blocks[0].mlp.up.weight

    def loss() -> torch.Tensor:
        return model.supervision.cell_losses(model.step(inputs, model.start_state(inputs)).logits, labels).sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    for i, j in ((0, 0), (2, 5)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[i, j] += sign * 1e-5
                values.append(loss().item())
                weight[i, j] -= sign * 1e-5
        assert gradient[i, j].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("change", [{"num_fast": 5}, {"lam": 0.6}, {"differentiate": "pair"}])
def test_the_exact_gradient_belongs_to_the_equilibrium_alone(change):
    """Neither the number of fast updates, nor the damping of the calls, nor the map that is solved, changes it."""
    inputs, labels = batch(2)
    found = []
    for changes in ({}, change):
        model = make(contracting=True, deq=DEQ(solver=TIGHT, grad=Implicit(solver=TIGHT)), **changes)
        step = model.step(inputs, model.start_state(inputs))
        model.supervision.cell_losses(step.logits, labels).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-7, atol=1e-9)


def test_the_last_pair_costs_what_it_says():
    solver = Rollout(max_steps=2)
    model = make(deq=DEQ(solver=solver, grad=NPG(k=1, lam=1.0)), differentiate="pair")
    inputs, _ = batch()
    step = model.step(inputs, model.start_state(inputs))
    with torch.no_grad():
        model.deq.solver = Rollout(max_steps=3)
        plain = model.step(inputs, model.start_state(inputs))
    torch.testing.assert_close(step.logits, plain.logits, rtol=1e-12, atol=1e-12)
    assert step.solution.stats.num_evals == plain.solution.stats.num_evals == 3


def test_the_last_pair_reports_its_backward_and_follows_the_policy():
    inputs, labels = batch()
    losses, found = [], []
    for grad in (NPG(k=3, lam=0.5), Implicit(solver=FixedPoint(max_steps=1, tol=1e-9))):
        model = make(deq=DEQ(solver=Rollout(max_steps=2), grad=grad, on_failure="raise"), differentiate="pair")
        step = model.step(inputs, model.start_state(inputs))
        losses.append(model.supervision.cell_losses(step.logits, labels).sum())
        found.append(step.solution.stats)
    losses[0].backward()
    assert found[0].num_vjps == 2 and found[0].num_steps.tolist() == [2] * len(inputs)
    with pytest.raises(SolveError, match="adjoint solve"):
        losses[1].backward()
    assert found[1].adjoint.num_steps.tolist() == [1] * len(inputs)


@pytest.mark.parametrize("name", CELLS)
def test_every_parameter_gets_a_gradient(name):
    model = make(**CELLS[name], deq=DEQ(solver=Rollout(max_steps=1), grad=UPG(k=1, lam=1.0)), positions="learned")
    outcome, _, _ = model(*batch())
    outcome.loss.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "d_model=0 must be an integer >= 1"),
        ({"prefix_tokens": -1}, "prefix_tokens=-1 must be"),
        ({"positions": "sinus"}, "positions='sinus' is not known; choose one of none, learned, rope, rope2d"),
        ({"positions": "rope"}, "positions='rope' turn the queries and keys of attention, a mixer has none"),
        ({"block": ATTENTION, "positions": "rope2d"}, "positions='rope2d' needs prefix_tokens=0, got 1"),
        ({"start": "learned"}, "start='learned' is not known; choose one of fixed, random"),
        ({"noise": -1.0}, r"noise=-1\.0 must be a number >= 0"),
        ({"speeds": 1, "differentiate": "pair"}, "differentiate='pair' needs a cell of two states"),
        ({"differentiate": "pair", "deq": DEQ(grad=SHINE())}, "grad=shine reuses one: use 'cycle'"),
        ({"num_fast": 0}, "num_fast=0 must be"),
        ({"lam": 0.0}, r"lam=0\.0 must be in"),
        ({"shared": 1}, "shared=1 must be true or false"),
        ({"block": ATTENTION, "d_model": 6}, r"d_model=6 must be a multiple of 2 \* num_heads=4"),
        ({"block": partial(ATTENTION, num_heads=0)}, "num_heads=0 must be an integer >= 1"),
        ({"block": partial(ATTENTION, expansion=-1.0)}, r"expansion=-1\.0 must be a number > 0"),
        ({"block": partial(ATTENTION, multiple=0)}, "multiple=0 must be an integer >= 1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"supervision\.steps=0 must be"),
        ({"halting": "never"}, "halting='never' is not known; choose one of fixed, halt, halt_or_continue"),
        ({"loss": "l2"}, "loss='l2' is not known"),
        ({"exploration": 1.5}, r"exploration=1\.5 must be in \[0, 1\]"),
        ({"eval_steps": 0}, "eval_steps=0 must be"),
        ({"restarts": 0}, "restarts=0 must be"),
    ],
)
def test_bad_supervision_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Supervision(**({"steps": 4, "halting": "halt"} | changes))


def test_puzzles_of_another_size_are_refused():
    model = make()
    inputs, labels = batch()
    with pytest.raises(ValueError, match=r"inputs and labels must both be \(B, 6\), got \(3, 5\) and \(3, 5\)"):
        model(inputs[:, :5], labels[:, :5])
    with pytest.raises(ValueError, match=r"got \(3, 6\) and \(2, 6\)"):
        model(inputs, labels[:2])
    _, _, carry = model(inputs, labels)
    with pytest.raises(ValueError, match=r"the carry keeps rows of shape \(3, 6\), the batch is \(2, 6\)"):
        model(inputs[:2], labels[:2], carry)
