"""A run becomes weights that ship, only if its number comes out again; what is pushed is what the hub would get."""

import json
import shlex
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import errors

import evaluate
from phantom.engine.artifacts import checkpoint
from phantom.engine.errors import CheckpointError
from scripts import explore, publish
from tests.tiny_run import tiny_run


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("runs"), "optimizer.lr=0.05", "ema=0.5")


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """Return an empty folder in the place of weights/."""
    for module in (publish, evaluate):
        monkeypatch.setattr(module, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def packed(record, weights, capsys) -> Path:
    publish.main(["pack", f"run={record['path']}", "name=digits", "checkpoint=last"])
    capsys.readouterr()
    return weights / "digits"


def refusal(call, *items: str) -> str:
    with pytest.raises(SystemExit) as end:
        call(list(items))
    assert isinstance(end.value.code, str) and end.value.code.startswith("error: ")
    return end.value.code


def answer(capsys, *items: str) -> dict:
    capsys.readouterr()
    evaluate.main(list(items))
    return json.loads(capsys.readouterr().out)


def test_packed_weights_are_the_average_that_the_record_is_about(record, packed, capsys):
    state = checkpoint.load(record["path"] / "last.pt")
    model = evaluate.pretrained("digits")
    assert all(torch.equal(value, state["ema"][name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, state["model"][name]) for name, value in model.state_dict().items())
    own = record["final"]["test"]
    for named in ("digits", str(packed)):
        found = answer(capsys, f"weights={named}")
        assert (found["loss"], found["accuracy"]) == (own["loss"], own["accuracy"])
        assert (found["weights"], found["checkpoint"], found["step"]) == ("digits", "last", 8)
    assert answer(capsys, "weights=digits", "eval_solver.max_steps=1")["loss"] != own["loss"]
    publish.main(["list"])
    assert f"digits: accuracy {own['accuracy']:.2f} on test" in capsys.readouterr().out


def test_a_number_that_was_not_finite_is_not_shipped(record, weights, tmp_path):
    run = shutil.copytree(record["path"], tmp_path / "run")
    found = json.loads((run / "record.json").read_text())
    found["final"]["test"]["accuracy"] = None
    (run / "record.json").write_text(json.dumps(found))
    text = refusal(publish.main, "pack", f"run={run}", "name=digits", "checkpoint=last")
    assert "accuracy on test was not finite" in text and not weights.exists()


def test_the_command_of_the_card_can_be_pasted(packed):
    (line,) = [line for line in (packed / "README.md").read_text().splitlines() if "init=" in line]
    assert shlex.join(shlex.split(line)) == line and "'model.channels=[4,8]'" in line


def test_the_list_goes_on_after_a_folder_that_is_damaged(packed, capsys):
    for name, change in {"cut": None, "diverged": {"accuracy": None}, "other": {}}.items():
        shutil.copytree(packed, packed.parent / name)
        path = packed.parent / name / "record.json"
        record = json.loads(path.read_text())
        record["final"]["test"] = change
        path.write_text(json.dumps({} if change is None else record))
    publish.main(["list"])
    said = capsys.readouterr()
    assert [line.split(" on test")[0] for line in said.out.splitlines()][1:] == ["diverged: accuracy not finite"]
    assert said.out.startswith("digits: accuracy ")
    assert "cut: " in said.err and "other: its record is not that of a run (KeyError: 'accuracy')" in said.err


def test_a_folder_from_elsewhere_is_data(packed, tmp_path):
    config = yaml.safe_load((packed / "config.yaml").read_text())
    config["model"]["_target_"] = "subprocess.Popen"
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(packed, elsewhere)
    (elsewhere / "config.yaml").write_text(yaml.safe_dump(config))
    assert "model._target_='subprocess.Popen' of the saved config is refused" in refusal(
        evaluate.main, f"weights={elsewhere}"
    )


@pytest.mark.parametrize(
    "bad", [{"_target_": "builtins.dict"}, {"in_channels": {"_target_": "builtins.dict"}}], ids=["whole", "part"]
)
@pytest.mark.parametrize(
    "call", [evaluate.pretrained, lambda name: evaluate.evaluate_one({"weights": name}, [])], ids=["python", "command"]
)
def test_so_are_the_numbers_that_it_builds_the_model_with(call, bad, packed):
    record = json.loads((packed / "record.json").read_text())
    record["weights"]["inputs"] |= bad
    (packed / "record.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"weights\.inputs\.\w+ is refused: inputs are whole numbers"):
        call("digits")


def test_a_damaged_folder_is_refused(packed, record):
    path = packed / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for call, items in ((evaluate.main, ["weights=digits"]), (publish.main, ["push", "name=digits"])):
        assert "model.safetensors is not the file that its record names" in refusal(call, *items)
    path.unlink()
    assert "holds no weights that ship: it needs model.safetensors" in refusal(evaluate.main, "weights=digits")
    assert "holds no weights that ship" in refusal(evaluate.main, f"weights={record['path']}")
    path.write_bytes(whole)
    (packed / "record.json").write_bytes((record["path"] / "record.json").read_bytes())
    assert "has no field `weights` with checkpoint, step, split" in refusal(evaluate.main, "weights=digits")


def test_what_cannot_be_packed(record, packed, tmp_path):
    pack = ("pack", f"run={record['path']}")
    assert "name=digits is taken" in refusal(publish.main, *pack, "name=digits")
    assert "name=../digits must be letters" in refusal(publish.main, *pack, "name=../digits")
    copy = tmp_path / "copy"
    shutil.copytree(record["path"], copy)
    other = json.loads((copy / "record.json").read_text())
    other["final"]["test"]["accuracy"] += 5
    (copy / "record.json").write_text(json.dumps(other))
    message = refusal(publish.main, "pack", f"run={copy}", "name=other", "checkpoint=last")
    assert f"accuracy on test is {record['final']['test']['accuracy']} here and" in message
    (copy / "record.json").unlink()
    assert "the run is not finished" in refusal(publish.main, "pack", f"run={copy}", "name=other")
    assert "there is no run folder" in refusal(publish.main, "pack", f"run={tmp_path / 'none'}", "name=other")
    assert not (packed.parent / "other").exists()


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "say one of list, pack, push"),
        (["list", "push"], "say one of list, pack, push"),
        (["pack", "run=x"], "pack needs name="),
        (["push", "name=x", "run=y"], "run=y does not go with push, which takes name=, repo=, private="),
        (["list", "name=x"], "name=x does not go with list, which takes nothing else"),
        (["push", "name=digits", "private=yes"], "private=yes is not known; choose true or false"),
        (["pack", "run=x", "name=y", "checkpoint=first"], "checkpoint=first is not known; choose last or best"),
        (["push", "name=none"], "weights=none is not known: choose one of digits"),
    ],
)
def test_what_is_asked_wrongly(items, message, packed):
    assert message in refusal(publish.main, *items)


def test_a_run_with_a_class_of_ones_own(tmp_path, monkeypatch, weights, capsys):
    (tmp_path / "mine_of_publish.py").write_text("from phantom import Broyden\nclass Mine(Broyden):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = tiny_run(tmp_path / "runs", "solver._target_=mine_of_publish.Mine")["path"]
    items = ["pack", f"run={run}", "name=mine", "checkpoint=last"]
    assert "add trust=<package>" in refusal(publish.main, *items)
    publish.main([*items, "trust=mine_of_publish"])
    assert answer(capsys, "weights=mine", "trust=mine_of_publish")["split"] == "test"
    grid = ["grad=npg", "k=1", "batches=1", f"run={run}"]
    assert "add trust=<package>" in refusal(explore.main, *grid)
    explore.main([*grid, "trust=mine_of_publish"])
    assert capsys.readouterr().out.startswith("# Gradient estimators and solvers on a model")


class Hub:
    """What `HfApi` would send; `problem` is raised instead of it."""

    problem: Exception | None = None

    def __init__(self):
        self.made, self.sent = [], []

    def whoami(self):
        if self.problem is not None:
            raise self.problem
        return {"name": "ada"}

    def create_repo(self, repo_id, *, private, exist_ok):
        self.made.append((repo_id, private, exist_ok))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        files = sorted(path.name for path in Path(folder_path).iterdir() if path.name in allow_patterns)
        self.sent.append((repo_id, files, commit_message))


@pytest.fixture
def hub(monkeypatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


def test_push_sends_the_folder_to_who_is_logged_in(hub, packed, capsys):
    (packed / "notes.txt").write_text("mine")
    publish.main(["push", "name=digits"])
    publish.main(["push", "name=digits", "repo=lab/weights", "private=true"])
    assert hub.made == [("ada/phantom-digits", False, True), ("lab/weights", True, True)]
    files = ["README.md", "config.yaml", "model.safetensors", "record.json"]
    assert hub.sent == [(repo, files, "Add digits") for repo in ("ada/phantom-digits", "lab/weights")]
    assert "digits is at https://hub/ada/phantom-digits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (errors.LocalTokenNotFoundError("no token"), "`hf auth login` first"),
        (errors.HFValidationError("bad name\nmore"), "the Hugging Face hub: bad name"),
        (errors.HTTPError("no route"), "the Hugging Face hub: no route"),
    ],
    ids=["nobody", "name", "network"],
)
def test_why_nothing_is_pushed(hub, packed, problem, message):
    hub.problem = problem
    assert message in refusal(publish.main, "push", "name=digits")
    assert not hub.made and not hub.sent
