"""Table 2's counts are those of the methods' definitions, and its lines those of least squares."""

import pytest

from scripts.running.measures import complexity

SMALL = [
    *("model=mdeq_tiny", "batch=1", "size=8", "model.channels=[8,8]", "model.head_channels=[2,2]"),
    "model.final_channels=8",
]


def test_a_line():
    assert complexity.line([1, 2, 4], [5.0, 7.0, 11.0]) == pytest.approx((3.0, 2.0, 1.0))
    intercept, slope, r2 = complexity.line([0, 1, 2, 3], [0.0, 1.0, 0.0, 1.0])
    assert (intercept, slope, r2) == pytest.approx((0.2, 0.2, 0.2))
    assert complexity.line([1, 2], [3.0, 3.0]) == pytest.approx((3.0, 0.0, 1.0))


def test_every_method_does_the_work_of_its_definition():
    found = complexity.measure(
        model=SMALL,
        steps=[5, 10],
        ks=[1, 5],
        repeats=1,
        solver_steps=3,
        adjoint_steps=3,
        pretraining_steps=10,
        protocol_k=5,
    )
    work = {(row["method"], row["steps"]): (row["evals"], row["vjps"]) for row in found["rows"]}
    for steps in (5, 10):
        assert work["Implicit, Broyden", steps] == work["Implicit, plain iteration", steps] == (1, steps)
        assert work["BPTT", steps] == (steps, 0)
    for k in (1, 5):
        assert work["UPG", k] == (k, 0) and work["NPG", k] == (1, k - 1)
    assert all(len(row["ms"]) == 1 and row["ms"][0] > 0 for row in found["rows"])
    peaks = found["protocols"]
    assert peaks["implicit_protocol"] == max(peaks["pretraining"], peaks["implicit"])
    # ten unrolled steps keep five more evaluations of f than five do
    size = {(row["method"], row["steps"]): row["bytes"] for row in found["rows"]}
    assert size["BPTT", 10] > size["UPG", 5] > size["NPG", 5]
