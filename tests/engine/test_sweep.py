"""A sweep ends with its answer: a row per point, seeds averaged, and what failed with its reason."""

import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot

import train
from phantom.engine import command
from phantom.engine import sweep as sweeps
from phantom.engine.errors import DivergenceError
from scripts import report
from scripts.reporting import sweeps as drawing
from tests.plans import plan
from tests.tiny_run import TINY

ROOT = Path(__file__).parents[2]
SHORT = [*(item for item in TINY if not item.startswith(("steps=", "eval_every="))), "steps=1"]
CONTENT = {
    **{"command": "python train.py -m", "metric": "accuracy", "split": "test", "mode": "max", "keys": ["grad", "k"]},
    "rows": [
        {"values": {"grad": grad, "k": k}, "best": best, "last": [50.0], "seconds": [10.0], "step_ms": [], "cosine": []}
        for grad, k, best in (("upg", "1", [60.0, 70.0]), ("upg", "3", [85.0]), ("npg", "1", [75.0]))
    ],
    "failed": [{"values": {"grad": "npg", "k": "3", "seed": "0"}, "reason": "diverged"}],
}


def run(monkeypatch, job, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    try:
        command.run(job, train.CONFIGS)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_twelve_jobs_of_which_one_fails_end_with_a_table_maps_and_the_reason(tmp_path, monkeypatch, capsys):
    def job(made):
        if (made.choices["grad"], made.config["k"], made.config["seed"]) == ("npg", 3, 1):
            raise DivergenceError("the loss is not finite")
        return train.job(made)

    axes = ["grad=upg,npg", "k=1,2,3", "seed=0,1"]
    monitored = ["monitor=cosine", "monitor.every=1", "monitor.radius_steps=0", "monitor.compare=null"]
    assert run(monkeypatch, job, "-m", *axes, *SHORT, *monitored, f"runs={tmp_path}") == 1
    out = capsys.readouterr().out
    (path,) = tmp_path.glob("sweeps/mdeq_tiny-digits/*/sweep.json")
    content = json.loads(path.read_text())
    assert content["keys"] == ["grad", "k"] and len(list(tmp_path.rglob("record.json"))) == 11
    assert content["failed"] == [{"values": {"grad": "npg", "k": "3", "seed": "1"}, "reason": "the loss is not finite"}]
    for row in content["rows"]:
        name, k = row["values"].values()
        ends = []
        for seed in (0, 1) if row["values"] != {"grad": "npg", "k": "3"} else (0,):
            made = plan([f"grad={name}", f"k={k}", f"seed={seed}", *SHORT, *monitored, f"runs={tmp_path}"])
            ends.append(json.loads((made.folder / "record.json").read_text())["final"]["test"]["accuracy"])
        assert row["last"] == row["best"] == ends and len(row["seconds"]) == len(row["cosine"]) == len(ends)
    assert "failed: 1\n  grad=npg k=3 seed=1: the loss is not finite" in out
    assert "best accuracy grad" not in out and "grad \\ k" in out, "a map of two keys needs no title"
    assert f"draw it again: python scripts/report.py sweep={path.parent}" in out
    report.main([f"sweep={path.parent}"])
    names = {item.name for item in path.parent.iterdir()}
    assert names >= {"sweep.md", "sweep.tex", "sweep-1.csv", "sweep-2.csv", "sweep.png", "sweep.pdf"}
    assert "| grad=npg k=3 seed=1 | the loss is not finite |" in (path.parent / "sweep.md").read_text()


def test_the_table_has_means_and_the_map_has_shades():
    text = sweeps.table(CONTENT)
    lines = [line.split() for line in text.splitlines()]
    assert ["grad", "k", "n", "best", "last", "seconds"] in lines, "what was not measured has no column"
    assert ["upg", "1", "1", "65.00", "50.00", "10"] in lines
    assert ["upg", "65.00", "85.00", "█"] in lines and ["npg", "75.00", "▒", "--"] in lines
    worst = sweeps.table({**CONTENT, "mode": "min"})
    assert ["upg", "65.00", "█", "85.00"] in [line.split() for line in worst.splitlines()]


def test_what_is_printed_can_be_pasted(tmp_path, capsys):
    items = ["k=1,2", "eval_splits=[test]", f"runs={tmp_path / 'my runs'}"]
    plans = [plan([f"k={k}", *items[1:]]) for k in (1, 2)]
    sweep = sweeps.Sweep.of(items, plans)
    assert shlex.split(sweep.close()["command"]) == ["python", "train.py", "-m", *items]
    last = capsys.readouterr().out.splitlines()[-1].removeprefix("draw it again: ")
    assert shlex.split(last) == ["python", "scripts/report.py", f"sweep={sweep.folder}"]


def test_a_defect_of_one_job_is_shown_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    seen = []

    def job(made):
        seen.append(made.config["k"])
        if made.config["k"] == 1:
            raise KeyError("ours")

    assert run(monkeypatch, job, "-m", "k=1,2", *SHORT, f"runs={tmp_path}") == 1
    said = capsys.readouterr()
    assert seen == [1, 2] and "Traceback" in said.err and "k=1: KeyError: 'ours'" in said.out


@pytest.mark.parametrize("axes", [["k=1,2"], ["seed=0,1"]])
def test_one_axis_and_seeds_alone_are_drawn(axes, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, train.job, "-m", *axes, *SHORT, f"runs={tmp_path}") == 0
    (path,) = tmp_path.glob("sweeps/*/*/sweep.json")
    report.main([f"sweep={path.parent}"])
    assert (path.parent / "sweep.png").exists()
    rows = json.loads(path.read_text())["rows"]
    assert [len(row["best"]) for row in rows] == ([1, 1] if axes == ["k=1,2"] else [2])


def test_the_page_of_a_sweep_is_not_written_through_links(tmp_path, capsys):
    """A folder from elsewhere may have links of these names."""
    row = {"values": {"k": "1"}, "best": [1.0], "last": [1.0], "seconds": [1.0], "step_ms": [], "cosine": []}
    content = {"command": "python train.py", "metric": "accuracy", "split": "test", "mode": "max", "keys": ["k"]}
    (tmp_path / "sweep.json").write_text(json.dumps({**content, "rows": [row], "failed": []}))
    precious = tmp_path / "precious"
    precious.write_text("precious")
    names = [f"sweep.{ending}" for ending in ("md", "csv", "tex", "png", "pdf")]
    for name in names:
        (tmp_path / name).symlink_to(precious)
    report.main([f"sweep={tmp_path}"])
    assert precious.read_text() == "precious"
    assert all((tmp_path / name).stat().st_size and not (tmp_path / name).is_symlink() for name in names)


def test_a_sweep_through_hydra_s_launcher_ends_alike(tmp_path, monkeypatch, capsys):
    # Hydra spells a path and a number otherwise: a run has the folder that it has on its own
    first = train.job(plan([*SHORT, f"runs={tmp_path / 'first'}"]))["folder"]
    items = [*SHORT, f"init={tmp_path / 'first' / first / 'best.pt'}", "optimizer.lr=1e-3", f"runs={tmp_path}"]
    assert run(monkeypatch, train.job, "-m", "k=1,2", *items, "hydra/launcher=basic") == 0
    assert plan([*items, "k=2"]).folder.joinpath("record.json").exists()
    (path,) = tmp_path.glob("sweeps/*/*/sweep.json")
    assert json.loads(path.read_text())["failed"] == []
    assert [row["values"] for row in json.loads(path.read_text())["rows"]] == [{"k": "1"}, {"k": "2"}]


def test_an_interrupted_sweep_runs_what_is_missing(tmp_path, monkeypatch, capsys):
    seen = []

    def job(made):
        seen.append(made.config["k"])
        if seen == [1, 2]:
            raise KeyboardInterrupt
        return train.job(made)

    line = ["-m", "k=1,2,3", *SHORT, f"runs={tmp_path}"]
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, job, *line)
    (first,) = tmp_path.rglob("record.json")
    written = first.stat().st_mtime_ns
    assert run(monkeypatch, job, *line) == 0
    assert len(list(tmp_path.rglob("record.json"))) == 3 and first.stat().st_mtime_ns == written
    (path,) = tmp_path.glob("sweeps/*/*/sweep.json")
    assert [row["values"]["k"] for row in json.loads(path.read_text())["rows"]] == ["1", "2", "3"]


def test_submitit_runs_the_jobs_and_their_failures_are_listed(tmp_path):
    """Its local executor stands for SLURM's: every job is a process that is given its function as a file."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    axes = ["eval_splits=[test],[nope]", "hydra/launcher=submitit_local"]
    line = [sys.executable, str(ROOT / "train.py"), "-m", *axes, *SHORT, f"runs={tmp_path / 'runs'}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    assert "failed: 1\n  eval_splits=[nope]: " in done.stdout
    (path,) = tmp_path.glob("runs/sweeps/*/*/sweep.json")
    content = json.loads(path.read_text())
    assert [row["values"] for row in content["rows"]] == [{"eval_splits": "[test]"}] and len(content["failed"]) == 1


def test_a_folder_without_a_sweep_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no sweep\.json; train\.py -m names the folder"):
        report.main([f"sweep={tmp_path}"])
    for text, message in (('{"keys": [', r"sweep\.json is damaged \(.*\): run"), ("[]", "is no sweep of train")):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(SystemExit, match=message):
            report.main([f"sweep={tmp_path}"])


@pytest.mark.parametrize("finished", [True, False])
def test_where_no_job_has_a_value_nothing_is_drawn(tmp_path, capsys, finished):
    """Jobs that never evaluated the split, and jobs that all failed: those leave no table above their reasons."""
    rows = [{**row, "best": [], "last": []} for row in CONTENT["rows"]] if finished else []
    (tmp_path / "sweep.json").write_text(json.dumps({**CONTENT, "rows": rows}))
    report.main([f"sweep={tmp_path}"])
    said = capsys.readouterr().out
    assert "No job has a value on `test`: there is no map to draw." in said
    assert said.count("\n| ---") == 1 + finished and "| grad=npg k=3 seed=0 | diverged |" in said
    assert not (tmp_path / "sweep.png").exists()


def test_maps_of_long_names_have_room_for_them(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(drawing.plots, "save", lambda figure, _: kept.append(figure))
    axes = {
        "experiment": [f"table1/a_row_of_the_table_that_has_a_long_name_{i}" for i in range(3)],
        "optimizer.weight_decay": ["0.0001", "0.00025"],
        "data": ["cifar10_small", "images_synthetic"],
        "k": ["1", "3"],
    }
    for down in ("experiment", "data"):  # one is an axis of the maps, the other stands above them
        keys = sorted(axes, key=lambda key: (key == down, key == "k"))
        points = [dict(zip(keys, values, strict=True)) for values in itertools.product(*(axes[key] for key in keys))]
        rows = [{"values": values, "best": [float(i)], "cosine": []} for i, values in enumerate(points)]
        drawing.draw({**CONTENT, "keys": keys, "rows": rows}, tmp_path / "sweep.png")
        figure = kept.pop()
        figure.canvas.draw()
        panels = [axis for axis in figure.axes if axis.get_title()]
        titles = [axis.title.get_window_extent() for axis in panels]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(titles, 2))
        labels = [label for axis in panels for label in (*axis.get_xticklabels(), *axis.get_yticklabels(), axis.title)]
        for box in (label.get_window_extent() for label in labels):
            assert min(box.x0, box.y0) >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        pyplot.close(figure)


def test_a_label_is_cut_where_it_stays_one_of_its_own():
    names = [f"table1/{'x' * 30}{i}" for i in (1, 2)]
    assert drawing._short(names) == [f"{'x' * 11}…{'x' * 10}{i}" for i in (1, 2)]
    assert drawing._short(["0.5", "a/b"]) == ["0.5", "a/b"]
    alike = [f"{'x' * 12}{i}{'x' * 12}" for i in (1, 2)]
    assert drawing._short(alike) == alike


def test_jobs_of_one_folder_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "compile=false,true", *SHORT, f"runs={tmp_path}"])
    with pytest.raises(
        SystemExit, match=r"two jobs of this sweep are one run, .*: compile says where or how it is run"
    ):
        command.run(train.job, train.CONFIGS)
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "grad=upg", "lam=0.5,0.50", *SHORT, f"runs={tmp_path}"])
    with pytest.raises(SystemExit, match=r"two jobs of this sweep are one run, .*: a value is given twice"):
        command.run(train.job, train.CONFIGS)
    seen = []
    run(monkeypatch, lambda made: seen.append(made.folder), "-m", f"runs={tmp_path / 'a'},{tmp_path / 'b'}", *SHORT)
    assert len(set(seen)) == 2, "folders of their own"


def test_the_best_of_a_job_and_its_last_are_two_numbers(tmp_path):
    sweep = sweeps.Sweep(command="", folder=tmp_path, metric="accuracy", split="test", mode="max", jobs=[])
    record = {
        "best": {"test": {"accuracy": 3.0}},
        "final": {"test": {"accuracy": 2.0}},
        "wall_seconds": 1.0,
        "times": {},
    }
    assert sweep._measured(record, tmp_path / "nowhere") == {"best": 3.0, "last": 2.0, "seconds": 1.0}


def test_a_damaged_line_of_a_job_costs_the_answer_that_line_alone(tmp_path):
    whole = [
        f'{{"kind": "monitor", "step": {step}, "gradient_cosine": {cosine}}}' for step, cosine in ((1, 0.5), (3, 1))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join([whole[0], '{"kind": "mon', whole[1], '{"kind": "tra']))
    assert sweeps._cosine(tmp_path) == 0.75 and sweeps._cosine(tmp_path / "nowhere") is None
