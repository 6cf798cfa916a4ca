"""One, two, three and four ranks are one training: weights to rounding, metrics, and what evaluation counts."""

import pytest
import torch
import torch.distributed as dist

from phantom.engine.artifacts import checkpoint
from tests.engine import ranks_agree
from tests.engine.ranks_agree import CASES
from tests.phantom.processes import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
# after 20 steps in float64, relative to the largest entry of a weight
EQUAL = 1e-6
# of what a row says: of the weights that torch 2.11 draws, a reasoner's gradient norm differs by 3.4e-6 in one row
EQUAL_ROWS = 1e-5
# one case of every family, and every estimator that the paper compares
FEW = ("mdeq-upg", "mdeq-accumulated", "transformer-implicit", "ignn-npg", "reasoner-upg")
# not the evaluations of f, which are counted per batch, nor what depends on the clock
LEFT_OUT = ("time/", "items_per_second", "peak_memory", "num_evals", "num_vjps")


def numbers(outcome: dict, name: str) -> list[dict]:
    # a union of graphs is one problem, and another one on every rank
    left_out = (*LEFT_OUT, "residual", "adjoint_residual") if name.startswith("ignn") else LEFT_OUT
    rows = [{key: value for key, value in row.items() if not key.startswith(left_out)} for row in outcome["rows"]]
    return [{key: value for key, value in row.items() if isinstance(value, int | float)} for row in rows]


def assert_same_weights(found: dict, expected: dict) -> None:
    assert found["step"] == expected["step"] == ranks_agree.STEPS
    moved = 0
    for name, weight in expected["end"].items():
        difference = float((found["end"][name] - weight).abs().max())
        # a weight whose gradient is zero, as the bias in front of a norm, moves by rounding alone
        assert difference <= EQUAL * float(weight.abs().max()) + 1e-13, (name, difference)
        moved += bool((weight - expected["start"][name]).abs().max() > 1e-4)
    assert moved > len(expected["end"]) / 3, "a training that goes nowhere shows nothing"


def assert_same_training(found: dict, expected: dict, case: str) -> None:
    assert_same_weights(found, expected)
    assert all(torch.equal(found["start"][name], weight) for name, weight in expected["start"].items())
    for a, b in zip(numbers(found, case), numbers(expected, case), strict=True):
        assert a == pytest.approx(b, rel=EQUAL_ROWS, abs=1e-12, nan_ok=True)
    for split, values in expected["final"].items():
        for metric in values.keys() & {"accuracy", "micro_f1", "exact_match", "cell_accuracy"}:
            assert found["final"][split][metric] == values[metric], (split, metric)


def check(folder, world: int, names) -> None:
    found = run_ranks("tests.engine.ranks_agree", folder, "train", *names, world=world, seconds=600)
    for name in names:
        expected = ranks_agree.outcome(*CASES[name][:2], folder / f"{name} alone", *CASES[name][2:])
        for rank in found:
            assert_same_training(rank[name], expected, name)


def test_two_ranks_agree_with_one_process(tmp_path):
    check(tmp_path, 2, FEW)


@pytest.mark.slow  # three minutes
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_agree_with_one_process(tmp_path, world):
    check(tmp_path, world, CASES)


@pytest.mark.slow  # half a minute; test_redistribution.py has the rule
def test_two_ranks_go_on_with_what_one_process_carried(tmp_path):
    """Eleven steps of one process and nine of two are twenty of one: with other memories they would not be.

    The eleventh step is in the middle of an epoch of the text, and of the supervision of a puzzle.
    """
    names = ("transformer-upg", "reasoner-accumulated")
    for name in names:
        family, estimator, *items = CASES[name]
        stopped = ranks_agree.outcome(family, estimator, tmp_path / name, *items, stop=11)
        (last,) = (tmp_path / name).rglob("last.pt")
        carries = checkpoint.load(last)["ranks"][0]["carries"]
        assert stopped["step"] == checkpoint.load(last)["step"] == 11 and all(carry is not None for carry in carries)
    found = run_ranks("tests.engine.ranks_agree", tmp_path, "resume", *names, world=2, seconds=600)
    for name in names:
        family, estimator, *items = CASES[name]
        expected = ranks_agree.outcome(family, estimator, tmp_path / f"{name} alone", *items)
        for rank in found:
            assert_same_weights(rank[name], expected)
