"""The summary of ten folds: five ways to choose the epoch, each by hand."""

import json
import statistics

import pytest

from phantom.engine.errors import ConfigError
from scripts import reproduce, studies
from scripts.running import folds, process
from scripts.running.seeds import Row
from scripts.running.stopping import Stop

ROWS = [path for path in sorted((studies.ROOT / "configs/experiment/table4").glob("*.yaml")) if "ppi" not in path.stem]
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
        {"kind": "train", "step": 1, "epoch": 0, "accuracy": 1.0},
        {"kind": "eval", "split": "valid", "step": 1, "epoch": 0, "accuracy": 2.0},
        {"kind": "eval", "split": "test", "step": 1, "epoch": 0, "accuracy": 3.0},
        {"kind": "eval", "split": "test", "step": 2, "epoch": 1, "accuracy": 4.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert process.curve(tmp_path, "valid", "accuracy") == ([0], [2.0])
    assert process.curve(tmp_path, "test", "accuracy") == ([0, 1], [3.0, 4.0])
    assert process.curve(tmp_path, "train", "accuracy") == ([], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chains", "folds=3"], "no folds"),
        (["table4", "rows=cox2_implicit", "data.fold=3"], "folds=3"),
        (["table4", "rows=cox2_implicit", "seed=3"], "seed is set"),
        (["table4", "rows=cox2_implicit", "repeats=3"], "one run per fold"),
        (["table4", "rows=cox2_implicit", "folds=10"], "no fold 10; it has 0, .*, 9"),
        (["table4", "rows=ppi_implicit", "folds=3"], "none of the rows table4/ppi_implicit has folds"),
        (["table4", "rows=cox2_implicit", "data.validation=0.1", "eval_splits=[valid]"], r"=\['valid'\] must have it"),
        (["table4", "rows=cox2_implicit", "target=85"], "target=85.* must be null"),
        (["table4", "rows=nothing"], "error: table4 has no row nothing"),
    ],
)
def test_impossible_commands(arguments, message):
    with pytest.raises(SystemExit, match=message):
        reproduce.main(arguments)


def test_an_experiment_without_folds_has_none():
    with pytest.raises(ConfigError, match="chains/implicit has no folds"):
        folds.work(Row("chains/implicit"), [])


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Train nothing: leave the log and the record that a fold would have left, and note the command lines."""
    lines = []

    def train(overrides, folder, *, alone, gpus=None, stop=None):
        assert not alone, "a thread each"
        lines.append(overrides)
        fold = int(folder.name.removeprefix("seed")) - 42
        folder.mkdir(parents=True)
        rows = [{"kind": "eval", "step": i, "epoch": i, "split": "test", "accuracy": 50.0 + fold + i} for i in range(2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        scores = {"test": {"accuracy": 51.0 + fold}}
        return {**FACTS, "seed": 42 + fold, "final": scores, "best": scores, "overrides": overrides}

    monkeypatch.setattr(studies, "ROOT", tmp_path)
    monkeypatch.setattr(process, "train", train)
    return lines


def test_ten_folds_leave_one_record(trained, tmp_path):
    process.execute(folds.work(Row("table4/cox2_implicit"), ["data.root=/data"]), 3, Stop())
    record = json.loads((tmp_path / "results/table4/cox2_implicit.json").read_text())
    assert [item["fold"] for item in record["folds"]] == list(range(10))
    assert record["protocols"]["last_epoch"]["values"] == [51.0 + fold for fold in range(10)]
    assert record["wall_seconds"] >= 0
    assert sorted(trained, key=lambda line: int(line[-1][5:])) == [
        ["experiment=table4/cox2_implicit", "data.root=/data", f"data.fold={fold}", f"seed={42 + fold}"]
        for fold in range(10)
    ]


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_the_command_of_one_fold_trains_as_the_fold_of_the_table(path):
    (line,) = [line for line in path.read_text().splitlines() if "data.fold=" in line]
    items = line.partition("train.py")[2].partition("#")[0].split()
    fold = int(items[1].removeprefix("data.fold="))
    assert folds.work(Row(f"table4/{path.stem}"), [], [fold]).runs[0].overrides == items


def test_other_overrides_are_in_the_name_and_some_folds_leave_none(trained, tmp_path):
    process.execute(folds.work(Row("table4/cox2_implicit"), ["epochs=2"], [0, 3]), None, Stop())
    assert len(trained) == 2 and not (tmp_path / "results").exists()
    process.execute(folds.work(Row("table4/cox2_implicit"), ["epochs=2", "scale=smoke"]), None, Stop())
    kept = [path.name for path in (tmp_path / "results" / "table4").iterdir()]
    assert kept == ["cox2_implicit@smoke@epochs=2.json"]
