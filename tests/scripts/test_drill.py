"""The fault drill's list and its table; one round in every suite, the others where slow tests run."""

import sys

import pytest

from scripts import drill
from scripts.drilling.room import BrokenPromiseError, Job, Room, forget, same
from scripts.drilling.rounds import ROUNDS, Round
from scripts.drilling.rounds import drill as listed
from tests.test_docs import ROOT, tables

QUICK = ("wandb-mode",)


@pytest.fixture(scope="module", autouse=True)
def tidy():
    yield
    forget()


def test_the_list_names_every_round_with_its_promise(capsys):
    assert drill.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ROUNDS) >= 40
    assert all(
        line.split()[0] == name and round.promise in line
        for line, (name, round) in zip(lines, ROUNDS.items(), strict=True)
    )
    assert all(round.promise.endswith(".") and "\n" not in round.promise for round in ROUNDS.values())


def test_the_page_has_the_table_of_all_rounds():
    ((_, (heads, *rows)),) = tables((ROOT / "docs" / "survival.md").read_text())
    assert heads == ["round", "promise"] and rows == [[round.name, round.promise] for round in ROUNDS.values()]


@pytest.mark.parametrize("items", [["nothing"], ["seed=1"], ["--all"]], ids=lambda items: items[0])
def test_what_is_no_round_is_refused(items):
    with pytest.raises(SystemExit) as end:
        drill.main(items)
    assert end.value.code not in (0, None)


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="two rounds named sigterm"):
        listed("sigterm")(lambda room: None)


def test_a_broken_promise_is_shown_and_ends_with_one(monkeypatch, capsys):
    def broken(room: Room) -> None:
        raise BrokenPromiseError(f"exit status 7 in {room.folder.name}")

    for name, play in (("sound", lambda room: None), ("broken", broken)):
        monkeypatch.setitem(ROUNDS, name, Round(name, f"{name} holds.", play))
    assert drill.main(["sound", "broken"]) == 1
    shown = capsys.readouterr()
    assert "| sound | sound holds. | yes |" in shown.out and "| broken | broken holds. | **no** |" in shown.out
    assert "1 of 2 rounds hold" in shown.out and "broken: exit status 7 in drill-" in shown.err


def test_runs_that_differ_in_one_number_are_not_the_same():
    assert same({"a": [1, (2.0, None)]}, {"a": [1, (2.0, None)]})
    for other in ({"a": [1, (2.5, None)]}, {"a": [1, (2.0,)]}, {"b": [1, (2.0, None)]}, [1]):
        assert not same({"a": [1, (2.0, None)]}, other)


# each starts train.py two or three times, with the imports that this takes
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ROUNDS], ids=list(ROUNDS)
)
def test_a_round_holds(name):
    with Room() as room:
        ROUNDS[name].play(room)


def test_a_job_that_hangs_breaks_its_promise(tmp_path):
    job = Job(
        [sys.executable, "-c", "import time; time.sleep(60)"], runs=tmp_path, log=tmp_path / "log", environment={}
    )
    try:
        with pytest.raises(BrokenPromiseError, match=r"was not over after 0\.1 s"):
            job.wait(0.1)
    finally:
        job.kill()
