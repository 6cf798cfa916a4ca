"""The table of ten folds prints every protocol of the record, and nothing for what was not run."""

import pytest

from phantom.engine.artifacts import records
from scripts import studies
from scripts.reporting import tables
from scripts.running import folds
from tests.scripts.test_folds import run

TABLE = {
    "title": "Folds",
    "protocols": {"best_epoch": "best", "last_epoch": "last", "validated_epoch": "validated"},
    "rows": [
        {"name": "COX2, Implicit", "experiment": "table4/cox2_implicit", "paper": "84.1 ± 2.9"},
        {"name": "COX2, UPG", "experiment": "table4/cox2_upg", "paper": "83.9 ± 3.0"},
    ],
}


@pytest.mark.parametrize("dirty", [False, True])
def test_a_row_is_the_record(tmp_path, monkeypatch, dirty):
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    runs = [run(0, [70.0, 90.0, 80.0]), run(1, [60.0, 70.0, 74.0])]
    for commit, item in zip(("aaaaaaaaaa", "bbbbbbbbbb"), runs, strict=True):
        item |= {"commit": commit, "dirty": dirty}
    records.write_json(tmp_path / "results" / "table4" / "cox2_implicit.json", folds.summarise(runs, [0, 1]))
    first, second = tables.render(TABLE).splitlines()[-2:]
    # best epochs 90 and 74, last ones 80 and 74: population deviations 8 and 3
    mark = "*" if dirty else ""
    assert first == (
        "| COX2, Implicit | 84.1 ± 2.9 | 82.00 ± 8.00 | -2.10 | yes | 77.00 ± 3.00 | -- | 2 | 37,634 | 60 (60 to 61) "
        f"| aaaaaaaa, bbbbbbbb{mark} |"
    )
    assert second == "| COX2, UPG | 83.9 ± 3.0 |" + " -- |" * 9


def test_a_smaller_budget_is_not_set_beside_the_paper():
    record = {"scale": "cpu", "protocols": {"best_epoch": {"mean": 84.0, "std": 1.0}}, "cpu_seconds": None}
    record |= {"folds": [1], "num_parameters": 3, "commit": "a", "dirty": False}
    assert tables._folds_cells(record, ["best_epoch"], "84.1 ± 2.9")[:3] == ["84.00 ± 1.00 [cpu]", "--", "--"]
