"""What a run leaves: a folder that follows from its settings, whole files, and a record with every field."""

import json
import subprocess
import threading
from pathlib import Path

import pytest
import torch
import yaml

from phantom.engine.artifacts import lock, provenance, records, shipped
from phantom.engine.artifacts.identity import CIRCUMSTANCES, config_hash, differences, run_folder
from phantom.engine.artifacts.journal import MetricsLog
from phantom.engine.errors import LockedError
from tests.plans import trained

CONFIG = {
    "seed": 0,
    "k": 5,
    "device": "auto",
    "solver": {"tol": 1e-3, "compile": False},
    "data": {"batch_size": 4, "root": "/a", "download": False, "cache": None},
}


def folder(*overrides: str, seed: int = 0) -> Path:
    return run_folder("runs", "table1/upg", overrides, seed)


def test_the_folder_is_readable_and_does_not_depend_on_order():
    assert folder("k=3", "lam=0.5", seed=2) == Path("runs/table1/upg/k=3,lam=0.5/seed2")
    assert folder("lam=0.5", "k=3") == folder("k=3", "lam=0.5")
    assert folder() == Path("runs/table1/upg/default/seed0")
    assert folder("experiment=table1/upg", "scale=smoke") == folder()  # they are the label


def test_different_settings_have_different_folders():
    settings = [
        *((), ("k=3",), ("k=4",), ("lam=3",), ("k=3", "lam=0.5")),
        *(("model.channels=[8,8]",), ("model.channels=[8]", "x=8]"), ("model.channels=8,8",)),
        *(("data.name=a/b",), ("data.name=a-b",), ("data.name=a:b",), ("data.name=a b",)),
        *(tuple(f"data.some_long_key_{i}=value" for i in range(n)) for n in (5, 6)),
    ]
    folders = [folder(*items) for items in settings]
    assert len(set(folders)) == len(folders)
    assert all(len(part) < 100 and "]" not in part for path in folders for part in path.parts)
    assert all(len(path.parts) == 5 for path in folders)


@pytest.mark.parametrize("key", CIRCUMSTANCES)
def test_where_a_run_runs_changes_neither_folder_nor_hash(key):
    assert folder(f"{key}=1") == folder(f"+{key}=1") == folder()
    if key == "seed":  # a part of the path, and of what was run
        return
    changed = json.loads(json.dumps(CONFIG))
    node = changed["data"] if key.startswith("data.") else changed
    node[key.removeprefix("data.")] = "elsewhere"
    assert config_hash(changed) == config_hash(CONFIG) and differences(changed, CONFIG) == []


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"seed": 1}, ["seed"]),
        ({"k": 6, "lam": 0.5}, ["k", "lam"]),
        ({"solver": {"tol": 1e-4, "compile": False}}, ["solver"]),
        ({"data": {**CONFIG["data"], "batch_size": 5}}, ["data"]),
        ({"solver": {"tol": 1e-3, "compile": True}}, []),
    ],
)
def test_what_is_run_changes_the_hash(change, names):
    changed = CONFIG | change
    assert differences(CONFIG, changed) == differences(changed, CONFIG) == names
    assert (config_hash(changed) == config_hash(CONFIG)) is (not names)


def test_a_monitor_trains_nothing_else():
    assert differences({**CONFIG, "monitor": {"every": 10}}, {**CONFIG, "monitor": None}) == []


def test_the_hash_does_not_depend_on_the_order_of_keys():
    assert config_hash(dict(reversed(CONFIG.items()))) == config_hash(CONFIG)


def test_a_log_keeps_the_rows_up_to_a_step(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    log = MetricsLog(path, keep_until=0)
    for step in (1, 2, 2, 3):
        log.write({"kind": "train", "step": step, "loss": 1 / 3})
        assert path.read_text().endswith("}\n")  # on disk at once
    log.close()
    with open(path, "a") as file:
        file.write('{"kind": "train", "step": 4, "lo')
    log = MetricsLog(path, keep_until=2)
    log.write({"kind": "train", "step": 3, "loss": 0.5})
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1 / 3), (2, 1 / 3), (2, 1 / 3), (3, 0.5)]


def test_a_torn_line_that_is_whole_json_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')  # only the line break was lost
    MetricsLog(path, keep_until=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_log_without_a_checkpoint_begins_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsLog(path, keep_until=0).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("crash", ["content", "rename"])
def test_a_record_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, crash):
    path = tmp_path / "record.json"
    records.write_json(path, {"steps": 1})
    if crash == "content":
        with pytest.raises(TypeError):
            records.write_json(path, {"steps": 2, "device": torch.device("cpu")})
    else:
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            records.write_json(path, {"steps": 2})
    assert json.loads(path.read_text()) == {"steps": 1}


def test_a_number_that_is_not_finite_is_null_in_json(tmp_path):
    path = tmp_path / "record.json"
    content = {"loss": float("nan"), "rows": [1.5, float("-inf")], "deep": {"k": (float("inf"), 2)}, "text": "NaN"}
    records.write_json(path, content)
    expected = {"loss": None, "rows": [1.5, None], "deep": {"k": [None, 2]}, "text": "NaN"}
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == expected
    log = MetricsLog(tmp_path / "metrics.jsonl", keep_until=0)
    log.write({"step": 1, "residual": float("nan")})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "residual": null}\n'


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Make the program believe that it lives in a fresh repository."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.delenv("PHANTOM_COMMIT", raising=False)
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def state() -> tuple:
    found = provenance.environment(torch.device("cpu"))
    return found["commit"], found["dirty"]


def test_commit_and_dirty_flag(repository, monkeypatch):
    git(repository, "init", "-q")
    (repository / "records.py").write_text("one")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "One file")
    commit = git(repository, "rev-parse", "HEAD")
    assert state() == (commit, False)
    (repository / "runs.txt").write_text("not tracked")
    assert state() == (commit, False)
    (repository / "records.py").write_text("two")
    assert state() == (commit, True)
    monkeypatch.setenv("PHANTOM_COMMIT", "0123")
    assert state() == (commit, True)  # the repository knows better


def test_without_a_repository_the_commit_can_be_told(repository, monkeypatch):
    assert state() == (None, None)
    monkeypatch.setenv("PHANTOM_COMMIT", "0123")
    assert state() == ("0123", None)


def test_a_repository_around_the_code_is_not_its_own(repository, monkeypatch, tmp_path_factory):
    git(repository, "init", "-q")
    (repository / "other.py").write_text("one")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "Another project")
    monkeypatch.setattr(provenance, "ROOT", repository / "inside")
    provenance.ROOT.mkdir()
    assert state() == (None, None)
    monkeypatch.setattr(provenance, "ROOT", tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(provenance.ROOT.parent))
    assert state() == (None, None)


FIELDS = {
    *("label", "experiment", "choices", "overrides", "scale", "seed", "config_hash", "kind", "metric", "world_size"),
    *("commit", "dirty", "device", "versions", "started", "finished", "folder", "num_parameters", "parameter_groups"),
    *("steps", "final", "best", "train", "times", "items_per_second", "unit", "peak_memory", "precision", "compile"),
}
JOB = [
    *("data=digits", "subset=32", "test_subset=8", "data.batch_size=4", "epochs=1", "wandb=disabled", "progress=false"),
    *(
        "model.channels=[8,8]",
        "model.head_channels=[2,2]",
        "model.final_channels=8",
        "solver.max_steps=2",
        "log_every=3",
    ),
]


def train(runs: Path, *overrides: str, resume: bool = True) -> tuple[dict, Path]:
    job = [*JOB, *overrides, f"runs={runs}"]
    trainer, record = trained([*job, *([] if resume else ["resume=never"])])
    return record, trainer.folder


def test_the_record_of_a_run(tmp_path, capsys):
    record, path = train(tmp_path, "seed=7")
    assert json.loads((path / "record.json").read_text()) == record
    assert record.keys() >= FIELDS
    assert record["label"] == "mdeq_tiny-digits-upg" and record["seed"] == 7 and record["steps"] == 8
    assert "subset=32" in record["overrides"] and not any(
        item.startswith(("seed", "runs")) for item in record["overrides"]
    )
    assert tmp_path / record["folder"] == path == run_folder(tmp_path, record["label"], record["overrides"], 7)
    assert record["final"]["test"].keys() >= {"loss", "accuracy", "num_evals", "residual"}
    assert record["best"]["test"].keys() >= {"loss", "accuracy", "step", "epoch"}
    assert record["train"].keys() >= {"loss", "accuracy", "num_evals", "num_vjps", "residual", "lr", "gradient_norm"}
    assert record["times"].keys() == {"solve", "attach", "backward", "optimizer", "step"}
    step = record["times"]["step"]
    assert step["n"] == 3 and 0 < step["p10"] <= step["median"] <= step["p90"]
    # a step that the machine held up counts in the mean of three, and not in their median
    assert 0.2 < record["items_per_second"] / (4 / step["median"]) < 1.6 and record["unit"] == "images"
    assert record["versions"].keys() >= {"python", "torch", "hydra-core"}
    assert record["started"] <= record["finished"] and record["started"].endswith("+00:00")
    assert record["num_parameters"] == sum(record["parameter_groups"].values())
    assert 10**7 < record["peak_memory"] < 10**11
    saved = yaml.safe_load((path / "config.yaml").read_text())
    assert saved["seed"] == 7 and config_hash(saved) == record["config_hash"]
    table = capsys.readouterr().out
    for part in ("test accuracy", "evaluations of f per step", "solve time", "backward time", "images/s"):
        assert part in table


def test_a_finished_run_is_trained_again_only_when_asked(tmp_path):
    first, path = train(tmp_path)
    before = (path / "last.pt").stat().st_mtime_ns
    again, _ = train(tmp_path)
    assert again == first and (path / "last.pt").stat().st_mtime_ns == before
    again, _ = train(tmp_path, resume=False)
    assert (path / "last.pt").stat().st_mtime_ns > before
    assert again["final"] == first["final"] and again["steps"] == first["steps"]


def test_a_record_that_is_written_again_leaves_the_code_clean(repository):
    git(repository, "init", "-q")
    (repository / "results").mkdir()
    for name in ("records.py", "results/a.json"):
        (repository / name).write_text("1")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "x")
    (repository / "results/a.json").write_text("2")
    assert provenance.environment(torch.device("cpu"))["dirty"] is False
    (repository / "records.py").write_text("2")
    assert provenance.environment(torch.device("cpu"))["dirty"] is True


def test_what_says_only_where_and_how_a_run_runs():
    """All other keys make another run."""
    machine = {"device", "speed", "compile", "cuda_graph", "data.workers", "data.root", "data.download", "data.cache"}
    files = {"runs", "resume", "log_every", "checkpoint_every", "keep_checkpoints"}
    shown = {"progress", "on_failure", "wandb", "wandb_project"}
    assert set(CIRCUMSTANCES) == {"seed"} | machine | files | shown


def test_a_folder_has_one_writer_who_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WAIT", 0.1)
    with (
        lock.hold(tmp_path),
        pytest.raises(LockedError, match=r"process \d+ on .* writes to .*one writer"),
        lock.hold(tmp_path),
    ):
        pass
    monkeypatch.setattr(lock, "WAIT", 30)
    begun, done = threading.Event(), threading.Event()

    def writer() -> None:
        with lock.hold(tmp_path):
            begun.set()
            done.wait()

    thread = threading.Thread(target=writer)
    thread.start()
    begun.wait()
    threading.Timer(0.3, done.set).start()
    with lock.hold(tmp_path):
        assert done.is_set()
    thread.join()


def test_weights_that_leave_take_no_path_along(tmp_path):
    config = {"runs": "/a", "data": {"root": "/b", "cache": "/c", "k": 1}}
    about = {"checkpoint": "last", "step": 1, "split": "test", "inputs": {}}
    shipped.write(tmp_path, {"w": torch.ones(2)}, config=config, record={}, about=about)
    kept = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert kept == {"runs": "runs", "data": {"root": None, "cache": None, "k": 1}}
