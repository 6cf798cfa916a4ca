"""A run folder that commit f9ad8de left: its config names modules that moved since, and lacks later root keys.

old_run/ was interrupted after step 4 of 8 (grad=one_step, whose leaf has changed too); whole.jsonl and whole.json are
the rows and the record of the same run without the interruption, by that commit.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from evaluate import WEIGHTS
from phantom.engine.build import build_trainer
from phantom.engine.config.instantiate import locate
from phantom.engine.config.upgrade import MOVED, read, upgrade
from phantom.engine.errors import ConfigError
from phantom.engine.rebuild import evaluate_rebuilt, rebuild_run, rebuild_shipped
from phantom.engine.run import finished_folder, run
from tests.engine import tiny
from tests.plans import plan
from tests.tiny_run import TINY
from train import CONFIGS

OLD = Path(__file__).parent / "old_run"
WHOLE = json.loads((OLD / "whole.json").read_text())


def job(runs: Path) -> list[str]:
    return [*TINY, "grad=one_step", "resume=auto", f"runs={runs}"]


@pytest.fixture
def folder(tmp_path):
    """The run folder, copied to where this version looks for it."""
    place = plan(job(tmp_path)).folder
    assert str(place.relative_to(tmp_path)) == WHOLE["folder"], "the folder's name has not changed"
    place.mkdir(parents=True)
    for name in ("last.pt", "metrics.jsonl", "config.yaml"):
        shutil.copy(OLD / name, place / name)
    return place


def test_it_is_resumed_and_ends_as_it_would_have(folder, tmp_path):
    made = plan(job(tmp_path))
    trainer = build_trainer(made)
    record = run(trainer, made)
    assert record["steps"] == 8
    shutil.copy(OLD / "whole.jsonl", tmp_path / "metrics.jsonl")
    rows, expected = tiny.rows(folder), tiny.rows(tmp_path)
    assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in expected]
    for row, old in zip(rows, expected, strict=True):
        # the folder was made on another kind of CPU, whose rounding the solves enlarge: 4e-5 were seen
        assert row["loss"] == pytest.approx(old["loss"], rel=5e-4)
    assert record["final"]["test"]["accuracy"] == pytest.approx(WHOLE["final"]["test"]["accuracy"])


def test_a_finished_one_is_not_trained_again(folder, tmp_path):
    shutil.copy(OLD / "whole.json", folder / "record.json")
    made = plan(job(tmp_path))
    assert run(build_trainer(made), made) == WHOLE


@pytest.mark.parametrize("key", ["label", "folder", "num_parameters", "metric", "train", "times", "items_per_second"])
def test_a_record_that_cannot_be_shown_does_not_count(folder, tmp_path, caplog, key):
    (folder / "record.json").write_text(json.dumps({name: value for name, value in WHOLE.items() if name != key}))
    assert finished_folder(plan(job(tmp_path))) is None
    assert f"is damaged and does not count (it has no {key})" in caplog.text


DAMAGED = {
    "empty": "",
    "cut": "data:\n  a: 1\n  _t",
    "a list": "- seed",
    "date": "a: 2020-13-45",
    "open": "a: [1",
    "a word": "a: !!bool x",
    "nothing": "a: !!int ''",
    "in itself": "a: &a [*a]",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_record_beside_a_damaged_config_does_not_count(folder, tmp_path, caplog, text):
    shutil.copy(OLD / "whole.json", folder / "record.json")
    (folder / "config.yaml").write_text(text)
    assert finished_folder(plan(job(tmp_path))) is None
    assert "is damaged and does not count (the saved config is " in caplog.text


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_config_is_refused_in_a_sentence(tmp_path, text):
    with pytest.raises(ConfigError, match="the saved config is "):
        read(text, CONFIGS.defaults)
    (tmp_path / "weights").mkdir()
    for path in (WEIGHTS / "reasoner_sudoku4").iterdir():
        shutil.copy(path, tmp_path / "weights")
    (tmp_path / "weights" / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="weights: the saved config is "):
        rebuild_shipped(tmp_path / "weights", overrides=[], configs=CONFIGS)


def test_it_is_evaluated(folder):
    metrics = evaluate_rebuilt(rebuild_run(folder, which="last", overrides=[], configs=CONFIGS), None)
    row = next(row for row in tiny.rows(folder) if row["kind"] == "eval")
    assert metrics["step"] == 4 and metrics["loss"] == pytest.approx(row["loss"], rel=1e-5)


def test_another_config_is_still_another(folder, tmp_path):
    text = (folder / "config.yaml").read_text()
    assert plan(job(tmp_path)).differences(text) == []
    assert plan([*job(tmp_path), "optimizer.lr=0.5"]).differences(text) == ["optimizer"]


@pytest.mark.parametrize("module", sorted(set(MOVED.values())))
def test_moved_names_lead_somewhere(module):
    assert locate(module).__name__ == module


def test_names_that_did_not_move_stay():
    config = {
        "model": {"_target_": "models.mdeq.MDEQ"},
        "grad": {"_target_": "phantom.NPG", "k": 1, "lam": 1.0},
        "k": 1,
    }
    assert upgrade(config, {"ema": None}) == config | {"ema": None}
    old = yaml.safe_load((OLD / "config.yaml").read_text())
    assert upgrade(old, {})["data"]["_target_"] == "data.images.digits.Digits"
