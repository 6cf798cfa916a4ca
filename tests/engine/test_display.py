"""What a person sees of a run: a line per evaluation in a log, a bar on a terminal, a table at the end."""

import sys

import pytest

from phantom.engine.command import message_of
from phantom.engine.display import Progress, summary_table
from phantom.engine.errors import UserError
from tests.engine import tiny

ROW = {"split": "test", "epoch": 1, "step": 6, "loss": 0.12345, "accuracy": 50.0, "num_evals": 7.5, "hidden": 1.0}
RECORD = {
    "label": "table1/upg",
    "num_parameters": 158986,
    "metric": "accuracy",
    "final": {"valid": {"accuracy": 91.234}, "test": {"accuracy": 90.0}},
    "best": {"valid": {"accuracy": 92.5, "epoch": 3}, "test": {"accuracy": 90.5, "epoch": 3}},
    "baseline": {"test": 10.0},
    "train": {"num_evals": 21.25, "num_vjps": 0.0, "residual": 1.234e-4},
    "times": {"solve": {"median": 0.0123, "n": 40}},
    "items_per_second": 812.6,
    "unit": "images",
    "wall_seconds": 727.9,
    "folder": "table1/upg/default/seed0",
}


def test_a_line_per_evaluation_in_a_log(capsys):
    progress = Progress(10, done=0, enabled=True, metric="accuracy")
    progress.step(1, 0)
    progress.train_row(ROW)
    progress.eval_row(ROW)
    progress.stop()
    assert capsys.readouterr().out == "epoch 1 step 6 test: loss 0.1235  accuracy 50  num_evals 7.5\n"


def test_nothing_when_switched_off(capsys, tmp_path):
    progress = Progress(10, done=0, enabled=False, metric="accuracy")
    progress.eval_row(ROW)
    progress.stop()
    tiny.trainer(tmp_path, progress=False).fit(resume=False)
    assert capsys.readouterr() == ("", "")
    tiny.trainer(tmp_path / "shown", progress=True).fit(resume=False)
    assert len(capsys.readouterr().out.splitlines()) == 4  # two epochs, two splits


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(10, done=4, enabled=True, metric="accuracy")
    progress.step(6, 1)
    progress.train_row(ROW)
    task = progress._bar.tasks[0]
    assert (task.completed, task.total, task.fields["epoch"]) == (6, 10, 1)
    assert task.fields["text"] == "loss 0.1235  accuracy 50  num_evals 7.5"
    progress.eval_row(ROW)
    progress.stop()
    assert "epoch 1 step 6 test: loss 0.1235" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "run                        table1/upg",
        "parameters                 158,986",
        "valid accuracy             91.23 (last), 92.50 (best, epoch 3)",
        "test accuracy              90.00 (last), 90.50 (best, epoch 3), 10.00 (without input)",
        "evaluations of f per step  21.2",
        "vjps per step              0.0",
        "residual                   1.23e-04",
        "solve time                 12.3 ms per step (median of 40)",
        "throughput                 813 images/s",
        "wall clock                 728 s, evaluations included",
        "record                     table1/upg/default/seed0",
    ],
)
def test_the_closing_table(line):
    assert f"  {line}" in summary_table(RECORD).splitlines()


def test_a_run_too_short_to_measure_has_a_table_too():
    short = RECORD | {"train": {}, "times": {}, "items_per_second": None, "best": {}}
    table = summary_table(short)
    assert "91.23 (last)" in table and "per step" not in table and "images/s" not in table


def test_a_record_from_elsewhere_does_not_drive_the_terminal():
    table = summary_table(RECORD | {"label": "\x1b]0;title\x07\x1b[2Jrun\r", "folder": "über/\x9b2J"})
    assert not set(table) & {"\x1b", "\x07", "\r", "\x9b"}
    assert r"\x1b]0;title\x07\x1b[2Jrun\x0d" in table and r"über/\x9b2J" in table


def test_a_message_does_not_drive_the_terminal_either():
    text = message_of(UserError("missing here: \x1b[2Jall is well\n  and\tmore"))
    assert text == "missing here: \\x1b[2Jall is well\n  and\tmore"
    assert message_of(FileNotFoundError(2, "No such file", "a\x1b[2J")) == "[Errno 2] No such file: 'a\\x1b[2J'"
    assert message_of(PermissionError(13, "Permission denied", "a\x1b[2J")).startswith(r"a\x1b[2J: Permission denied.")
