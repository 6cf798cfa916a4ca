"""train.py from a command line to a record: what a run leaves, and what it does when it is started again."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import train
from phantom.engine import command
from phantom.engine.artifacts import checkpoint
from tests.plans import plan
from tests.tiny_run import TINY, rows, tiny_run

ROOT = Path(__file__).parents[1]
FIELDS = {
    *("label", "experiment", "recipe", "choices", "overrides", "scale", "seed", "config_hash", "kind", "metric"),
    *(
        "baseline",
        "data_digests",
        "data_notes",
        "origin",
        "num_parameters",
        "parameter_groups",
        "official_parameter_count",
        "world_size",
        "folder",
    ),
    *("precision", "gradient_precision", "compile", "cuda_graph"),
    *("device", "versions", "commit", "dirty", "started", "finished"),
    *(
        "wall_seconds",
        "training_seconds",
        "target",
        "reached",
        "steps",
        "final",
        "best",
        "train",
        "times",
        "items_per_second",
        "unit",
        "peak_memory",
    ),
}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("runs"))


def test_the_files(record):
    folder = record["path"]
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names == {"config.yaml", "metrics.jsonl", "last.pt", "last-1.pt", "best.pt", "record.json", "run.lock"}
    config = plan([*TINY, f"runs={folder.parents[2]}"]).config
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config
    for name in ("last.pt", "best.pt"):
        state = torch.load(folder / name, weights_only=True)
        assert yaml.safe_load(state["config"]) == config
        assert sum(w.numel() for w in state["model"].values()) > record["num_parameters"], "weights and statistics"
    assert state["step"] == record["best"]["test"]["step"]


def test_the_record(record):
    assert set(record) - {"path"} == FIELDS
    assert (record["label"], record["scale"]) == ("mdeq_tiny-digits-upg", "paper")
    assert (record["steps"], record["seed"], record["world_size"]) == (8, 0, 1)
    assert record["choices"]["model"] == "mdeq_tiny" and record["choices"]["grad"] == "upg"
    assert "wandb=disabled" not in record["overrides"] and "steps=8" in record["overrides"]
    assert record["num_parameters"] == sum(record["parameter_groups"].values())
    assert {"step", "solve", "attach", "backward", "optimizer"} <= set(record["times"])
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert (record["target"], record["reached"]) == (None, None)
    assert 0 < record["training_seconds"] < record["wall_seconds"] + 0.1
    for key in ("items_per_second", "peak_memory", "wall_seconds"):
        assert record[key] > 0
    assert record["started"] <= record["finished"]
    assert record["train"]["num_evals"] == 4 + 5, "three steps cost four evaluations, and UPG has k = 5 more"


def test_the_rows(record):
    found = rows(record["path"])
    steps = [*(("train", step) for step in (1, 2, 3, 4)), ("eval", 4)]
    steps += [*(("train", step) for step in (5, 6, 7, 8)), ("eval", 8)]
    assert [(row["kind"], row["step"]) for row in found] == steps
    evaluations = [row for row in found if row["kind"] == "eval"]
    assert {key: evaluations[-1][key] for key in record["final"]["test"]} == record["final"]["test"]
    assert record["best"]["test"]["accuracy"] == max(row["accuracy"] for row in evaluations)
    # 20 pictures: every accuracy is a multiple of 5 percent
    assert all(row["accuracy"] % 5 == pytest.approx(0) for row in evaluations)


def test_started_again_it_says_finished_and_trains_nothing(record, capsys):
    runs, folder = record["path"].parents[2], record["path"]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = tiny_run(runs)
    assert again == {**record, "best": again["best"]} and again["best"] == record["best"]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    shown = capsys.readouterr().out
    for part in ("test accuracy", "evaluations of f per step", "backward time", record["folder"]):
        assert part in shown


def test_never_resume_trains_anew_to_the_same_numbers(record):
    runs, folder = record["path"].parents[2], record["path"]
    before = (folder / "record.json").stat().st_mtime_ns
    again = tiny_run(runs, "resume=never")
    assert again["path"] == folder and (folder / "record.json").stat().st_mtime_ns > before
    assert again["final"] == record["final"] and len(rows(folder)) == 10


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the parameters of a finished run by name, without its batch statistics."""
    state = torch.load(folder / "last.pt", weights_only=True)["model"]
    return {name: value for name, value in state.items() if "running_" not in name and "num_batches" not in name}


def test_the_seed_makes_the_initial_weights(tmp_path):
    """A rate of zero leaves them as they were drawn; what was drawn before the run does not matter."""
    still = ["optimizer=sgd", "optimizer.lr=0", "schedule=constant", "steps=1", "test_subset=4"]
    found = []
    for i, (seed, noise) in enumerate(((0, 1), (0, 2), (1, 1))):
        torch.manual_seed(noise)
        found.append(weights(tiny_run(tmp_path / str(i), *still, f"seed={seed}")["path"]))
    first, again, other = found
    drawn = [name for name, value in first.items() if value.numel() > 1 and value.std() > 0]
    assert len(drawn) > 20 and any(name.endswith("bias") for name in drawn)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in drawn)


def test_weight_decay_moves_every_parameter(tmp_path):
    """By lr times decay times itself in one step of gradient descent: norms, gains and biases too (Table 1)."""
    step = ["optimizer=sgd", "optimizer.momentum=0", "schedule=constant", "steps=1", "test_subset=4"]
    jobs = {
        "start": ["optimizer.lr=0"],
        "without": ["optimizer.weight_decay=0"],
        "with": ["optimizer.weight_decay=0.5"],
    }
    found = {name: weights(tiny_run(tmp_path, *step, *job)["path"]) for name, job in jobs.items()}
    for name, start in found["start"].items():
        moved = found["with"][name] - found["without"][name]
        torch.testing.assert_close(moved, -0.1 * 0.5 * start, rtol=1e-3, atol=1e-6, msg=name)
    biases = [value for name, value in found["start"].items() if name.endswith("bias")]
    assert max(float(bias.abs().max()) for bias in biases) > 0.01


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "timm"])
def test_one_weight_decay_holds_for_all_parameters(tmp_path, optimizer):
    job = [f"optimizer={optimizer}", "optimizer.weight_decay=0.03", "steps=1", "test_subset=4"]
    folder = tiny_run(tmp_path, *job)["path"]
    groups = torch.load(folder / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.03}
    assert sum(len(group["params"]) for group in groups) == len(weights(folder))


def test_folders_tell_runs_apart_by_what_they_are(tmp_path):
    first = tiny_run(tmp_path, "steps=1")
    places = {
        tiny_run(tmp_path, "steps=1", *more)["path"]
        for more in (["seed=1"], ["lam=0.7"], ["grad=npg"], ["optimizer.lr=0.01"], ["log_every=5"])
    }
    assert len(places) == 5 and first["path"] in places, "log_every says how to look, not what to run"


def command_line(monkeypatch, *arguments: str) -> str:
    """Run train.py in this process, which must fail, and return the one line it prints."""
    errors = io.StringIO()
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *TINY, *arguments])
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
        command.run(train.job, train.CONFIGS)
    assert end.value.code == 1
    (line,) = errors.getvalue().strip().splitlines()
    return line


def saved(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.pt")}


def test_what_cannot_be_resumed_is_left_as_it_is(tmp_path, monkeypatch):
    folder = tiny_run(tmp_path)["path"]
    (folder / "record.json").unlink()
    state = torch.load(folder / "last.pt", weights_only=True)
    config = yaml.safe_load(state["config"]) | {"epochs": 13}
    for content, message in (
        (state | {"config": yaml.safe_dump(config)}, "under another config (different: epochs)"),
        (state | {"model": {"other.weight": torch.zeros(2)}}, "of another model than MDEQ"),
    ):
        checkpoint.save(folder / "last.pt", content)
        before = saved(folder)
        assert message in command_line(monkeypatch, f"runs={tmp_path}") and saved(folder) == before
    for name in ("last.pt", "last-1.pt", "best.pt"):
        (folder / name).write_bytes(before["last.pt"][:1000])
    before = saved(folder)
    line = command_line(monkeypatch, f"runs={tmp_path}")
    assert line.startswith(f"error: the checkpoint {folder / 'last.pt'} is damaged") and "resume=never" in line
    assert saved(folder) == before and not (folder / "record.json").exists()


def test_a_finished_run_is_shown_where_nothing_can_be_written(tmp_path, monkeypatch, capsys):
    folder = tiny_run(tmp_path)["path"]
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *TINY, f"runs={tmp_path}"])
    command.run(train.job, train.CONFIGS)
    assert "test accuracy" in capsys.readouterr().out and sorted(tmp_path.rglob("*")) == before
    (folder / "record.json").unlink()
    with pytest.raises(SystemExit, match=r"^error: .*Permission denied"):
        command.run(train.job, train.CONFIGS)


def test_divergence_says_where_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    job = ["optimizer=sgd", "optimizer.lr=1e20", "schedule=constant", "eval_every=1"]
    line = command_line(monkeypatch, *job, f"runs={tmp_path}")
    step = int(re.search(r"stopped being finite at step (\d+)", line).group(1))
    (last,) = tmp_path.rglob("last.pt")
    assert str(last) in line and "smaller optimizer.lr" in line
    state = torch.load(last, weights_only=True)
    assert state["step"] <= step and all(w.isfinite().all() for w in state["model"].values())
    assert not list(tmp_path.rglob("record.json"))


def test_a_sweep_leaves_a_record_of_every_job(tmp_path, monkeypatch):
    sweep = ["grad=upg,npg", "k=1,3", "lam=0.5", "steps=1", "test_subset=8", f"runs={tmp_path}"]
    job = [item for item in TINY if item.split("=")[0] not in ("steps", "test_subset")]
    seen = []
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), "-m", *job, *sweep])
    command.run(lambda plan: seen.append(train.job(plan)), train.CONFIGS)
    assert [(r["choices"]["grad"], [i for i in r["overrides"] if i[:2] == "k="]) for r in seen] == [
        (grad, [f"k={k}"]) for grad in ("upg", "npg") for k in (1, 3)
    ]
    assert len(list(tmp_path.rglob("record.json"))) == 4
    assert [r["train"]["num_evals"] for r in seen] == [4 + 1, 4 + 3, 4 + 1, 4 + 1]


def test_the_script(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 120}
    script = [sys.executable, str(ROOT / "train.py")]
    done = subprocess.run([*script, *TINY, "steps=1"], **options)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout and len(list(tmp_path.glob("runs/*/*/seed0/record.json"))) == 1
    helped = subprocess.run([*script, "--help"], **options)
    assert helped.returncode == 0 and "grad: bptt, implicit, npg, one_step, shine, upg" in helped.stdout
