"""Where two runs part: of rows made by hand, of run folders, of configs and of commits."""

import json
import subprocess

import pytest

from scripts import compare
from scripts.running import parting
from tests.tiny_run import TINY, tiny_run

ROWS = [
    {"kind": "train", "step": 1, "loss": 0.5, "accuracy": 10.0, "time/step": 0.1},
    {"kind": "eval", "split": "test", "step": 2, "loss": 0.25},
    {"kind": "train", "step": 2, "loss": 0.4, "accuracy": 20.0, "time/step": 0.3},
]


def changed(index: int, **values) -> list[dict]:
    return [{**row, **values} if i == index else row for i, row in enumerate(ROWS)]


def test_rows_part_at_the_first_step_and_key_that_differ():
    assert parting.part(ROWS, changed(0, **{"time/step": 9.0})) is None, "times are of the machine"
    assert parting.part(ROWS, changed(2, accuracy=20.5, loss=0.4)) == ("train step 2", "accuracy", (20.0, 20.5))
    both = [*changed(0, accuracy=11.0)[:2], ROWS[2] | {"loss": 0.0}]
    assert parting.part(ROWS, both)[:2] == ("train step 1", "accuracy")
    assert parting.part(ROWS, ROWS[:2])[:2] == ("train step 2", None)
    assert "only the first run has it" in str(parting.part(ROWS, ROWS[:2]))
    assert parting.part(ROWS, changed(0, residual=0.1)) == ("train step 1", "residual", (None, 0.1))
    assert parting.part(ROWS, changed(1, loss=None)) == ("test step 2", "loss", (0.25, None)), "null is not finite"


def test_a_tolerance_is_relative():
    near = changed(0, loss=0.5 * (1 + 1e-7))
    assert parting.part(ROWS, near) is not None and parting.part(ROWS, near, rtol=1e-6) is None
    assert "relative 1.0e-07" in str(parting.part(ROWS, near))


def test_run_folders(tmp_path, capsys):
    paths = [str(tiny_run(tmp_path, "steps=2", "subset=8", *more)["path"]) for more in ((), ("seed=1",))]
    capsys.readouterr()
    assert compare.main([paths[0], paths[0]]) is True
    agreed = capsys.readouterr().out
    assert agreed.startswith("they agree in all") and int(agreed.split()[4]) > 20
    with pytest.raises(SystemExit, match="steps=3 has nothing to change"):
        compare.main([*paths, "steps=3"])
    assert compare.main(paths) is False
    assert "they part at train step 1: loss is" in capsys.readouterr().out


def test_a_last_line_that_is_cut_short_is_left_out(tmp_path, capsys):
    """And so is one that is no row; in the middle of the file it may be where the runs part."""
    whole, cut = tmp_path / "whole", tmp_path / "k=3" / "seed0"
    lines = [json.dumps(row) for row in ROWS]
    for folder, text in ((whole, lines[:2]), (cut, [*lines[:2], lines[2][:20]])):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("\n".join(text))
    assert compare.main([str(whole), str(cut)]) is True
    assert capsys.readouterr().out.endswith("of 2 rows\n")
    (cut / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:20], lines[2]]))
    with pytest.raises(SystemExit, match=r"metrics\.jsonl has damaged lines \(1\)"):
        compare.main([str(whole), str(cut)])
    for side in (str(cut), str(cut).replace("k=3", "k=4"), "runs/a/k=3/seed0"):
        (cut / "metrics.jsonl").unlink(missing_ok=True)
        with pytest.raises(SystemExit, match=f"error: {side} is no run folder: it holds no metrics"):
            compare.main([side, str(whole)])


@pytest.mark.slow  # it trains twice
def test_estimators_part_after_the_first_update(capsys):
    """NPG and one step have one loss in the first step; their vector-Jacobian products come before the gradient."""
    tiny = [item for item in TINY if item.split("=")[0] not in (*parting.SHORT, "eval_every")]
    assert compare.main(["grad=one_step", "grad=npg k=3", *tiny, "steps=1", "subset=8", "test_subset=4"]) is False
    assert capsys.readouterr().out == "they part at train step 1: num_vjps is 0.0 against 2.0, relative 1.0e+00\n"


def test_a_commit_is_run_with_its_own_code(tmp_path, monkeypatch):
    """In a repository of its own, whose train.py writes one number."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    script = (
        "import json, sys, pathlib\nruns = pathlib.Path(sys.argv[-1].split('=')[1])\nruns.mkdir()\n"
        "row = {'kind': 'train', 'step': 1, 'loss': LOSS}\n(runs / 'metrics.jsonl').write_text(json.dumps(row))\n"
    )
    subprocess.run([*git, "init", "-q"], check=True)
    for loss in ("0.5", "0.75"):
        (tmp_path / "train.py").write_text(script.replace("LOSS", loss))
        subprocess.run([*git, "add", "train.py"], check=True)
        subprocess.run([*git, "commit", "-qm", loss], check=True)
    (tmp_path / "train.py").write_text(script.replace("LOSS", "0.875"))
    monkeypatch.setattr(parting, "ROOT", tmp_path)
    sides = {}
    for side in ("HEAD~1", "HEAD", "."):
        folder = tmp_path / f"at {side}"
        folder.mkdir()
        sides[side] = parting.read(side, [], folder)[0]["loss"]
    assert sides == {"HEAD~1": 0.5, "HEAD": 0.75, ".": 0.875}
    left = subprocess.run([*git, "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert len(left.splitlines()) == 1, "the code of a commit is taken away"


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["main"], "name two sides"),
        ([".", ".", "rtol=small"], "rtol=small must be a number"),
        (["no-such-commit", "."], "'no-such-commit' is no run folder, no config .* and no commit"),
        (["grad=upgg", "."], r"failed: error: grad=upgg is not known"),
    ],
)
def test_mistakes_are_one_sentence(items, message):
    with pytest.raises(SystemExit, match=message):
        compare.main(items)
