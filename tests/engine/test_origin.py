"""Runs that begin with weights, or go on from another run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from phantom.engine.artifacts import checkpoint
from phantom.engine.artifacts.weights import load_initial
from phantom.engine.errors import CheckpointError, ConfigError
from tests.engine import tiny
from tests.plans import plan
from tests.tiny_run import TINY, rows, tiny_run

STILL = ("steps=1", "optimizer=sgd", "optimizer.lr=0", "optimizer.weight_decay=0", "test_subset=4")
CONSTANT = ("schedule=constant", "steps=null", "eval_every=null", "checkpoint_every=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("trained"), "ema=0.5")["path"]


def parameters(path) -> dict:
    state = checkpoint.load(path)["model"]
    return {name: value for name, value in state.items() if "running" not in name and "batches" not in name}


@pytest.mark.parametrize("kind", ["checkpoint", "safetensors", "tensors"])
def test_a_run_begins_with_the_weights_of_a_file(tmp_path, trained, kind):
    """Rates of zero leave them as they are; of a checkpoint with a moving average it is the average."""
    state = checkpoint.load(trained / "last.pt")
    file = trained / "last.pt"
    weights = state["ema"] if kind == "checkpoint" else state["model"]
    if kind == "safetensors":
        file = tmp_path / "we\u0131ghts (1).safetensors"
        save_file({name: value.contiguous() for name, value in weights.items()}, file)
    if kind == "tensors":
        file = tmp_path / "weights.pth"
        torch.save({"state_dict": weights}, file)
    record = tiny_run(tmp_path, *STILL, f"init={file}")
    assert record["origin"]["init"] == str(file) and len(record["origin"]["digest"]) == 16
    assert record["origin"].get("step") == (state["step"] if kind == "checkpoint" else None)
    for name, value in parameters(record["path"] / "last.pt").items():
        assert torch.equal(value, weights[name]), name
    drawn = tiny_run(tmp_path, *STILL)
    assert drawn["path"] != record["path"] and drawn["origin"] is None and drawn["config_hash"] != record["config_hash"]


def test_a_run_that_resumes_needs_the_file_no_more(tmp_path, trained):
    file = tmp_path / "weights.pth"
    torch.save(checkpoint.load(trained / "last.pt")["model"], file)
    record = tiny_run(tmp_path, *STILL, f"init={file}")
    file.unlink()
    (record["path"] / "record.json").unlink()
    assert tiny_run(tmp_path, *STILL, f"init={file}")["origin"] == record["origin"]
    with pytest.raises(ConfigError, match="there is no file"):
        tiny_run(tmp_path, *STILL, f"init={file}", "resume=never")


def test_weights_of_another_code_base(tmp_path):
    file = tmp_path / "official.pth"
    torch.save({"w": torch.ones(2)}, file)
    model, seen = tiny.Classifier(), []

    def load_reference(model, state, source):
        if source != "theirs":
            raise ValueError(f"source={source!r} is not known; choose one of theirs")
        seen.append(state["w"])

    facts = load_initial(model, f"theirs:{file}", load_reference)
    assert torch.equal(seen[0], torch.ones(2)) and facts["init"] == f"theirs:{file}"
    with pytest.raises(ConfigError, match="choose one of theirs"):
        load_initial(model, f"other:{file}", load_reference)
    with pytest.raises(CheckpointError, match=r"another model than Classifier.*missing here: w"):
        load_initial(model, str(file), load_reference)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["init=nowhere.pt"], r"init=nowhere\.pt: there is no file nowhere\.pt\. Name a checkpoint"),
        (["init=theirs:nowhere.pt"], r"there is no file nowhere\.pt"),
        (["init={tmp}"], r"is a folder: name one of its files, such as .*best\.pt"),
        (["init={tmp}/junk.safetensors"], "cannot be read as tensors alone"),
        (["init={tmp}/junk.pth"], "cannot be read as tensors alone"),
        (["continue_from={tmp}"], r"holds no last\.pt: name the folder of a run"),
        (["init=a", "continue_from=b"], "exclude each other"),
        (["init=''"], "must be a path or null"),
    ],
)
def test_what_cannot_be_begun_with(tmp_path, items, message):
    for name in ("junk.safetensors", "junk.pth"):
        (tmp_path / name).write_bytes(b"junk")
    with pytest.raises((ConfigError, CheckpointError), match=message):
        tiny_run(tmp_path / "runs", *(item.format(tmp=tmp_path) for item in items))
    assert not list(tmp_path.rglob("last.pt"))


def test_one_epoch_and_another_are_two(tmp_path):
    """With a constant rate the continued run is the unbroken one: weights, momenta, random states, rows."""
    first = tiny_run(tmp_path, *CONSTANT, "epochs=1", "model.dropout=0.3")
    whole = tiny_run(tmp_path, *CONSTANT, "epochs=2", "model.dropout=0.3")
    before = {path.name: path.read_bytes() for path in first["path"].iterdir()}
    items = [*CONSTANT, "epochs=2", "model.dropout=0.3", f"continue_from={first['path']}"]
    record = tiny_run(tmp_path, *items)
    assert record["path"] not in (first["path"], whole["path"])
    assert record["origin"] == {"continue_from": str(first["path"]), "step": first["steps"]}
    assert (record["steps"], record["final"], record["best"]) == (whole["steps"], whole["final"], whole["best"])
    found, expected = (checkpoint.load(run["path"] / "last.pt") for run in (record, whole))
    for key in ("model", "optimizer", "step", "ranks", "best"):
        assert tiny.same(found[key], expected[key]), key
    assert tiny.rows(record["path"]) == tiny.rows(whole["path"])
    assert {path.name: path.read_bytes() for path in first["path"].iterdir()} == before
    assert (record["path"] / "best.pt").exists()
    assert tiny_run(tmp_path, *items)["finished"] == record["finished"], "and it is finished"
    again = tiny_run(tmp_path, *items, "resume=never")
    assert again["final"] == record["final"] and again["origin"] == record["origin"]
    assert len(rows(record["path"])) == len(rows(whole["path"]))


def test_a_continued_run_differs_in_its_budget_alone(tmp_path):
    first = tiny_run(tmp_path, "steps=2", "eval_every=2")["path"]
    for items, message in (
        (["steps=4", "lam=0.7"], r"another config \(different: grad, lam\)"),
        (["steps=2"], "budget of 2 steps ends before it begins: .* stands at step 2; use more epochs"),
        (["steps=1", "eval_splits=[train]"], "budget of 1 steps ends before it begins"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=message):
            tiny_run(tmp_path, *items, f"continue_from={first}")
    other = tiny_run(tmp_path, "steps=4", "eval_splits=[train]", f"continue_from={first}")
    assert other["final"].keys() == other["best"].keys() == {"train"} and other["best"]["train"]["step"] == 4
    record = tiny_run(tmp_path, "steps=4", "schedule=constant", f"continue_from={first}")
    assert record["steps"] == 4 and json.loads((record["path"] / "record.json").read_text())["origin"]["step"] == 2
    made = plan(["steps=4", f"continue_from={first}"])
    assert made.differences(plan(["steps=2"]).text) and not made.differences_to_resume(plan(["steps=2"]).text)


def test_a_run_that_continues_a_continued_one_names_it(tmp_path):
    first = tiny_run(tmp_path, "steps=2", "eval_every=2")["path"]
    second = tiny_run(tmp_path, "steps=4", "eval_every=2", f"continue_from={first}")["path"]
    third = tiny_run(tmp_path, "steps=6", "eval_every=2", f"continue_from={second}")
    assert third["origin"] == {"continue_from": str(second), "step": 4}
    assert checkpoint.load(third["path"] / "last.pt")["origin"] == third["origin"]


def test_a_copy_is_no_checkpoint_of_the_run_itself(tmp_path):
    first = tiny_run(tmp_path, "steps=2", "eval_every=2")["path"]
    items = ["steps=4", "eval_every=2", f"continue_from={first}"]
    folder = plan([*TINY, *items, f"runs={tmp_path}"]).folder
    folder.mkdir(parents=True)
    for name in ("best.pt", "last.pt"):  # as a run leaves them that is killed in its first step
        shutil.copy(first / name, folder)
    shutil.copy(first / "metrics.jsonl", folder)
    assert tiny_run(tmp_path, *items)["origin"] == {"continue_from": str(first), "step": 2}


def test_epochs_that_are_spent_add_nothing(tmp_path):
    first = tiny_run(tmp_path, "steps=null", "epochs=1", "eval_every=null")
    with pytest.raises(ConfigError, match=f"budget of {first['steps']} steps ends before it begins"):
        tiny_run(tmp_path, "steps=9", "epochs=1", "eval_every=null", f"continue_from={first['path']}")


def test_a_copy_that_was_cut_short_is_made_again(tmp_path):
    first = tiny_run(tmp_path, "steps=2", "eval_every=2")["path"]
    items = ["steps=4", "eval_every=2", f"continue_from={first}"]
    folder = plan([*TINY, *items, f"runs={tmp_path}"]).folder
    folder.mkdir(parents=True)
    shutil.copy(first / "best.pt", folder)
    assert tiny_run(tmp_path, *items)["origin"] == {"continue_from": str(first), "step": 2}


def test_a_copy_is_not_written_through_a_link(tmp_path):
    """The folder of the new run may be from elsewhere, with a link where the copy is made."""
    first = tiny_run(tmp_path, "steps=2", "eval_every=2")["path"]
    items = ["steps=4", "eval_every=2", f"continue_from={first}"]
    folder = plan([*TINY, *items, f"runs={tmp_path}"]).folder
    folder.mkdir(parents=True)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("metrics.jsonl.copy", "last.pt.copy", "best.pt.copy", "metrics.tmp", "last.tmp", "metrics.jsonl"):
        (folder / name).symlink_to(precious)
    assert tiny_run(tmp_path, *items)["steps"] == 4
    assert precious.read_text() == "precious" and [row["step"] for row in rows(folder)][:2] == [1, 2]


def test_where_torchrun_starts_again_a_continued_run_keeps_what_it_has_done(tmp_path, monkeypatch):
    first = tiny_run(tmp_path, "steps=2", "eval_every=2")["path"]
    items = ["steps=4", "eval_every=2", f"continue_from={first}", "resume=never"]
    record = tiny_run(tmp_path, *items)
    (record["path"] / "record.json").unlink()
    monkeypatch.setattr("phantom.engine.machine.launcher.has_begun", lambda folder: True)
    monkeypatch.setattr("phantom.engine.training.step.Step.__call__", lambda *_, **__: pytest.fail("trained again"))
    again = tiny_run(tmp_path, *items)
    assert (again["steps"], again["final"], again["origin"]) == (4, record["final"], record["origin"])
