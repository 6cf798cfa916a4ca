"""What is measured of a reasoner is that of plain loops over its cycle."""

import pytest
import torch

from models.official.load import load_reference
from phantom.diagnostics import spectral_radius
from phantom.engine.rebuild import begin_run
from scripts.running.measures import reasoner
from tests.plans import CONFIGS

SETTINGS = {"experiment": "reasoners/sudoku4_upg", "cycles": 3, "implicit_steps": 4}


@pytest.fixture(scope="module")
def found():
    return reasoner.measure(weights=["random", "reasoner_sudoku4"], supervision_steps=[2], **SETTINGS)


def test_the_numbers_are_those_of_plain_loops(found):
    run = begin_run(["experiment=reasoners/sudoku4_upg", "device=cpu"], CONFIGS, load_reference)
    inputs, labels = next(iter(run.source.train(epoch=0, start=0, shard=run.shard)))[0]
    model, row = run.model.double(), found["rows"][0]
    parameters = [p for name, p in model.named_parameters() if not name.startswith(("readout", "halting"))]

    def cycles(state, count, some=slice(None)):
        f = model.bind(model.embed(inputs[some]))
        for _ in range(count):
            state = f(state)
        return state

    def state_before(differentiated, some=slice(None)):
        """Two supervision steps have six cycles."""
        with torch.no_grad():
            return cycles(model.start_state(inputs[some]), 6 - differentiated, some)

    def loss(state):
        return model.supervision.cell_losses(model.readout(state[0][:, model.prefix_tokens :]), labels).sum()

    def gradient(differentiated):
        return torch.autograd.grad(loss(cycles(state_before(differentiated), differentiated)), parameters)

    def neumann():
        """0.5 (1 + B + B B) g by B = 0.5 J^T + 0.5, of the last cycle."""
        state = [part.requires_grad_() for part in state_before(1)]
        value = cycles(state, 1)
        leaves = [part.detach().requires_grad_() for part in value]  # one part of `value` depends on the other
        g = torch.autograd.grad(loss(leaves), leaves, materialize_grads=True)
        terms = [g]
        for _ in range(2):
            product = torch.autograd.grad(value, state, terms[-1], retain_graph=True)
            terms.append([0.5 * a + 0.5 * b for a, b in zip(product, terms[-1], strict=True)])
        return torch.autograd.grad(value, parameters, [0.5 * sum(parts) for parts in zip(*terms, strict=True)])

    exact = torch.cat([g.flatten() for g in gradient(3)])
    expected = {"last cycle (TRM, EqR)": gradient(1), "last two cycles": gradient(2), "NPG A(3, 0.5)": neumann()}
    for name, parts in expected.items():
        g = torch.cat([part.flatten() for part in parts])
        assert row["cosine"][name] == pytest.approx(float(torch.cosine_similarity(g, exact, dim=0)), rel=1e-5), name
        assert row["norm_ratio"][name] == pytest.approx(float(g.norm() / exact.norm()), rel=1e-5), name
    assert set(row["cosine"]) == {"last pair (HRM)", "implicit", *expected}
    # one cycle, at the state before the last one, of eight puzzles
    first = slice(8)
    before, after = (torch.cat(state_before(left, first), dim=1).flatten(1) for left in (1, 0))
    assert row["residual"] == pytest.approx(float(((after - before).norm(dim=1) / after.norm(dim=1)).mean()), rel=1e-5)
    f = model.bind(model.embed(inputs[first]).detach())
    radius = spectral_radius(f, state_before(1, first), num_steps=30).mean()
    assert row["spectral_radius"] == pytest.approx(float(radius), rel=1e-4)


def test_weights_are_drawn_or_those_that_ship(found):
    drawn, trained = found["rows"]
    assert (drawn["weights"], trained["weights"]) == ("random", "reasoner_sudoku4")
    assert drawn["spectral_radius"] > 1 > trained["spectral_radius"]


def test_the_solve_of_implicit_differentiation_has_its_steps():
    estimator, before, _ = reasoner.rules(5, 7)["implicit"]
    assert (estimator.solver.max_steps, before) == (7, 4)


def test_claims_read_the_rows():
    def row(weights, step, radius, implicit):
        cosine = {"last two cycles": 0.1, "implicit": implicit}
        return {"weights": weights, "supervision_step": step, "spectral_radius": radius, "cosine": cosine}

    rows = [row("random", 1, 3.0, 0.2), row("random", 2, 0.9, 0.2), row("a", 1, 2.0, -0.5), row("a", 2, 0.3, 0.995)]
    found = reasoner.claims(rows)
    assert [one["measured"] for one in found] == [0.9, 0.3, 0.995]
    assert [one["holds"] for one in found] == [False, True, True]
