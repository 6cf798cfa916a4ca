"""reproduce.py runs the rows of a table, every repeat, and keeps a record only where it belongs."""

import json
import shlex
import subprocess

import pytest

from scripts import reproduce
from tests.plans import composed


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Run nothing: note the overrides, and leave the record that train.py would have left."""
    seen = []

    def fake(command, cwd):
        assert command[1].endswith("train.py")
        seen.append(command[2:])
        config, _ = composed(command[2:])
        failed = config["k"] == 9 if "k" in config else False
        if not failed:
            (job,) = [job for job in jobs if job.overrides == command[2:]]
            job.record.parent.mkdir(parents=True)
            job.record.write_text(json.dumps({"overrides": command[2:]}))
        return subprocess.CompletedProcess(command, int(failed))

    jobs, original = [], reproduce.jobs_of

    def noted(*arguments):
        found = list(original(*arguments))
        jobs.extend(found)
        return found

    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "jobs_of", noted)
    monkeypatch.setattr(reproduce.subprocess, "run", fake)
    return seen


def kept(folder) -> set[str]:
    return {path.relative_to(folder / "results").as_posix() for path in (folder / "results").rglob("*.json")}


def test_every_repeat_of_the_rows_asked_for(ran, tmp_path):
    reproduce.main(["table1", "rows=upg_k5_lam0.5,implicit", "data.root=/data", "repeats=2", "precision=tf32"])
    assert ran == [
        [f"experiment=table1/{row}", "data.root=/data", "precision=tf32", f"seed={seed}"]
        for row in ("upg_k5_lam0.5", "implicit")
        for seed in (0, 1)
    ]
    assert kept(tmp_path) == {f"table1/{row}/seed{i}.json" for row in ("upg_k5_lam0.5", "implicit") for i in (0, 1)}
    record = json.loads((tmp_path / "results/table1/implicit/seed1.json").read_text())
    assert record["overrides"] == ran[3]


def test_other_budgets_and_other_experiments_have_folders_of_their_own(ran, tmp_path):
    reproduce.main(["table3", "rows=imagenet_upg", "scale=smoke"])
    reproduce.main(["table3", "rows=imagenet_upg", "k=3"])
    assert kept(tmp_path) == {"table3/imagenet_upg@smoke/seed0.json", "table3/imagenet_upg@k=3/seed0.json"}


def test_a_list_of_all_commands_composes_and_runs_nothing(ran, tmp_path, capsys):
    reproduce.main(["table1", "list", "data.root=/my data"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 * 6 and not ran and not (tmp_path / "results").exists()
    words = [shlex.split(line) for line in lines]
    assert all(line[:2] == ["python", "train.py"] and "data.root=/my data" in line for line in words)
    seeds = [composed(line[2:])[0]["seed"] for line in words[:6]]
    assert seeds == list(range(6))


def test_a_failed_run_ends_it_and_keeps_what_was_there(ran, tmp_path):
    with pytest.raises(SystemExit, match="that run failed"):
        reproduce.main(["table1", "rows=npg_k5_lam0.5,upg_k9_lam0.5_dropout,implicit", "repeats=1"])
    assert len(ran) == 2 and kept(tmp_path) == {"table1/npg_k5_lam0.5/seed0.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a table first, one of chains, .*table1"),
        (["table9"], "name a table first"),
        (["table1", "rows=implicit,upg"], "table1 has no row upg; it has implicit, "),
        (["table1", "seed=3"], "seed is set by this script"),
        (["table1", "rows=implicit", "k=3"], "k is not used"),
        (["table1", "rows=implicit", "scale=tiny"], "choose one of gpu, paper, smoke"),
    ],
)
def test_mistakes_are_named_before_anything_runs(ran, arguments, message):
    with pytest.raises(SystemExit, match=f"(?i){message}"):
        reproduce.main(arguments)
    assert not ran
