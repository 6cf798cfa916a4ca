"""The summary of ten folds: five ways to choose the epoch, each by hand."""

import json
import statistics

import pytest

from scripts import folds, training

FACTS = {
    "label": "table4/cox2_implicit",
    "experiment": "table4/cox2_implicit",
    "scale": "paper",
    "kind": "graph_classification",
    "metric": "accuracy",
    "num_parameters": 37_634,
    "parameter_groups": {},
    "steps": 16,
    "overrides": ["data.fold=0", "experiment=table4/cox2_implicit"],
    "device": "cpu",
    "versions": {},
    "commit": None,
    "dirty": False,
    "started": "2026-01-01",
    "finished": "2026-01-02",
}


def run(fold: int, test: list[float], **more) -> dict:
    return {**FACTS, "seed": 42 + fold, "curves": {"test": test, **more}, "cpu_seconds": 60.0 + fold}


def test_the_protocols():
    runs = [
        run(0, [70.0, 90.0, 80.0, 60.0], valid=[1.0, 2.0, 3.0, 3.0]),
        run(1, [70.0, 70.0, 80.0, 90.0], valid=[5.0, 2.0, 3.0, 5.0]),
        run(2, [90.0, 60.0, 80.0, 50.0], valid=[0.0, 0.0, 0.0, 1.0]),
    ]
    summary = folds.summarise(runs, [0, 1, 2])
    values = {name: result["values"] for name, result in summary["protocols"].items()}
    assert values == {
        "best_epoch": [90.0, 90.0, 90.0],
        "last_epoch": [60.0, 90.0, 50.0],
        "best_mean_epoch": [80.0, 80.0, 80.0],
        # without fold 0, and without fold 1, epochs 0 and 2 tie at 80, without fold 2 epochs 1 and 2: the first counts
        "other_folds_epoch": [70.0, 70.0, 60.0],
        "validated_epoch": [80.0, 70.0, 50.0],
    }
    assert summary["protocols"]["last_epoch"]["std"] == pytest.approx(statistics.pstdev([60.0, 90.0, 50.0]))
    assert summary["protocols"]["last_epoch"]["mean"] == pytest.approx(200 / 3)
    assert [(item["fold"], item["seed"], item["cpu_seconds"]) for item in summary["folds"]] == [
        (0, 42, 60.0),
        (1, 43, 61.0),
        (2, 44, 62.0),
    ]
    assert summary["overrides"] == ["experiment=table4/cox2_implicit"]
    assert summary["cpu_seconds"] == {"mean": 61.0, "min": 60.0, "max": 62.0, "n": 3}


def test_folds_of_different_length_do_not_mix():
    with pytest.raises(ValueError, match=r"\[2, 3\] evaluations"):
        folds.summarise([run(0, [1.0, 2.0]), run(1, [1.0, 2.0, 3.0])], [0, 1])


def test_curves_are_read_by_split(tmp_path):
    rows = [
        {"kind": "train", "epoch": 0, "accuracy": 1.0},
        {"kind": "eval", "split": "valid", "epoch": 0, "accuracy": 2.0},
        {"kind": "eval", "split": "test", "epoch": 0, "accuracy": 3.0},
        {"kind": "eval", "split": "test", "epoch": 1, "accuracy": 4.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert training.curve(tmp_path, "valid", "accuracy") == ([0], [2.0])
    assert training.curve(tmp_path, "test", "accuracy") == ([0, 1], [3.0, 4.0])
    assert training.curve(tmp_path, "train", "accuracy") == ([], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=chains/implicit"], "no folds"),
        (["experiment=table4/cox2_implicit", "data.fold=3"], "only=3"),
        (["experiment=table4/cox2_implicit", "only=10"], "from 0 to 9"),
        (["experiment=table4/nothing"], "error"),
    ],
)
def test_impossible_commands(arguments, message):
    with pytest.raises(SystemExit, match=message):
        folds.main(arguments)
