"""The dashboards are the JSON that would be sent, and the export is what a server would get; no network is asked."""

import json
import sys
import types
from pathlib import Path

import pytest

from phantom import FixedPoint
from phantom.engine.measure.monitor import Monitor
from scripts import dashboard, studies
from scripts.running import export
from tests.engine import tiny
from tests.plans import plan


class Run:
    def __init__(self, options):
        self.options, self.rows, self.summary, self.finished = options, [], {}, False

    def define_metric(self, name, **options):
        pass

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.runs = []
    module.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    module.Settings = lambda **options: options
    module.Api = lambda: types.SimpleNamespace(default_entity=None)
    module.init = lambda **options: module.runs.append(Run(options)) or module.runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_every_record_is_exported_with_its_numbers(wandb, capsys):
    dashboard.main(["export", "mode=offline", "project=mine"])
    runs = {run.options["config"]["record"]: run for run in wandb.runs}
    assert len(runs) == len(wandb.runs) == len({run.options["id"] for run in wandb.runs}) > 20
    assert all(run.finished and run.options["mode"] == "offline" for run in wandb.runs)
    assert f"{len(runs)} records: wandb sync" in capsys.readouterr().out
    name = "results/table1/upg_k5_lam0.5/seed0.json"
    record, run = json.loads((studies.ROOT / name).read_text()), runs[name]
    assert run.summary["best"]["test"]["accuracy"] == record["best"]["test"]["accuracy"]
    assert run.summary["times"]["step"]["median"] == record["times"]["step"]["median"]
    options = run.options
    assert (options["group"], options["job_type"], options["project"]) == ("table1/upg_k5_lam0.5", "record", "mine")
    assert options["config"]["k"] == 5 and options["config"]["lam"] == 0.5
    live = plan(["experiment=table1/upg_k5_lam0.5"]).config["grad"]  # the dashboards group by its _target_
    assert options["config"]["grad"] == {key: live[key] for key in ("_target_", "k", "lam")}
    implicit = runs["results/table1/implicit@cpu/seed0.json"].options["config"]["grad"]
    assert implicit == {"_target_": plan(["grad=implicit"]).config["grad"]["_target_"]}
    assert options["tags"] == ["mdeq_tiny", "cifar10", "upg", "paper"]


def test_curves_are_sent_by_step():
    curves = [
        {"name": "train/loss", "x": [1, 3], "y": [0.5, 0.25]},
        {"name": "monitor/radius", "x": [3], "y": [0.9]},
    ]
    assert export.rows(curves) == [(1, {"train/loss": 0.5}), (3, {"train/loss": 0.25, "monitor/radius": 0.9})]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["model=x"], "model=x is not known"),
        (["mode=offline"], "mode= is that of `export`"),
        (["export", "mode=sometimes"], "choose online or offline"),
        (["export", "metric=perplexity"], "metric= is that of the dashboards"),
        (["make"], "'make' is neither one of export"),
    ],
)
def test_mistakes_are_one_sentence(wandb, items, message):
    with pytest.raises(SystemExit, match=message):
        dashboard.main(items)


@pytest.fixture
def definitions(monkeypatch):
    pytest.importorskip("wandb_workspaces")
    from wandb_workspaces.reports.v2 import interface

    from scripts.reporting import dashboard as drawn

    monkeypatch.setattr(interface, "_get_api", lambda: None)
    monkeypatch.setattr(interface, "execute_graphql", lambda *_: {"project": {"internalId": "UHJvamVjdA=="}})
    target = drawn.Target("me", "mine", "accuracy", "test")
    made = {"workspace": drawn.workspace(target), "report": drawn.report(target)}
    sent = {name: one._to_model().model_dump_json(by_alias=True, exclude_none=True) for name, one in made.items()}
    return {name: json.loads(text) for name, text in sent.items()}


def texts(node):
    """Yield every string of a JSON value, those of JSON within strings included."""
    if isinstance(node, dict):
        for value in node.values():
            yield from texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from texts(value)
    elif isinstance(node, str):
        yield node


def keys_of_a_run(folder: Path) -> set[str]:
    """Return the keys that a real run logs, as `Tracker.log` names them."""
    monitor = Monitor(every=2, radius_steps=3, exact_solver=FixedPoint(max_steps=50, tol=1e-8))
    trainer = tiny.trainer(folder, monitor=monitor)
    trainer.fit(resume=False)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {f"{row.get('split', row['kind'])}/{key}" for row in rows for key in row}


def test_both_show_what_runs_log(definitions, tmp_path):
    logged = keys_of_a_run(tmp_path)
    for name, content in definitions.items():
        shown = {
            text for text in texts(content) if text.startswith(("train/", "test/", "monitor/")) and " " not in text
        }
        assert shown <= logged, f"the {name} shows keys that no run has"
        wanted = ("test/accuracy", "train/time/backward", "train/residual", "train/num_steps", "train/peak_memory")
        assert {*wanted, "monitor/spectral_radius", "monitor/gradient_cosine"} <= shown, name


def test_axes_and_groups(definitions):
    for content in definitions.values():
        found = set(texts(content))
        assert "_absolute_runtime" in found and "step" in found
        assert any("best.test.accuracy" in text for text in found)
        assert any(text.endswith(("config.k.value", "config:k.value")) for text in found)
        assert any("group" in text.lower() for text in found)
    assert definitions["report"]["project"]["entityName"] == "me"
    assert (definitions["workspace"]["entity"], definitions["workspace"]["project"]) == ("me", "mine")


def test_the_speed_ups_are_those_of_the_rendered_pages(definitions):
    page = (studies.results() / "benchmark/gpu/summary.md").read_text()
    rows = [line for line in page.split("## Implicit differentiation")[1].splitlines() if line.startswith("| MDEQ")]
    sent = "\n".join(texts(definitions["report"]))
    assert rows and all(row in sent for row in rows)
