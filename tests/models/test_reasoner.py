"""The recursive reasoner: drawn weights, rotary positions, gradients against dense linear algebra, supervision."""

from functools import partial

import pytest
import torch
from scipy import stats

from models.reasoner import Reasoner
from models.reasoner.cell import OneSpeed, TwoSpeeds
from models.reasoner.evaluation import Run, score
from models.reasoner.layers import AttentionBlock, MixerBlock, Stack, hidden_width, linear, rotary_tables, rotate
from models.reasoner.supervision import Supervision, log_stablemax, refill
from phantom import BPTT, DEQ, NPG, UPG, FixedPoint, Implicit, Rollout

ATTENTION = partial(AttentionBlock, num_heads=2, expansion=1, multiple=4)
MIXER = partial(MixerBlock, expansion=1, multiple=4)
TIGHT = FixedPoint(max_steps=200, tol=1e-13)
WIDTH = 8


def make(
    *,
    block=MIXER,
    speeds: int = 2,
    num_fast: int = 2,
    shared: bool = True,
    lam: float = 1.0,
    contracting: bool = False,
    deq: DEQ | None = None,
    supervision: Supervision | None = None,
    **changes,
) -> Reasoner:
    """Return a tiny model of 2 x 3 cells in float64; `contracting`: with small blocks and a strong injection."""
    torch.manual_seed(0)
    stack = partial(Stack, num_layers=1, block=block)
    cell = partial(TwoSpeeds, num_fast=num_fast, shared=shared) if speeds == 2 else OneSpeed
    settings = {
        "d_model": WIDTH,
        "prefix_tokens": 1,
        "positions": "rope" if block is ATTENTION else "none",
        "start": "fixed",
        "noise": 0.0,
        "differentiate": "cycle",
        "vocab_size": 5,
        "height": 2,
        "width": 3,
    }
    model = Reasoner(
        **(settings | changes),
        cell=partial(cell, stack=stack, lam=lam),
        supervision=supervision or Supervision(steps=4, halting="halt", exploration=0.0),
        deq=deq or DEQ(solver=TIGHT, grad=UPG(k=1, lam=1.0)),
    ).double()
    with torch.no_grad():
        for parameter in model.cell.parameters():
            parameter.mul_(0.3 if contracting else 1.0)
        model.embedding.weight.mul_(6.0 if contracting else 1.0)
        if model.prefix is not None:
            model.prefix.normal_()
        if model.halting is not None:
            model.halting.weight.normal_()
            model.halting.bias.fill_(0.1)
    return model


def batch(count: int = 3, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, 5, (count, 6), generator=generator) for _ in range(2))


def flat(state) -> torch.Tensor:
    parts = state if isinstance(state, tuple) else (state,)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


# ------------------------------------------------------------------------------------------------ layers


def test_weights_have_exactly_the_standard_deviation_asked_for():
    torch.manual_seed(0)
    weight = linear(400, 500).weight
    assert weight.std().item() == pytest.approx(400**-0.5, rel=0.01)
    cut = stats.truncnorm(-2, 2).std()
    assert weight.abs().max().item() * 400**0.5 == pytest.approx(2 / cut, rel=1e-3)


def test_inner_widths():
    assert [hidden_width(m, 4, 256) for m in (512, 81, 97, 916, 64, 16)] == [1536, 256, 512, 2560, 256, 256]


def test_attention_sees_distances_alone():
    query, key = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def product(i: int, j: int) -> float:
        tables = rotary_tables(torch.tensor([[i], [j]]), 6)
        turned = rotate(torch.cat([query, key], dim=2), *tables)[0, 0]
        return (turned[0] @ turned[1]).item()

    assert product(3, 7) == pytest.approx(product(13, 17), rel=1e-12)
    assert product(3, 7) != pytest.approx(product(3, 8), rel=1e-3)


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
            for _ in range(100):
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
    torch.testing.assert_close(dense.estimate(BPTT(num_steps=80)), dense.exact(), rtol=1e-7, atol=1e-8)


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


@pytest.mark.parametrize("name", CELLS)
def test_every_parameter_gets_a_gradient(name):
    model = make(**CELLS[name], deq=DEQ(solver=Rollout(max_steps=1), grad=UPG(k=1, lam=1.0)), positions="learned")
    outcome, _, _ = model(*batch())
    outcome.loss.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---------------------------------------------------------------------------------------------- supervision


def test_stablemax():
    logits = torch.tensor([[-3.0, 0.0, 1.0, 2.0]], requires_grad=True)
    s = torch.tensor([0.25, 1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(log_stablemax(logits)[0], (s / s.sum()).log(), rtol=1e-12, atol=0)
    log_stablemax(logits)[0, 1].backward()
    # d log(s_1 / sum s) / dv_j = [j = 1] s'_j / s_j - s'_j / sum s, with s' = 1 for v >= 0 and s^2 below
    slopes = torch.tensor([0.0625, 1.0, 1.0, 1.0], dtype=torch.float64)
    expected = -slopes / s.sum() + torch.tensor([0.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(logits.grad[0].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", ["softmax", "stablemax"])
def test_ignored_cells_do_not_count(loss):
    supervision = Supervision(steps=1, halting="fixed", loss=loss)
    logits = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, -100, 3, -100], [-100] * 4])
    alone = supervision.cell_losses(logits[:1, [0, 2]], labels[:1, [0, 2]])
    torch.testing.assert_close(supervision.cell_losses(logits, labels), torch.cat([alone, alone.new_zeros(1)]))
    if loss == "softmax":
        expected = torch.nn.functional.cross_entropy(logits[0], labels[0])
        assert alone.item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_row_keeps_its_puzzle_until_it_is_finished():
    supervision = Supervision(steps=3, halting="fixed")
    model = make(supervision=supervision, deq=DEQ(solver=Rollout(max_steps=1), grad=UPG(k=1, lam=1.0)))
    carry, seen = None, []
    for i in range(7):
        outcome, _, carry = model(*batch(seed=i), carry)
        seen.append(carry["inputs"])
        assert carry["steps"].tolist() == [i % 3 + 1] * 3
        assert outcome.sums["finished"].item() == (3 if i % 3 == 2 else 0)
    for i in range(7):
        assert torch.equal(seen[i], batch(seed=i - i % 3)[0])


def test_a_state_goes_on_where_the_step_before_left_it():
    supervision = Supervision(steps=3, halting="fixed")
    model = make(supervision=supervision, deq=DEQ(solver=Rollout(max_steps=1), grad=UPG(k=1, lam=1.0)))
    inputs, labels = batch()
    f = model.bind(model.embed(inputs))
    z, carry = model.start_state(inputs), None
    for i in range(4):
        z = model.start_state(inputs) if i == 3 else z
        z = f(f(z))
        _, _, carry = model(inputs, labels, carry)
        torch.testing.assert_close(flat(carry["state"]), flat(z).detach(), rtol=1e-12, atol=1e-12)
        assert not any(part.requires_grad for part in carry["state"])


def test_single_rows_are_replaced():
    inputs, labels = batch()
    carry = {
        "inputs": inputs,
        "labels": labels,
        "state": (torch.ones(3, 2), torch.ones(3, 2)),
        "steps": torch.tensor([2, 5, 1]),
        "finished": torch.tensor([False, True, False]),
    }
    rows = refill(carry, inputs + 10, labels + 10, lambda: (torch.zeros(3, 2), torch.zeros(3, 2)))
    new = torch.tensor([False, True, False])[:, None]
    assert torch.equal(rows["inputs"], torch.where(new, inputs + 10, inputs))
    assert torch.equal(rows["labels"], torch.where(new, labels + 10, labels))
    assert rows["steps"].tolist() == [2, 0, 1]
    assert all(part[:, 0].tolist() == [1, 0, 1] for part in rows["state"])


def test_halting_by_the_outputs():
    halting = torch.tensor([[0.5, 1.0], [-0.5, -1.0], [0.5, 0.1], [-1.0, 3.0]])
    steps = torch.tensor([1, 2, 3, 4])
    by = {rule: Supervision(steps=4, halting=rule, exploration=0.0) for rule in ("halt", "halt_or_continue")}
    assert by["halt"].finished(halting, steps).tolist() == [True, False, True, True]
    assert by["halt_or_continue"].finished(halting, steps).tolist() == [False, True, True, True]
    assert Supervision(steps=4, halting="fixed").finished(None, steps).tolist() == [False, False, False, True]


def test_exploration_delays_and_never_forces():
    torch.manual_seed(0)
    supervision = Supervision(steps=5, halting="halt", exploration=0.5)
    wants = torch.ones(20_000, 2)
    rates = [supervision.finished(wants, torch.full((20_000,), n)).double().mean().item() for n in range(1, 6)]
    # with probability 1/2 a least number from {2, ..., 5} is drawn
    assert rates == pytest.approx([0.5 + 0.5 * (n - 1) / 4 for n in range(1, 6)], abs=0.015)
    assert supervision.finished(-wants, torch.full((20_000,), 4)).sum() == 0


def test_the_halting_loss():
    supervision = Supervision(steps=4, halting="halt_or_continue")
    halting = torch.tensor([[0.3, -0.2], [1.0, 2.0]], dtype=torch.float64)
    correct, target = torch.tensor([True, False]), torch.tensor([0.25, 0.5], dtype=torch.float64)
    p = halting.sigmoid()
    first = -torch.stack([p[0, 0].log(), (1 - p[1, 0]).log()])
    second = -(target * p[:, 1].log() + (1 - target) * (1 - p[:, 1]).log())
    torch.testing.assert_close(supervision.halting_losses(halting, correct, None), 0.5 * first)
    torch.testing.assert_close(supervision.halting_losses(halting, correct, target), 0.5 * (first + second))


def test_the_value_of_going_on_is_that_of_the_next_step():
    supervision = Supervision(steps=2, halting="halt_or_continue", exploration=0.0)
    deq = DEQ(solver=Rollout(max_steps=1), grad=UPG(k=1, lam=1.0), eval_solver=Rollout(max_steps=2))
    model = make(supervision=supervision, deq=deq)
    inputs, labels = batch()
    f = model.bind(model.embed(inputs))
    z = f(f(model.start_state(inputs)))
    next_ = model.halting(f(f(z))[0][:, 0]).detach()
    (rows, _, carry), steps = model(inputs, labels), torch.tensor([1, 2, 1])
    assert model.deq.training
    torch.testing.assert_close(
        model._value_of_going_on(inputs, carry["state"], steps),
        torch.stack([next_[0].max(), next_[1, 0], next_[2].max()]).sigmoid(),
    )
    outputs = model.halting(z[0][:, 0])
    exact = (model.readout(z[0][:, 1:]).argmax(2) == labels).all(1)
    expected = supervision.halting_losses(outputs, exact, next_.amax(1).sigmoid())
    expected = expected + supervision.cell_losses(model.readout(z[0][:, 1:]), labels)
    torch.testing.assert_close(rows.loss, expected, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------- evaluation

RANDOM = {"start": "random", "noise": 0.05, "lam": 0.9}


def test_evaluation_counts_every_step():
    model = make(deq=DEQ(solver=Rollout(max_steps=2), grad=UPG(k=1, lam=1.0))).eval()
    inputs, _ = batch(4)
    with torch.no_grad():
        z, answers = model.start_state(inputs), []
        for _ in range(4):
            z = model.bind(model.embed(inputs))(model.bind(model.embed(inputs))(z))
            answers.append(model.readout(z[0][:, 1:]))
        labels = answers[1].argmax(dim=2)  # all right at step 2
        labels[0] = answers[3].argmax(dim=2)[0]
        outcome, (solution,), carry = model(inputs, labels)
    exact = [(answer.argmax(dim=2) == labels).all(dim=1).sum().item() for answer in answers]
    assert [outcome.sums[f"exact@{n}"].item() for n in (1, 2, 4)] == [exact[0], exact[1], exact[3]]
    assert outcome.sums["exact"].item() == exact[3] and outcome.sums["finished"].item() == 4
    assert outcome.sums["right"].item() == (answers[3].argmax(dim=2) == labels).sum().item()
    assert carry is None and solution.stats.num_evals == 8
    torch.testing.assert_close(outcome.loss, model.supervision.cell_losses(answers[3], labels))


def test_an_answer_does_not_depend_on_its_batch():
    supervision = Supervision(steps=3, halting="halt", restarts=2)
    model = make(supervision=supervision, deq=DEQ(solver=Rollout(max_steps=1), grad=UPG(k=1, lam=1.0)), **RANDOM)
    inputs, labels = batch(5)
    with torch.no_grad():
        whole = model.eval()(inputs, labels)[0]
        parts = [model(inputs[rows], labels[rows])[0] for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat([part.loss for part in parts]), whole.loss, rtol=1e-12, atol=1e-12)
    for name, total in whole.sums.items():
        assert sum(part.sums[name] for part in parts).item() == pytest.approx(total.item(), rel=1e-12), name


def test_random_starts_and_noise_are_drawn_per_number_in_training():
    model = make(deq=DEQ(solver=Rollout(max_steps=1), grad=UPG(k=1, lam=1.0)), **RANDOM)
    inputs, _ = batch(400)
    slow, fast = model.start_state(inputs)
    for part in (slow, fast):
        assert part.std().item() == pytest.approx(1, abs=0.02) and part.abs().max() < 2.3
        assert len(part.unique()) > 0.99 * part.numel()
    assert not torch.equal(slow, fast)
    noise = model.draw_noise((slow, fast))
    assert noise[0].std().item() == pytest.approx(0.05, rel=0.05) and not torch.equal(*noise)
    # one function in one supervision step
    f = model.bind(model.embed(inputs), noise)
    assert torch.equal(flat(f((slow, fast))), flat(f((slow, fast))))
    quiet = flat(model.bind(model.embed(inputs))((slow, fast)))
    assert (flat(f((slow, fast))) - quiet).norm() > 0.01 * quiet.norm()


def test_damping_and_noise_of_a_call():
    model = make(lam=0.9, noise=0.1, num_fast=1)
    inputs, _ = batch()
    z, x = model.start_state(inputs), model.embed(inputs)
    noise = model.draw_noise(z)
    stack = model.cell.fast
    fast = 0.1 * z[1] + 0.9 * stack(z[1], z[0] + x, None) + noise[1]
    slow = 0.1 * z[0] + 0.9 * stack(z[0], fast, None) + noise[0]
    found = model.bind(x, noise)(z)
    torch.testing.assert_close(found, (slow, fast), rtol=1e-12, atol=1e-12)


def test_the_calmest_start_answers():
    """Two starts, three steps, two puzzles: start 1 is calmer for puzzle 0, start 0 for puzzle 1."""
    inf = float("inf")

    def run(exact, change) -> Run:
        exact = torch.tensor(exact)
        change = torch.tensor([[inf, inf], *change])
        return Run(change[-1], exact, exact * 6, change, change.nan_to_num(posinf=1.0))

    runs = [
        run([[True, False], [False, True], [False, True]], [[1.0, 0.1], [1.0, 0.1]]),
        run([[False, False], [True, False], [True, False]], [[0.5, 0.7], [0.2, 0.7]]),
    ]
    loss, sums = score(runs, torch.tensor([6, 6]))
    assert loss.tolist() == pytest.approx([0.2, 0.1])
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(
        {
            **{"finished": 2, "exact": 2, "right": 12, "cells": 12, "state_change": 0.3},
            **{"exact@1": 1, "exact@2": 2, "exact@3": 2, "exact_any": 2, "exact_each": 1.0},
        }
    )


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
        ({"noise": -1.0}, r"noise=-1\.0 must be >= 0"),
        ({"speeds": 1, "differentiate": "pair"}, "differentiate='pair' needs a cell of two states"),
        ({"num_fast": 0}, "num_fast=0 must be"),
        ({"lam": 0.0}, r"lam=0\.0 must be in"),
        ({"shared": 1}, "shared=1 must be true or false"),
        ({"block": ATTENTION, "d_model": 6}, r"d_model=6 must be a multiple of 2 \* num_heads=4"),
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
