"""One dialect for every command: key=value, bare words, --help, and one sentence for a mistake."""

import importlib

import pytest

from scripts import arguments

COMMANDS = ("report", "reproduce", "benchmark", "explore", "compare", "dashboard")


def test_a_command_line_is_taken_apart():
    found = arguments.split(
        ["list", "jobs=2", "data.root=/my=data", "model.cutoffs=[1,2]"], doc="", own=("jobs",), words=("list",)
    )
    assert found == ({"jobs": "2"}, ["list"], ["data.root=/my=data", "model.cutoffs=[1,2]"])


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["--jobs", "2"], "--jobs is not known: there are no flags"),
        (["-m"], "-m is not known"),
        (["lists"], "'lists' is neither one of list, nor of the form key=value; see --help"),
        (["jobs=2", "jobs=3"], "jobs is given twice: jobs=2 and jobs=3"),
    ],
)
def test_mistakes_are_one_sentence(items, message):
    with pytest.raises(SystemExit, match=f"^error: {message}") as found:
        arguments.split(items, doc="", own=("jobs",), words=("list",))
    assert "\n" not in str(found.value)
    with pytest.raises(SystemExit, match="'list' is not of the form key=value"):
        arguments.split(["list"], doc="")


def test_values():
    own = {"jobs": "0", "clock": "sun", "rows": "c,a,c", "n": "3", "x": "-1", "y": "²"}
    assert (arguments.count(own, "n", 7), arguments.count({}, "n", 7), arguments.count({}, "n", None)) == (3, 7, None)
    assert arguments.count(own, "jobs", 1, least=0) == 0
    for key in ("jobs", "x", "y", "clock"):
        with pytest.raises(SystemExit, match=f"{key}={own[key]} must be an integer >= 1"):
            arguments.count(own, key, 1)
    assert arguments.choice({}, "clock", ("wall", "cpu"), "wall") == "wall"
    with pytest.raises(SystemExit, match="clock=sun is not known; choose wall or cpu"):
        arguments.choice(own, "clock", ("wall", "cpu"), "wall")
    assert arguments.some(own, "rows", ["a", "b", "c"], "t") == ["c", "a"], "in the order they are typed"
    assert arguments.some({}, "rows", ["a", "b"], "t") == ["a", "b"]
    with pytest.raises(SystemExit, match="t has no row c; it has a, b"):
        arguments.some(own, "rows", ["a", "b"], "t")


def test_a_file_is_tried_before_anything_is_measured(tmp_path):
    assert arguments.output({}) is None
    wanted = tmp_path / "new" / "folder" / "a.json"
    assert arguments.output({"out": str(wanted)}) == wanted and wanted.parent.is_dir() and not wanted.exists()
    taken, folder = tmp_path / "taken", tmp_path / "b.json"
    taken.touch(), folder.mkdir()
    for out, message in (
        ("page.md", "must be a file that ends in .json"),
        ("", "must be a file that ends in .json"),
        (str(folder), "must be a file that ends in .json"),
        (str(taken / "a.json"), "cannot be written: .*taken: File exists"),
        ("/proc/a.json", "cannot be written: /proc: "),
    ):
        with pytest.raises(SystemExit, match=f"^error: out=.*{message}"):
            arguments.output({"out": out})


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_same_everywhere(name, capsys):
    command = importlib.import_module(f"scripts.{name}")
    for items in (["--help"], ["table1", "-h"]):
        with pytest.raises(SystemExit) as ended:
            command.main(items)
        assert ended.value.code == 0 and capsys.readouterr().out.strip() == command.__doc__.strip()
    assert f"python scripts/{name}.py" in command.__doc__
    with pytest.raises(SystemExit, match="no flags here"):
        command.main(["--out", "x.json"])


def test_a_failure_does_not_drive_the_terminal():
    with pytest.raises(SystemExit) as caught:
        arguments.fail("sweep=\x1b[2J is no folder: ü")
    assert caught.value.code == r"error: sweep=\x1b[2J is no folder: ü"
