"""Weights & Biases gets every row and the record, under stable names; its failures never stop a run."""

import json
import logging
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import train
from phantom import FixedPoint
from phantom.engine import command
from phantom.engine.artifacts import tracking
from phantom.engine.artifacts.tracking import Tracker
from phantom.engine.errors import ConfigError
from phantom.engine.measure.monitor import Monitor
from tests.engine import tiny
from tests.plans import plan
from tests.tiny_run import TINY

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"seed": 3, "solver": {"tol": 1e-3}}


class FakeRun:
    def __init__(self, options: dict) -> None:
        self.options, self.rows, self.summary, self.exit_code, self.defined = options, [], {}, None, []

    def define_metric(self, name: str, **options) -> None:
        self.defined.append((name, options))

    def log(self, row: dict) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int = 0) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """Stand in for the module; `runs` are those begun, `refuse` the modes that fail."""
    module = types.ModuleType("wandb")
    module.runs, module.refuse, module.torn_down = [], (), 0
    module.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    module.Settings = lambda **options: options

    def init(**options):
        if options["mode"] in module.refuse:
            raise module.errors.Error("no such host")
        module.runs.append(FakeRun(options))
        return module.runs[-1]

    def teardown() -> None:
        module.torn_down += 1

    module.init, module.teardown = init, teardown
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return module


def tracker(folder: Path, mode: str = "offline", **options) -> Tracker:
    return Tracker(mode=mode, project="phantom", name="row/seed3", folder=folder, config=CONFIG, **options)


def test_a_folder_of_wandb_that_is_a_link_is_left_alone(wandb, tmp_path, caplog):
    """It came with the run folder, and leads elsewhere."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "id").write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / "wandb").symlink_to(other)
    tracker(run).log({"kind": "train", "step": 1, "loss": 1.0})
    assert not wandb.runs and "wandb is a link: remove it" in caplog.text
    assert [(path.name, path.read_text()) for path in other.iterdir()] == [("id", "precious")]


def panels(module, kind: str) -> set[str]:
    (run,) = module.runs
    return {key for row in run.rows for key in row if key.startswith(f"{kind}/")}


def test_a_run_fills_the_panels(wandb, tmp_path):
    monitor = Monitor(every=2, radius_steps=3, exact_solver=FixedPoint(max_steps=50, tol=1e-8))
    run = tiny.trainer(tmp_path, make_tracker=lambda fresh: tracker(tmp_path), monitor=monitor)
    run.fit(resume=False)
    run.finish({"final": run.final, "label": "row", "nothing": None, "steps": 6})
    solves = ("num_evals", "num_vjps", "num_steps", "residual", "converged", "diverged")
    phases = [f"time/{name}" for name in ("solve", "attach", "backward", "optimizer", "step")]
    train = ("loss", "accuracy", "gradient_norm", "lr", "items_per_second", "peak_memory", *solves, *phases)
    assert panels(wandb, "train") == {f"train/{name}" for name in (*train, "epoch", "step")}
    for split in ("valid", "test"):
        assert panels(wandb, split) == {f"{split}/{name}" for name in ("loss", "accuracy", *solves, "epoch", "step")}
    radii = [f"{name}{what}" for name in ("spectral_radius", "damped_spectral_radius") for what in ("", "_above_one")]
    measured = (*radii, "gradient_cosine", "gradient_norm_ratio", "exact_residual", "exact_unsolved", "pretraining")
    assert panels(wandb, "monitor") == {f"monitor/{name}" for name in (*measured, "epoch", "step")}
    (begun,) = wandb.runs
    assert begun.defined == [("step", {}), ("*", {"step_metric": "step"})]
    assert begun.summary == {"final": run.final, "label": "row", "steps": 6} and begun.exit_code == 0
    with open(tmp_path / "metrics.jsonl") as log:
        rows = [json.loads(line) for line in log]
    assert [row["step"] for row in begun.rows] == [row["step"] for row in rows]
    assert begun.rows[0]["train/loss"] == rows[0]["loss"]


def test_an_evaluation_on_the_training_split_has_panels_of_its_own(wandb, tmp_path):
    made = tracker(tmp_path)
    made.log({"kind": "train", "step": 1, "loss": 2.0})
    made.log({"kind": "eval", "split": "train", "step": 1, "loss": 1.0})
    assert [row for row in wandb.runs[0].rows] == [
        {"train/step": 1, "train/loss": 2.0, "step": 1},
        {"eval_train/step": 1, "eval_train/loss": 1.0, "step": 1},
    ]


def test_a_run_without_a_checkpoint_begins_a_curve(wandb, tmp_path):
    begun = []
    for _ in range(2):
        tiny.trainer(tmp_path, make_tracker=lambda fresh: begun.append(fresh) or tracker(tmp_path)).fit(resume=True)
    assert begun == [True, False]


def test_a_folder_that_cannot_be_written_costs_the_curve_of_a_new_run_alone(wandb, tmp_path, caplog):
    (tmp_path / "wandb").write_text("a file")
    tiny.trainer(tmp_path, make_tracker=lambda fresh: tracker(tmp_path, fresh=fresh)).fit(resume=True)
    assert "wandb failed (FileExistsError" in caplog.text and (tmp_path / "last.pt").exists()


def test_what_a_run_is_begun_with(wandb, tmp_path):
    tracker(tmp_path)
    options = wandb.runs[0].options
    assert options["config"] == CONFIG and options["mode"] == "offline" and options["resume"] == "allow"
    assert (options["project"], options["name"], options["dir"]) == ("phantom", "row/seed3", str(tmp_path))
    assert (options["group"], options["tags"], options["job_type"]) == (None, [], "train")


def test_group_and_tags_have_the_length_that_wandb_takes(wandb, tmp_path):
    tracker(tmp_path, group="g" * 200, tags=("short", "t" * 100))
    options = wandb.runs[0].options
    assert (options["group"], options["tags"]) == ("g" * 128, ["short", "t" * 64])


@pytest.mark.parametrize(
    ("items", "groups"),
    [
        (["-m", "grad=upg,npg", "k=2"], {"mdeq_tiny-digits/": 2}),
        (["grad=npg"], {"mdeq_tiny-digits-npg": 1}),
    ],
    ids=["the jobs of a sweep are one group", "the seeds of an experiment are one group"],
)
def test_what_belongs_together_is_one_group(wandb, tmp_path, monkeypatch, items, groups):
    online = [item for item in TINY if not item.startswith(("wandb=", "steps="))]
    monkeypatch.setattr(sys, "argv", ["train.py", *online, "steps=1", "wandb=offline", f"runs={tmp_path}", *items])
    command.run(train.job, train.CONFIGS)
    ((start, count),) = groups.items()
    begun = [run.options for run in wandb.runs]
    assert len(begun) == count and len({options["group"] for options in begun}) == 1
    assert all(options["name"].endswith("/seed0") for options in begun), "seeds of a point have names of their own"
    assert begun[0]["group"].startswith(start) and begun[-1]["tags"] == ["mdeq_tiny", "digits", "npg", "paper"]


def test_a_resumed_run_continues_its_own_curve(wandb, tmp_path):
    for folder in ("a", "a", "b"):
        tracker(tmp_path / folder)
    first, second, other = (run.options["id"] for run in wandb.runs)
    assert first == second != other


def test_a_run_from_the_start_has_a_curve_of_its_own(wandb, tmp_path):
    """And is continued by what resumes it, until the next start."""
    for fresh in (False, True, False, True, False):
        tracker(tmp_path, fresh=fresh)
    ids = [run.options["id"] for run in wandb.runs]
    assert ids[1] == ids[2] and ids[3] == ids[4] and len(set(ids)) == 3


def test_a_copy_of_a_folder_has_a_curve_of_its_own_and_a_moved_one_keeps_it(wandb, tmp_path):
    tracker(tmp_path / "a", fresh=True)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    for name in ("copy", "copy", "a"):
        tracker(tmp_path / name)
    (tmp_path / "a").rename(tmp_path / "moved")
    tracker(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "a")
    tracker(tmp_path / "a")
    first, copy, again, own, moved, other = (run.options["id"] for run in wandb.runs)
    assert copy == again and first == own == moved and len({first, copy, other}) == 3


def test_a_run_that_was_moved_keeps_its_curve_where_another_begins_at_its_place(wandb, tmp_path):
    tracker(tmp_path / "a", fresh=True)
    (tmp_path / "a").rename(tmp_path / "kept")
    tracker(tmp_path / "a", fresh=True)
    tracker(tmp_path / "kept")
    first, new, kept = (run.options["id"] for run in wandb.runs)
    assert first == kept != new


@pytest.mark.parametrize(
    ("kept", "found"), [("", None), ("abc", "abc"), ("abc\n", "abc")], ids=["cut", "early", "line"]
)
def test_what_is_kept_of_a_curve(wandb, tmp_path, kept, found):
    """A write that a crash cut short is empty, which wandb refuses; early runs kept the name alone."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "id").write_text(kept)
    for _ in range(2):
        tracker(tmp_path)
    first, second = (run.options["id"] for run in wandb.runs)
    assert first == second and first and (found is None or first == found)


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, None, "offline"),
        ({"WANDB_API_KEY": "k"}, None, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, None, "offline"),
        ({}, "machine api.wandb.ai\n  login user\n  password k\n", "online"),
        ({}, "machine example.org\n  login user\n  password k\n", "offline"),
        ({}, "nonsense", "offline"),
    ],
)
def test_auto_is_online_for_a_user_who_is_logged_in(wandb, tmp_path, monkeypatch, environment, netrc, mode):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc is not None:
        (tmp_path / ".netrc").write_text(netrc)
        (tmp_path / ".netrc").chmod(0o600)
    tracker(tmp_path, "auto")
    assert wandb.runs[0].options["mode"] == mode


def test_without_a_network_the_run_is_logged_offline(wandb, tmp_path, caplog):
    wandb.refuse = ("online",)
    with caplog.at_level(logging.WARNING):
        begun = tracker(tmp_path, "online")
    assert "cannot log online (no such host): logging offline" in caplog.text and "wandb sync" in caplog.text
    begun.log({"kind": "train", "step": 1, "loss": 0.5})
    (run,) = wandb.runs
    assert run.options["mode"] == "offline" and run.rows == [{"train/step": 1, "train/loss": 0.5, "step": 1}]
    assert wandb.torn_down == 1  # or wandb would say that the id is in use


@pytest.mark.parametrize("where", ["init", "define_metric", "log", "finish"])
def test_whatever_wandb_raises_costs_its_curve_alone(wandb, tmp_path, monkeypatch, caplog, where):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(wandb if where == "init" else FakeRun, where, fail)
    with caplog.at_level(logging.WARNING):
        run = tiny.trainer(tmp_path, make_tracker=lambda _: tracker(tmp_path))
        run.fit(resume=False)
        run.finish({"steps": 6})
    assert run.step == 6 and caplog.text.count("wandb failed (PermissionError") == 1
    assert sum(row["kind"] == "train" for row in tiny.rows(tmp_path)) == 6


def test_a_mode_that_wandb_does_not_know_is_refused_first(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "bogus")
    with pytest.raises(ConfigError, match=r"WANDB_MODE='bogus' is not known; choose one of online, offline"):
        plan([])
    assert plan(["wandb=disabled"]).config["wandb"] == "disabled"


def test_a_failed_run_is_closed_as_failed(wandb, tmp_path):
    tracker(tmp_path).abort()
    assert wandb.runs[0].exit_code == 1


def test_disabled_imports_nothing(tmp_path):
    """In a process of its own, since another test may have imported the real one."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom phantom.engine.artifacts.tracking import Tracker\n"
        "t = Tracker(mode='disabled', project='p', name='n', folder=Path('.'), config={})\n"
        "t.log({'kind': 'train', 'step': 1, 'loss': 1.0}); t.finish({}); t.abort()\n"
        "assert 'wandb' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_installation_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes the import fail
    tracker(tmp_path).log({"kind": "train", "step": 1})
    assert "wandb is not installed" in caplog.text and "metrics.jsonl" in caplog.text


def test_the_real_one_offline(tmp_path, monkeypatch):
    """Asked to go online without a key, it falls back; the file it leaves holds metrics, config and summary."""
    wandb = pytest.importorskip("wandb")
    for name, value in {"HOME": str(tmp_path), "WANDB_SILENT": "true", "WANDB_DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    begun = tracker(tmp_path, "online")
    begun.log({"kind": "train", "step": 1, "epoch": 0, "loss": 0.5, "accuracy": 12.0})
    begun.log({"kind": "eval", "split": "test", "step": 1, "epoch": 0, "loss": 0.25})
    begun.finish({"final": {"test": {"loss": 0.25}}, "label": "some-row"})
    wandb.teardown()  # flushes
    (file,) = tmp_path.glob(f"wandb/offline-run-*/run-{tracking._identifier(tmp_path, fresh=False)}.wandb")
    content = file.read_bytes()
    for part in (b"train/loss", b"train/accuracy", b"test/loss", b"solver", b"some-row"):
        assert part in content, part
