"""The recursive reasoner: supervision steps with a carry, halting, and evaluation over steps and starts."""

import pytest
import torch

from models.reasoner.evaluation import Run, score
from models.reasoner.supervision import Supervision, log_stablemax, refill
from phantom import DEQ, UPG, Rollout
from tests.models.reasoners import batch, flat, make

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


def test_starts_that_cannot_differ_are_refused():
    supervision = Supervision(steps=2, halting="fixed", restarts=3)
    with pytest.raises(ValueError, match=r"supervision.restarts=3 evaluates one answer as many times.*noise > 0"):
        make(supervision=supervision)
    make(supervision=supervision, noise=0.1)


def test_the_evaluations_of_all_starts_are_counted():
    inputs, labels = batch(3)
    counts = []
    for restarts in (1, 3):
        supervision = Supervision(steps=2, halting="fixed", restarts=restarts)
        model = make(supervision=supervision, deq=DEQ(solver=Rollout(max_steps=2), grad=UPG(k=1, lam=1.0)), **RANDOM)
        calls: list[int] = []
        model.cell.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad():
            _, (solution,), _ = model.eval()(inputs, labels)
        assert solution.stats.num_evals == len(calls)
        counts.append(len(calls))
    assert counts[1] == 3 * counts[0]


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
