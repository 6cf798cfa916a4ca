"""A run in a process of its own: its record gains the CPU seconds once, and a failure shows what the run said."""

import json

import pytest

from scripts import training

FAKE = """
import json, sys, time
from pathlib import Path

folder = Path(sys.argv[1].removeprefix("folder="))
if sys.argv[2:3] == ["fail=true"]:
    sys.exit("out of luck")
if not (folder / "record.json").exists():
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps({"arguments": sys.argv[1:]}))
"""


def test_cpu_seconds_are_those_of_the_process_that_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text(FAKE)
    folder = tmp_path / "run"
    record = training.train([f"folder={folder}"], folder)
    assert record["arguments"] == [f"folder={folder}", "progress=false"]
    assert 0.3 <= record["cpu_seconds"] < 5
    assert json.loads((folder / "record.json").read_text()) == record
    assert training.train([f"folder={folder}"], folder) == record, (
        "the second process only found the first one's record"
    )


def test_a_failure_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text(FAKE)
    with pytest.raises(RuntimeError, match=r"fail=true progress=false failed:\nout of luck"):
        training.train([f"folder={tmp_path}", "fail=true"], tmp_path / "run")


def test_mistakes_end_the_script():
    with pytest.raises(SystemExit, match=r"error: .*did you mean"):
        training.plan(["experiment=chains/implicit", "data.lenght=20"])
    config, label, folder = training.plan(["experiment=chains/implicit", "data.length=20"])
    assert (config["data"]["length"], label) == (20, "chains/implicit")
    assert folder == training.ROOT / "runs" / "chains/implicit" / "data.length=20" / "seed42"
