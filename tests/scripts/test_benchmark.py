"""The benchmark's command: its own items are checked before anything is built, and a suite runs each row apart."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from phantom.engine.config.overrides import expand
from scripts import benchmark, studies
from scripts.bench import variants
from scripts.bench.ratios import comparable
from scripts.reporting import suites
from scripts.running import suite

SUITES = [name for name in studies.names() if "benchmark" in studies.load(name)]
ROWS = [(name, row) for name in SUITES for row in studies.load(name)["benchmark"]["rows"]]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["repeats=0"], "repeats=0 must be an integer >= 1"),
        (["clock=sun"], "choose wall or cpu"),
        (["device=tpu"], "choose cpu or cuda"),
        (["peer=jaxopt"], "choose torchdeq"),
        (["out=page.md"], "must be a file that ends in .json"),
        (["model=mdeq_tiny", "batch=0"], "batch=0 must be an integer >= 1"),
        (["small", "k=3"], "small takes clock, threads"),
        (["pipeline", "growth=3"], "pipeline takes clock, threads"),
        (["pipeline", "peer=torchdeq"], "leave peer= out"),
        (["pipeline", "small"], "pipeline and small are two benchmarks"),
        (["pipeline", "model=ignn", "data=cox2_synthetic"], "of the kind graph_classification: name data=imagenet"),
        (["pipeline", "data=imagenet", "data.root=/nowhere"], "no ImageNet in /nowhere"),
        (["suite"], "name one suite, cpu or gpu"),
        (["suite", "tpu"], "'tpu' is neither one of cpu, gpu, rehearse"),
        (["suite", "cpu", "rows=mdeq"], "cpu has no row mdeq; it has mdeq_tiny_float32, "),
        (["suite", "cpu", "k=3"], "k=3 is not for a suite"),
    ],
)
def test_mistakes_are_one_sentence(items, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        benchmark.main(items)


def test_numbers_and_their_page_are_kept_together(tmp_path, capsys):
    out = tmp_path / "deep" / "tiny.json"
    items = ["model=mdeq_tiny", "batch=1", "size=4", "solver.max_steps=2", "repeats=2", "clock=cpu", "device=cpu"]
    result = benchmark.main([*items, "title=A tiny step", f"out={out}"])
    assert json.loads(out.read_text()) == result and result["about"]["repeats"] == 2
    assert result["about"]["command"].startswith("python scripts/benchmark.py model=mdeq_tiny batch=1 ")
    page = out.with_suffix(".md").read_text()
    assert page.startswith("# A tiny step\n") and page in capsys.readouterr().out


@pytest.mark.parametrize(("name", "row"), ROWS, ids=lambda part: part["name"] if isinstance(part, dict) else part)
def test_every_row_of_a_suite_composes(name, row):
    study = studies.load(name)
    for rehearse in (False, True):
        items = suite.items(study, row, rehearse=rehearse)
        own, words, overrides = benchmark.arguments.split(items, doc="", own=benchmark.OWN, words=benchmark.WORDS)
        assert overrides == [] if words else all(len(job) >= 3 for job in expand(overrides))
        assert ("out" in own) is not rehearse
        if not rehearse:
            assert own["out"] == f"results/{name}/{row['name']}.json" and own["title"] == row["title"]
            assert own["repeats"] == {"benchmark/cpu": "15", "benchmark/gpu": "9"}[name]
    assert words or variants.settings(overrides)


def test_small_states_are_timed_without_a_model(tmp_path):
    out = tmp_path / "small.json"
    items = ["device=cpu", "clock=cpu", "threads=1", "repeats=2", "warmup=0"]
    result = benchmark.main(["small", *items, f"out={out}"])
    seconds = {row["label"]: row["seconds"]["median"] for row in result["rows"]}
    compared = {item["a"]: item["b"] for item in result["ratios"]}
    plain, bare = "plain float64 tol=null", "bare loop float64 tol=null"
    assert compared[plain] == bare and min(seconds.values()) > 0
    evals = {row["label"]: row["evals"] for row in result["rows"]}
    assert evals[plain] == evals[bare] + 1 and evals["broyden float64 tol=0.0001"] < evals[plain]
    page = suites.render("Page", [("Small states", "", result)])
    assert "## Small states" in page and f"| {plain} | {bare} |" in page and plain in out.with_suffix(".md").read_text()


def test_pipelines_are_timed_without_a_model(tmp_path):
    out = tmp_path / "pipeline.json"
    items = ["device=cpu", "clock=cpu", "threads=1", "repeats=2", "warmup=0", f"out={out}"]
    result = benchmark.main(["pipeline", "data=images_synthetic", "data.size=8,16", *items])
    rates = {row["label"]: row["items_per_second"] for row in result["rows"]}
    names = [f"{split} data=images_synthetic data.size={size}" for size in (8, 16) for split in ("train", "test")]
    assert list(rates) == names and min(rates.values()) > 0 and result["ratios"] == []
    assert all(row["seconds"]["n"] == 2 for row in result["rows"])
    page = out.with_suffix(".md").read_text()
    assert "pictures per second and core" in page and all(f"| {name} |" in page for name in names)


def test_a_suite_goes_on_after_a_failure_and_stops_at_its_deadline(monkeypatch, capsys):
    ran = []

    def fake(line, **_):
        ran.append(line[3:])
        return subprocess.CompletedProcess(line, returncode=len(ran) == 1, stderr="out of memory")

    monkeypatch.setattr(suite.subprocess, "run", fake)
    with pytest.raises(SystemExit, match="error: mdeq_tiny_k failed"):
        benchmark.main(["suite", "cpu", "rehearse", "rows=mdeq_tiny_k,ignn"])
    shown = capsys.readouterr()
    assert len(ran) == 2 and "ignn: done" in shown.out and "out of memory" in shown.err
    assert {"model=mdeq_tiny", "size=8", "batch=2", "device=cpu"} <= set(ran[0])
    study = studies.load("benchmark/cpu")
    assert suite.run(study, ["ignn"], deadline=-1.0, rehearse=True) == [] and len(ran) == 2
    assert "ignn: left out, the deadline has passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("a", "b", "are"),
    [
        ("implicit", "upg k=5", True),
        ("implicit", "upg k=5 lam=0.8", True),
        ("implicit adjoint_solver=anderson", "onestep", True),
        ("implicit", "shine", True),
        ("implicit", "implicit", False),
        ("upg k=5", "implicit", False),
        ("implicit batch=8", "upg k=5 batch=16", False),
        ("implicit torchdeq", "upg k=5", False),
    ],
)
def test_implicit_is_compared_with_every_other_estimator_under_the_same_settings(a, b, are):
    rows = [SimpleNamespace(variant=SimpleNamespace(label=label)) for label in (a, b)]
    assert comparable(*rows) is are
