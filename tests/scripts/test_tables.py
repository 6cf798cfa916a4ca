"""A table prints what the records say: mean, deviation, count and budget; and -- where there is no record."""

import pytest

from phantom.engine.artifacts import records
from scripts import report, studies
from scripts.reporting import tables

HEAD = {"title": "T", "metric": "accuracy", "split": "test", "std": "sample"}


def record(best: float, last: float, **changes) -> dict:
    return {
        "best": {"test": {"accuracy": best}},
        "final": {"test": {"accuracy": last}},
        "steps": 100,
        "num_parameters": 1234567,
        "times": {"step": {"median": 0.36}},
        "device": "card",
        "precision": "fp32",
        "gradient_precision": None,
        "peak_memory": 2_500_000,
        "commit": "abcdef0123",
        "dirty": False,
    } | changes


@pytest.fixture
def keep(tmp_path, monkeypatch):
    """Return a function that commits records of an experiment, in a repository of its own."""
    monkeypatch.setattr(studies, "ROOT", tmp_path)

    def write(name: str, *found: dict) -> None:
        for seed, content in enumerate(found):
            records.write_json(tmp_path / "results" / name / f"seed{seed}.json", content)

    return write


def table(*rows: dict, **changes) -> list[dict[str, str]]:
    """Return the rows of a rendered table by column."""
    rows = [{"name": row["experiment"], "paper": "90.0", **row} for row in rows]
    lines = [line for line in tables.render({**HEAD, **changes, "rows": rows}).splitlines() if line.startswith("|")]
    cells = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in cells}) == 1 and set(cells[1]) == {"---"}
    return [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]


def test_mean_deviation_and_count(keep):
    keep("t/a", record(80, 70), record(84, 72), record(88, 74))
    (row,) = table({"experiment": "t/a"})
    assert row == {
        "row": "t/a",
        "paper": "90.0",
        "best": "84.00 ± 4.00 (3)",
        "difference": "-6.00",
        "in spread": "--",
        "last": "72.00 ± 2.00 (3)",
        "budget": "paper, 100 steps",
        "parameters": "1,234,567",
        "step ms": "360.0 on card",
        "peak MB": "2",
        "commit": "abcdef01",
    }
    (row,) = table({"experiment": "t/a"}, std="population")
    assert row["best"] == "84.00 ± 3.27 (3)"


def test_what_was_not_finite_is_no_mean(keep):
    keep("t/a", record(80, float("nan")), record(84, 70))
    keep("t/b", record(float("inf"), float("inf")))
    one, two = table({"experiment": "t/a"}, {"experiment": "t/b", "paper": "90.0 ± 1.0"})
    assert (one["best"], one["last"]) == ("82.00 ± 2.83 (2)", "not finite (1 of 2)")
    assert (two["best"], two["difference"], two["in spread"]) == ("not finite (1 of 1)", "--", "--")


def test_steps_timed_on_two_devices_are_not_one_number(keep):
    times = [{"times": {"step": {"median": seconds}}} for seconds in (0.1, 0.3, 9.0)]
    keep("t/a", record(80, 70, **times[0]), record(80, 70, **times[1]), record(80, 70, device="other", **times[2]))
    (row,) = table({"experiment": "t/a"})
    assert row["step ms"] == "200.0 on card; 9000.0 on other"
    (row,) = table({"experiment": "t/a", "group": "g", "speed": "--"})
    assert (row["training h"], row["speed"]) == ("--", "--")


def test_step_times_have_their_spread_and_number(keep):
    """One seed prints its own percentiles, several the outermost ones of all."""
    first = {"median": 0.3, "p10": 0.2, "p90": 0.5, "n": 5}
    keep("t/a", record(80, 70, times={"step": first}))
    assert table({"experiment": "t/a"})[0]["step ms"] == "300.0 [200.0, 500.0] (5 steps) on card"
    second = {"median": 0.1, "p10": 0.05, "p90": 0.4, "n": 7}
    keep("t/b", *(record(80, 70, times={"step": step}) for step in (first, second)))
    assert table({"experiment": "t/b"})[0]["step ms"] == "200.0 [50.0, 500.0] (12 steps) on card"


def test_a_missing_run_has_no_number(keep):
    keep("t/b", record(80, 70))
    absent, single = table({"experiment": "t/a"}, {"experiment": "t/b"})
    assert {value for key, value in absent.items() if key not in ("row", "paper")} == {"--"}
    assert single["best"] == "80.00 (1)"


def test_a_smaller_budget_is_labelled_in_its_cell_and_yields_to_a_larger_one(keep):
    keep("t/a@smoke", record(20, 10, steps=5))
    (row,) = table({"experiment": "t/a"})
    assert (row["best"], row["last"], row["budget"]) == ("20.00 (1) [smoke]", "10.00 (1) [smoke]", "smoke, 5 steps")
    keep("t/a@gpu", record(50, 40))
    assert table({"experiment": "t/a"})[0]["best"] == "50.00 (1) [gpu]"
    keep("t/a", record(80, 70))
    assert table({"experiment": "t/a"})[0]["best"] == "80.00 (1)"
    keep("t/a@k=3", record(99, 99))
    assert table({"experiment": "t/a"})[0]["best"] == "80.00 (1)", "another experiment"


def test_what_the_paper_does_not_have_ran_in_full(keep):
    keep("t/a", record(80, 70, precision="tf32", dirty=True, times={}))
    (row,) = table({"experiment": "t/a", "paper": "--"})
    assert (row["budget"], row["commit"], row["step ms"]) == ("full, 100 steps, tf32", "abcdef01*", "--")
    keep("t/b", record(80, 70, gradient_precision="bf16"))
    assert table({"experiment": "t/b"})[0]["budget"] == "paper, 100 steps, fp32 (gradient part bf16)"


def test_the_difference_is_that_to_the_paper_at_its_own_budget(keep):
    keep("t/a", record(84.7, 0), record(84.9, 0))
    keep("t/b", record(85.21, 0))
    keep("t/c@gpu", record(85.0, 0))
    rows = table(
        *({"experiment": name, "paper": "85.0 ± 0.2"} for name in ("t/a", "t/b", "t/c", "t/d")),
        {"experiment": "t/b", "paper": "86"},
        {"experiment": "t/b", "paper": "--"},
    )
    assert [(row["difference"], row["in spread"]) for row in rows] == [
        *(("-0.20", "yes"), ("+0.21", "no"), ("--", "--"), ("--", "--")),
        *(("-0.79", "--"), ("--", "--")),
    ]


def test_a_smaller_budget_names_the_data_it_was_trained_on(keep):
    keep("t/a@cpu", record(50, 40, choices={"data": "cifar10_small"}))
    keep("t/b@smoke", record(20, 10, choices={"data": "images_synthetic"}))
    assert [row["best"] for row in table({"experiment": "t/a"}, {"experiment": "t/b"})] == [
        "50.00 (1) [cpu, cifar10_small]",
        "20.00 (1) [smoke, images_synthetic]",
    ]


def test_a_table_with_a_budget_of_its_own_shows_it_beside_the_larger_one(keep):
    keep("t/a", record(80, 70))
    keep("t/a@cpu", record(50, 40))
    keep("t/b@cpu", record(45, 40))
    keep("t/a@gpu", record(60, 40))
    rows = [{"experiment": "t/a"}, {"experiment": "t/b"}, {"experiment": "t/c"}]
    best = [(row["row"], row["best"], row["difference"]) for row in table(*rows, scales={"cpu": ["data=small"]})]
    assert best == [
        *(("t/a", "80.00 (1)", "-10.00"), ("t/a", "50.00 (1) [cpu]", "--")),
        *(("t/b", "45.00 (1) [cpu]", "--"), ("t/c", "--", "--")),
    ]
    assert len(table(*rows)) == 3


def grouped(*names: str) -> list[dict]:
    return [{"experiment": name, "group": name[2], "speed": "1.4x"} for name in names]


def test_training_time_and_speed_within_a_group(keep):
    keep("t/a1", record(1, 1, steps=10_000))
    keep("t/a2", record(1, 1, steps=10_000, times={"step": {"median": 0.2}}), record(1, 1, steps=10_000))
    keep("t/b1", record(1, 1, times={"step": {"median": 9.0}}))
    rows = table(*grouped("t/a1", "t/a2", "t/b1"))
    assert [row["training h"] for row in rows] == ["1.00", "0.78", "0.25"]
    # the median of 2,000 and 3,600 seconds against 3,600
    assert [row["speed"] for row in rows] == ["1.0x", "1.3x", "1.0x"]
    assert {row["paper's speed"] for row in rows} == {"1.4x"}


@pytest.mark.parametrize(
    "other", [{"device": "another card"}, {"precision": "bf16"}, {"gradient_precision": "bf16"}, {"times": {}}]
)
def test_no_speed_between_runs_that_differ_in_more_than_their_method(keep, other):
    keep("t/a1", record(1, 1))
    keep("t/a2", record(1, 1, **other))
    keep("t/a3@smoke", record(1, 1))
    rows = table(*grouped("t/a1", "t/a2", "t/a3", "t/a4"))
    assert [row["speed"] for row in rows] == ["1.0x", "--", "--", "--"]


def test_the_speed_of_timed_steps_names_its_card(keep, tmp_path):
    def variant(label: str, seconds: float) -> dict:
        return {"label": label, "seconds": {"total": {"median": seconds}}}

    content = {"about": {"machine": "card"}, "rows": [variant("implicit", 0.3), variant("upg", 0.2)]}
    records.write_json(tmp_path / "results/benchmark/gpu/m.json", content)
    implicit, upg, untimed = grouped("t/a1", "t/a2", "t/a3")
    rows = table(implicit | {"timed": ["m", "implicit"]}, upg | {"timed": ["m", "upg"]}, untimed)
    assert [row["by timed steps"] for row in rows] == ["1.0x on card", "1.5x on card", "--"]
    rows = table(implicit | {"timed": ["n", "implicit"]}, upg | {"timed": ["m", "upg"]})
    assert [row["by timed steps"] for row in rows] == ["--", "--"], "another record, and one that is not there"


def test_unknown_tables_are_refused():
    with pytest.raises(SystemExit, match=r"'table9' is neither one of html, .*table1,"):
        report.main(["table9"])
