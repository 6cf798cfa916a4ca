"""Measures are run once, kept by scale and settings, and say first what they cost."""

import inspect
import json
import sys
from importlib import import_module
from types import ModuleType

import pytest

from scripts import reproduce, studies

MEASURES = [(name, part) for name in studies.names() for part in studies.load(name).get("measures", {})]
DEFINITION = """
title: A study
measures:
  one: {function: fake, cost: {paper: 70, smoke: 2}, settings: {seeds: [0, 1], size: 3}, smoke: {size: 1}}
  two: {function: fake, cost: {paper: 9, smoke: 1}, settings: {seeds: [0], size: 4}, smoke: {seeds: [5]}}
"""


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """Measure nothing: note the settings."""
    found = []

    def measure(*, seeds, size):
        found.append((seeds, size))
        return {"rows": [{"size": size}, {"size": float("nan")}], "claims": []}

    module = ModuleType("fake")
    module.measure = measure
    monkeypatch.setitem(sys.modules, "scripts.running.measures.fake", module)
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    (tmp_path / "results" / "study").mkdir(parents=True)
    (tmp_path / "results" / "study" / "study.yaml").write_text(DEFINITION)
    return found


def kept(folder) -> set[str]:
    return {path.stem for path in (folder / "results").rglob("*.json")}


def test_what_is_missing_is_run_and_its_cost_said_first(seen, tmp_path, capsys):
    reproduce.main(["study", "rows=two"])
    said = capsys.readouterr()
    assert said.err == "to run: 1. two: about 9 s of one core.\n"
    assert said.out == "python scripts/reproduce.py study rows=two\n"
    reproduce.main(["study"])
    assert seen == [([0], 4), ([0, 1], 3)]
    reproduce.main(["study"])
    assert len(seen) == 2 and "nothing is missing in study" in capsys.readouterr().err
    reproduce.main(["study", "again"])
    assert seen[2:] == [([0, 1], 3), ([0], 4)] and kept(tmp_path) == {"one", "two"}


def test_a_record_says_what_was_measured_and_how(seen, tmp_path):
    reproduce.main(["study", "rows=one", "scale=smoke"])
    text = (tmp_path / "results/study/one@smoke.json").read_text()
    record = json.loads(text)
    assert record["command"] == "python scripts/reproduce.py study rows=one scale=smoke"
    assert (record["study"], record["scale"], record["settings"]) == ("study", "smoke", {"seeds": [0, 1], "size": 1})
    assert {"commit", "dirty", "device", "versions", "started", "finished", "cpu_seconds"} <= set(record)
    assert record["rows"] == [{"size": 1}, {"size": None}]
    assert text.count("\n") == 2 + len(record) + 3, "a line per key, and per row"


def test_other_settings_have_records_of_their_own(seen, tmp_path, capsys):
    reproduce.main(["study", "rows=two", "size=7", "seeds=[2,3]"])
    assert seen == [([2, 3], 7)] and kept(tmp_path) == {"two@seeds=[2,3],size=7"}
    assert "cost unknown" in capsys.readouterr().err


def test_a_number_is_read_as_train_py_reads_it(seen):
    reproduce.main(["study", "rows=two", "size=1e-6"])
    assert seen == [([0], 1e-6)]


def test_list_prints_the_commands_alone(seen, tmp_path, capsys):
    reproduce.main(["study", "list", "scale=smoke"])
    assert capsys.readouterr().out.splitlines() == [
        f"python scripts/reproduce.py study rows={name} scale=smoke" for name in ("one", "two")
    ]
    assert not seen and not kept(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rows=three"], "study has no row three; it has one, two"),
        (["scale=gpu"], "scale=gpu: study, one has the scales paper, smoke"),
        (["depth=3"], "study, one has no setting depth; it has seeds, size"),
        (["seeds=3"], r"seeds=3: study, one takes a list, as \[1,2\] there"),
        (["size=[3]"], r"size=\[3\]: study, one takes one value there"),
        (["size=ten"], "size=ten: study, one takes numbers there"),
        (["seeds=[1,two]"], r"seeds=\[1,two\]: study, one takes numbers there"),
        (["jobs=2"], "one thing after the other"),
    ],
)
def test_mistakes_are_named_before_anything_runs(seen, arguments, message):
    with pytest.raises(SystemExit, match=message):
        reproduce.main(["study", *arguments])
    assert not seen


@pytest.mark.parametrize(("study", "name"), MEASURES)
def test_a_definition_gives_its_function_every_setting(study, name):
    part = studies.load(study)["measures"][name]
    function = import_module(f"scripts.running.measures.{part['function']}").measure
    assert set(part) == {"function", "cost", "settings", "smoke"}
    assert set(part["settings"]) == set(inspect.signature(function).parameters)
    assert set(part["smoke"]) <= set(part["settings"]) and set(part["cost"]) == {"paper", "smoke"}


@pytest.mark.parametrize(("study", "name"), MEASURES)
def test_a_record_kept_is_that_of_its_definition(study, name):
    path = studies.results() / study / f"{name}.json"
    part = studies.load(study)["measures"][name]
    record = json.loads(path.read_text())
    assert record["settings"] == part["settings"] and record["scale"] == "paper"
    assert record["cpu_seconds"] / 2 < part["cost"]["paper"] < 3 * record["cpu_seconds"], "the cost that is said first"
