"""A run in a process of its own: its record gains the CPU seconds once, and a failure shows what the run said."""

import json

import pytest

from phantom.engine.errors import ConfigError
from scripts import studies
from scripts.running import process
from scripts.running.stopping import Stop

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
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text(FAKE)
    folder = tmp_path / "run"
    record = process.train([f"folder={folder}"], folder)
    assert record["arguments"] == [f"folder={folder}", "progress=false"]
    assert 0.3 <= record["cpu_seconds"] < 5
    assert json.loads((folder / "record.json").read_text()) == record
    assert process.train([f"folder={folder}"], folder) == record, "the second process only found the first one's record"


def test_a_failure_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text(FAKE)
    with pytest.raises(RuntimeError, match=r"fail=true progress=false failed:\nout of luck"):
        process.train([f"folder={tmp_path}", "fail=true"], tmp_path / "run")


def test_a_run_alone_has_the_terminal_and_all_threads(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    tell = 'import os; print("threads", os.environ.get("OMP_NUM_THREADS"), flush=True)'
    (tmp_path / "train.py").write_text(tell + FAKE)
    process.train([f"folder={tmp_path / 'a'}"], tmp_path / "a", alone=True)
    assert "threads None" in capfd.readouterr().out
    with pytest.raises(RuntimeError, match=r"fail=true failed: see above; start again to resume there"):
        process.train([f"folder={tmp_path}", "fail=true"], tmp_path / "b", alone=True)
    assert "out of luck" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match=r"threads 1\nout of luck"):
        process.train([f"folder={tmp_path}", "fail=true"], tmp_path / "b")
    assert capfd.readouterr() == ("", "")


def test_where_a_run_lies_is_planned():
    with pytest.raises(ConfigError, match=r"did you mean"):
        process.plan(["experiment=chains/implicit", "data.lenght=20"])
    items = ["experiment=chains/implicit", "data.length=20"]
    made = process.plan(items)
    assert (made.config["data"]["length"], made.label) == (20, "chains/implicit")
    folder = process.folder_of(made, items, made.config["seed"])
    assert folder == studies.ROOT / "runs" / "chains/implicit" / "data.length=20" / "seed42"


def work(tmp_path, monkeypatch, *, failing: str = "", **options) -> tuple[process.Work, list[str], list[str]]:
    """Return work of three runs a, b, c that only pretend to train, and the lists of starts and records."""
    started, kept = [], []

    def train(overrides, folder, *, alone, gpus=None, stop=None):
        started.append(f"{folder.name} {alone}")
        if folder.name == failing:
            raise RuntimeError(f"{folder.name} failed")
        return {"name": folder.name}

    monkeypatch.setattr(process, "train", train)
    runs = [process.Run(name, [f"x={name}"], tmp_path / name, tmp_path / "kept") for name in "abc"]
    return process.Work(runs, lambda run, record: kept.append(run.name + record["name"]), **options), started, kept


def test_one_at_a_time_unless_they_are_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(process, "cores", lambda: 2)
    done, started, kept = work(tmp_path, monkeypatch)
    process.execute(done, None, Stop())
    assert (started, kept) == (["a True", "b True", "c True"], ["aa", "bb", "cc"])
    assert capsys.readouterr().out.splitlines() == [f"python train.py x={name}" for name in "abc"]
    for jobs, options in ((None, {"small": True}), (2, {}), (1, {"small": True})):
        done, started, kept = work(tmp_path, monkeypatch, **options)
        process.execute(done, jobs, Stop())
        assert sorted(started) == ["a False", "b False", "c False"] and sorted(kept) == ["aa", "bb", "cc"]


def test_the_first_failure_ends_it(tmp_path, monkeypatch):
    done, started, kept = work(tmp_path, monkeypatch, failing="b")
    with pytest.raises(RuntimeError, match="b failed"):
        process.execute(done, None, Stop())
    assert kept == ["aa"] and started == ["a True", "b True"]
