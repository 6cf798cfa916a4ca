"""The cosines of a reasoner's rules are those of plain loops over its cycle."""

import pytest
import torch

from models.official.load import load_reference
from phantom.engine.rebuild import begin_run
from scripts.running.measures import reasoner
from tests.plans import CONFIGS

SETTINGS = {"experiment": "reasoners/sudoku4_upg", "cycles": 3, "implicit_steps": 4}


def test_cosines_are_those_of_plain_loops():
    run = begin_run(["experiment=reasoners/sudoku4_upg", "data.batch_size=4"], CONFIGS, load_reference)
    inputs, labels = next(iter(run.source.train(epoch=0, start=0, shard=run.shard)))[0]
    model = run.model
    (found,) = reasoner.compare(model, inputs, labels, [2], reasoner.rules(3, 4), 3)

    model = model.double()
    parameters = [p for name, p in model.named_parameters() if not name.startswith(("readout", "halting"))]

    def cycles(state, count):
        f = model.bind(model.embed(inputs))
        for _ in range(count):
            state = f(state)
        return state

    def gradient(differentiated):
        with torch.no_grad():
            state = cycles(model.start_state(inputs), 6 - differentiated)
        slow, _ = cycles(state, differentiated)
        losses = model.supervision.cell_losses(model.readout(slow[:, model.prefix_tokens :]), labels)
        return torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), parameters)])

    exact = gradient(3)
    for name, differentiated in (("last cycle (TRM, EqR)", 1), ("last two cycles", 2)):
        g = gradient(differentiated)
        assert found["cosine"][name] == pytest.approx(float(torch.cosine_similarity(g, exact, dim=0)), rel=1e-5)
        assert found["norm_ratio"][name] == pytest.approx(float(g.norm() / exact.norm()), rel=1e-5)
    assert set(found["cosine"]) == set(reasoner.rules(3, 4)) - {reasoner.EXACT}


def test_weights_are_drawn_or_those_that_ship():
    found = reasoner.measure(weights=["random", "reasoner_sudoku4"], supervision_steps=[1], **SETTINGS)
    drawn, trained = found["rows"]
    assert (drawn["weights"], trained["weights"]) == ("random", "reasoner_sudoku4")
    assert drawn["spectral_radius"] > 1 > trained["spectral_radius"]


def test_claims_read_the_rows():
    def row(weights, step, radius, implicit):
        cosine = {"last two cycles": 0.1, "implicit": implicit}
        return {"weights": weights, "supervision_step": step, "spectral_radius": radius, "cosine": cosine}

    rows = [row("random", 1, 3.0, 0.2), row("random", 2, 0.9, 0.2), row("a", 1, 2.0, -0.5), row("a", 2, 0.3, 0.995)]
    found = reasoner.claims(rows)
    assert [one["measured"] for one in found] == [0.9, 0.3, 0.995]
    assert [one["holds"] for one in found] == [False, True, True]
