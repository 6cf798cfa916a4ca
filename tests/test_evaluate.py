"""evaluate.py: a run's own number to the last digit, other budgets, official weights, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
from phantom.engine import build
from phantom.engine.build import build_model, build_source
from phantom.engine.training import evaluation as engine
from tests.models.test_reference import official_state
from tests.plans import plan
from tests.tiny_run import MODEL, tiny_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("runs"), "optimizer.lr=0.05", "eval_every=1")


@pytest.fixture
def run(record) -> str:
    return f"run={record['path']}"


def answer(capsys, *arguments: str):
    """Return what evaluate.py prints."""
    capsys.readouterr()
    evaluate.main(list(arguments))
    return json.loads(capsys.readouterr().out)


def refusal(*arguments: str) -> str:
    """Return the one message with which evaluate.py ends."""
    with pytest.raises(SystemExit) as end:
        evaluate.main(list(arguments))
    assert isinstance(end.value.code, str) and end.value.code.startswith("error: ")
    return end.value.code


@pytest.mark.parametrize(("checkpoint", "kept"), [("last", "final"), ("best", "best")])
def test_the_number_of_the_run(record, run, checkpoint, kept, capsys):
    found = answer(capsys, run, f"checkpoint={checkpoint}")
    own = record[kept]["test"]
    assert {key: found[key] for key in ("loss", "accuracy", "num_evals", "residual")} == {
        key: own[key] for key in ("loss", "accuracy", "num_evals", "residual")
    }
    assert record["best"]["test"]["step"] < 8, "the two checkpoints are to differ"
    assert found["split"] == "test" and found["step"] == (8 if kept == "final" else own["step"])


def test_a_checkpoint_before_the_last(record, run, capsys):
    assert 0 < answer(capsys, run, "checkpoint=last-1")["step"] < 8
    assert "there is no checkpoint" in refusal(run, "checkpoint=last-7")


def test_last_is_what_is_meant_and_other_splits_are_other_numbers(record, run, capsys):
    assert answer(capsys, run) == answer(capsys, run, "checkpoint=last")
    other = answer(capsys, run, "split=train")
    assert other["split"] == "train" and other["loss"] != record["final"]["test"]["loss"]


def test_the_moving_average_is_what_was_reported(tmp_path, capsys):
    averaged = tiny_run(tmp_path, "ema=0.5", "optimizer.lr=0.05")
    found = answer(capsys, f"run={averaged['path']}")
    assert found["loss"] == averaged["final"]["test"]["loss"]


def test_budgets_one_by_one_and_as_a_list(record, run, capsys):
    listed = answer(capsys, run, "eval_solver.max_steps=1,3", "data.eval_batch_size=7,20")
    assert [row["overrides"] for row in listed] == [
        [f"eval_solver.max_steps={steps}", f"data.eval_batch_size={size}"] for steps in (1, 3) for size in (7, 20)
    ]
    assert [row["num_evals"] for row in listed] == [2, 2, 4, 4]
    own = record["final"]["test"]["loss"]
    assert listed[2]["loss"] == own != listed[0]["loss"]
    assert listed[3]["loss"] == pytest.approx(own, rel=1e-5), "the batch size changes rounding alone"
    single = answer(capsys, run, "eval_solver.max_steps=1")
    assert single == {key: value for key, value in listed[0].items() if key != "overrides"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=first"], "choose best, last, or an older one"),
        (["split=valid"], "the data has train, test"),
        (["eval_solver.max_step=3"], "valid keys there: .*max_steps"),
        (["eval_solver.max_steps=0"], r"eval_solver\.max_steps=0 must be an integer >= 1"),
        (["solver.tol=-1"], "must be a number >= 0"),
        (["precision=fp8"], "choose one of auto, fp32, tf32, bf16"),
        (["model=mdeq_large"], "a trained run keeps its model"),
        (["model.final_channels=7"], r"of another model than MDEQ as built here: .*shape"),
        (["data=cifar10"], "a trained run keeps its data"),
        (["source=deq"], "source=deq does not go with run="),
        (["official=x.pth"], "name one thing to evaluate"),
        (["best"], "'best' is not of the form key=value"),
    ],
)
def test_what_it_refuses(run, arguments, message):
    assert re.search(message, refusal(run, *arguments))


def test_folders_that_are_none(record, tmp_path):
    assert "name one thing to evaluate: run=<folder>" in refusal()
    assert f"no run folder {tmp_path / 'nowhere'}" in refusal(f"run={tmp_path / 'nowhere'}")
    assert f"no checkpoint {tmp_path / 'last.pt'}" in refusal(f"run={tmp_path}")
    shutil.copy(record["path"] / "best.pt", tmp_path)
    whole = (record["path"] / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    assert "is damaged and cannot be read" in refusal(f"run={tmp_path}")
    torch.save({"model": {}}, tmp_path / "last.pt")
    assert "official=<file>" in refusal(f"run={tmp_path}")
    assert (tmp_path / "best.pt").read_bytes() == (record["path"] / "best.pt").read_bytes()


OFFICIAL = [*MODEL, "data=digits", "test_subset=20", "solver.max_steps=3", "solver.tol=null", "device=cpu"]


@pytest.fixture(scope="module")
def model():
    made = plan(OFFICIAL)
    torch.manual_seed(5)
    return build_model(made, build_source(made).spec)


@pytest.mark.parametrize("wrapped", [False, True])
def test_official_weights(model, wrapped, tmp_path, capsys):
    state = {f"module.{name}": tensor for name, tensor in official_state(model).items()}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "official.pth")
    found = answer(capsys, f"official={tmp_path / 'official.pth'}", "source=phantom_grad", *OFFICIAL)
    made = plan(OFFICIAL)
    options = {"shard": build.Shard(), "device": torch.device("cpu"), "precision": "fp32"}
    expected = engine.evaluate(model, made.task, build_source(made), "test", **options)
    assert found == {"split": "test", "source": "phantom_grad", **expected}


def test_official_files_it_refuses(model, tmp_path):
    path = tmp_path / "official.pth"
    asked = [f"official={path}", "source=phantom_grad", *OFFICIAL]
    assert f"there is no file {path}" in refusal(*asked)
    path.write_bytes(b"not a checkpoint")
    assert "cannot be read as tensors alone" in refusal(*asked)
    torch.save(torch.zeros(3), path)
    assert "holds a Tensor, expected tensors by name" in refusal(*asked)
    state = official_state(model)
    torch.save(state, path)
    assert "needs source=<code base>" in refusal(f"official={path}", *OFFICIAL)
    assert "checkpoint=best does not go with official=" in refusal(*asked, "checkpoint=best")
    assert "choose one of" in refusal(f"official={path}", "source=timm", *OFFICIAL)
    assert "head.final" in refusal(*asked, "model.final_channels=7")
    del state["classifier.bias"]
    torch.save(state, path)
    assert "missing: head.classifier.bias" in refusal(*asked)


def test_the_script(record, run, tmp_path):
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, str(ROOT / "evaluate.py"), run, "solver.max_steps=0"], **options)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    helped = subprocess.run([sys.executable, str(ROOT / "evaluate.py"), "--help"], **options)
    assert helped.returncode == 0 and helped.stdout.startswith("Evaluate a trained run")
