"""A run in a process of its own: its record gains the CPU seconds once, and a failure shows what the run said."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from phantom.engine.errors import ConfigError
from scripts import logged, studies
from scripts.running import process
from scripts.running.stopping import Stop, Stopped

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
    for more in ("runs=~/mine", "recipe=none"):
        made = process.plan([*items, more])
        assert process.folder_of(made, [*items, more], made.config["seed"]) == made.folder


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


def test_on_gpus_one_run_takes_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "cores", lambda: 8)
    done, _, _ = work(tmp_path, monkeypatch, small=True)
    assert process.at_a_time(done, None) == 3
    assert process.at_a_time(replace(done, runs=[run._replace(gpus=8) for run in done.runs]), None) == 1


def test_a_record_that_cannot_be_kept_ends_it(tmp_path, monkeypatch):
    def keep(run, record):
        raise ValueError(f"{run.name} has no test split")

    started = []

    def train(overrides, folder, **_):
        started.append(folder)
        time.sleep(0.1)  # all 50 would be over before the thread that keeps hears of the first one
        return {}

    done, _, _ = work(tmp_path, monkeypatch)
    monkeypatch.setattr(process, "train", train)
    with pytest.raises(ValueError, match="has no test split"):
        process.execute(replace(done, runs=[done.runs[0]] * 50, keep=keep), 2, Stop())
    assert len(started) < 50


def test_the_first_failure_ends_it(tmp_path, monkeypatch):
    done, started, kept = work(tmp_path, monkeypatch, failing="b")
    with pytest.raises(RuntimeError, match="b failed"):
        process.execute(done, None, Stop())
    assert kept == ["aa"] and started == ["a True", "b True"]


SLOW = """
import json, os, signal, sys, time
from pathlib import Path

folder = Path(sys.argv[1].removeprefix("x="))
folder.mkdir(exist_ok=True)
if not (folder / "last.pt").exists():
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "last.pt").touch(), sys.exit(143)))
    (folder / "begun").touch()
    time.sleep(60)
(folder / "record.json").write_text(json.dumps({"resumed": True}))
"""


def test_what_a_run_logged(tmp_path):
    rows = [
        {"kind": "train", "step": 1, "epoch": 0, "loss": 0.5},
        {"kind": "monitor", "step": 1, "cosine": 0.9},
        *({"kind": "eval", "split": split, "step": 2, "epoch": 1, "accuracy": 60.0} for split in ("valid", "test")),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert logged.read(tmp_path / "metrics.jsonl")[0] == rows
    assert process.curve(tmp_path, "test", "accuracy") == ([1], [60.0])
    assert process.curve(tmp_path, "train", "accuracy") == ([], [])
    assert process.monitored(tmp_path) == [{"step": 1, "cosine": 0.9}]


@pytest.mark.parametrize("jobs", [1, 2])
def test_at_the_deadline_runs_are_told_to_end_and_the_next_time_they_resume(tmp_path, monkeypatch, jobs):
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text(SLOW)
    kept = []
    runs = [process.Run(name, [f"x={tmp_path / name}"], tmp_path / name, tmp_path / "kept") for name in "abc"]
    made = process.Work(runs, lambda run, record: kept.append(run.name), small=True)
    stop = Stop()

    def tell():
        while not all((tmp_path / name / "begun").exists() for name in "abc"[:jobs]):
            time.sleep(0.01)
        stop.now()

    threading.Thread(target=tell).start()
    left = process.execute(made, jobs, stop)
    assert [run.name for run in left] == ["a", "b", "c"] and not kept
    assert {path.parent.name for path in tmp_path.glob("*/last.pt")} == set("abc"[:jobs])
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    again = process.Work(runs[:jobs], lambda run, record: kept.append(record["resumed"]), small=True)
    assert process.execute(again, jobs, Stop()) == [] and kept == [True] * jobs


def test_a_run_that_is_told_to_end_when_it_has_finished_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    end = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    (tmp_path / "train.py").write_text(f"{FAKE}\n{end}\n")
    stop = Stop()
    stop.now()
    # the process that is told at once leaves no record, and one that had one by then is done
    with pytest.raises(Stopped):
        process.train([f"folder={tmp_path / 'none' / 'none'}"], tmp_path / "none" / "none", stop=stop)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_text("{}")
    assert process.train([f"folder={tmp_path / 'run'}"], tmp_path / "run", stop=stop) == {}


def test_a_run_that_was_to_begin_anew_and_did_not_leaves_no_record_of_before(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    (tmp_path / "record.json").write_text("{}")
    stop = Stop()
    stop.now()
    with pytest.raises(Stopped):
        process.train(["resume=never"], tmp_path, stop=stop)
    write = f"import pathlib; pathlib.Path({str(tmp_path / 'record.json')!r}).write_text('{{\"new\": 1}}')"
    (tmp_path / "train.py").write_text(write)
    assert process.train(["resume=never"], tmp_path).keys() == {"new", "cpu_seconds"}


def test_a_second_signal_is_not_sent_to_a_run(tmp_path):
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: print(1, flush=True)); print(0, flush=True)"
    line = [sys.executable, "-c", f"{code}; time.sleep(1); time.sleep(1)"]
    child = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    stop = Stop()
    with stop.watching(child):
        assert child.stdout.readline() == "0\n"
        stop.now()
        assert child.stdout.readline() == "1\n"
        stop.now()
        assert child.communicate(timeout=30)[0] == ""


def test_after_so_many_seconds_nothing_begins(tmp_path, monkeypatch):
    done, started, kept = work(tmp_path, monkeypatch)
    stop = Stop(0.01)
    while not stop.told:
        time.sleep(0.01)
    assert [run.name for run in process.execute(done, None, stop)] == ["a", "b", "c"] and not started and not kept


def test_after_the_deadline_no_finished_run_is_looked_for(tmp_path, monkeypatch):
    stop, looked = Stop(), []
    done, _, kept = work(tmp_path, monkeypatch, find=lambda run: (looked.append(run.name), stop.now())[1])
    assert process.execute(done, 1, stop) == [*done.runs] and not kept
    assert looked == [done.runs[0].name], "those after it would have taken their composition, too"


def test_sigterm_stops_as_the_deadline_does():
    stop = Stop()
    before = signal.getsignal(signal.SIGTERM)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop.told:
            time.sleep(0.01)
    assert signal.getsignal(signal.SIGTERM) is before


def test_torchrun_starts_a_process_for_every_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    tell = 'import os; from pathlib import Path; Path(os.environ["RANK"] + "of" + os.environ["WORLD_SIZE"]).touch()\n'
    record = 'Path("run").mkdir(exist_ok=True); Path("run/record.json").write_text("{}")\n'
    (tmp_path / "train.py").write_text(tell + record)
    process.train([], tmp_path / "run", gpus=2)
    assert {path.name for path in tmp_path.glob("*of*")} == {"0of2", "1of2"}
