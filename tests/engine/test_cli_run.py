"""What train.py prints and returns: one line for a mistake, a failed job of a sweep, a failed process of several."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
import train
from phantom.engine import command
from phantom.engine.errors import CheckpointError, ConfigError, DataError, DivergenceError
from tests.plans import plan
from tests.tiny_run import TINY, tiny_run
from train import CONFIGS

ROOT = Path(__file__).parents[2]

ERRORS = [
    (ConfigError("k=0 must be an integer >= 1"), "error: k=0 must be an integer >= 1"),
    (DataError("the picture a.png is damaged"), "error: the picture a.png is damaged"),
    (CheckpointError("last.pt is damaged"), "error: last.pt is damaged"),
    (DivergenceError("not finite at step 3"), "error: not finite at step 3"),
    (
        OSError(errno.ENOSPC, "No space left on device", "/full/last.pt"),
        "error: /full/last.pt: No space left on device",
    ),
    (PermissionError(errno.EACCES, "Permission denied", "/locked"), "error: /locked: Permission denied"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Let the default folder of runs be one of the test's own."""
    monkeypatch.chdir(tmp_path)


def run(monkeypatch, job, *arguments: str) -> int:
    """Run the command line in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *arguments])
    try:
        command.run(job, CONFIGS)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(("error", "line"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
def test_an_error_of_the_user_is_one_line(error, line, tmp_path, monkeypatch, capsys):
    def job(*_):
        raise error

    assert run(monkeypatch, job, f"runs={tmp_path}") == 1
    printed = capsys.readouterr().err.strip()
    assert printed.startswith(line) and len(printed.splitlines()) == 1


def test_a_full_disk_is_told_from_what_torch_makes_of_it(monkeypatch, capsys):
    class Full(io.RawIOBase):
        def writable(self):
            return True

        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    def job(*_):
        torch.save({"weights": torch.zeros(1000)}, Full())

    assert run(monkeypatch, job) == 1
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("error: writing failed: No space left on device.") and len(printed.splitlines()) == 1


@pytest.mark.parametrize("sweep", [[], ["-m", "k=1,2"]])
def test_a_folder_of_runs_that_cannot_be_is_refused_first(sweep, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    started = []
    assert run(monkeypatch, lambda *job: started.append(job), *sweep, f"runs={tmp_path / 'file' / 'runs'}") == 1
    assert f"error: {tmp_path / 'file' / 'runs'}: Not a directory" in capsys.readouterr().err and not started


@pytest.mark.parametrize(("rank", "world", "waits"), [("0", "2", []), ("1", "2", [20.0]), ("1", "1", [])])
def test_the_first_process_tells_what_all_find(rank, world, waits, monkeypatch, capsys):
    """Another one leaves it the time to start: the launcher ends all once one has ended."""
    waited = []
    monkeypatch.setattr(command.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert run(monkeypatch, lambda *job: None, "k=0") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1 and waited == waits


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": ""}, "the environment's WORLD_SIZE='' must be an integer from 1"),
        ({"WORLD_SIZE": "2"}, "the environment has WORLD_SIZE=2 and no RANK: let torchrun or srun start the ranks, or"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "the environment's RANK='2' must be an integer from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "abc"}, "the environment's MASTER_PORT='abc' must be"),
    ],
)
def test_an_environment_that_fits_no_launch(environment, message, monkeypatch, capsys):
    monkeypatch.setattr(command.time, "sleep", lambda seconds: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run(monkeypatch, lambda *job: None) == 1
    assert message in capsys.readouterr().err


def test_a_defect_of_the_program_keeps_its_traceback(monkeypatch, capsys):
    def job(*_):
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        run(monkeypatch, job)


def test_a_sweep_is_the_product_and_a_failed_job_does_not_stop_it(tmp_path, monkeypatch, capsys):
    seen = []

    def job(plan):
        seen.append((plan.choices["grad"], plan.config["k"], plan.config["lam"]))
        if plan.config["k"] == 1:
            raise DivergenceError(f"diverged with {plan.choices['grad']}")

    assert run(monkeypatch, job, "-m", "grad=upg,npg", "k=1,3", "lam=0.5", f"runs={tmp_path}") == 1
    assert seen == [(grad, k, 0.5) for grad in ("upg", "npg") for k in (1, 3)]
    assert capsys.readouterr().err.splitlines() == ["error: diverged with upg", "error: diverged with npg"]


def test_a_sweep_whose_file_cannot_be_written_shows_its_table(tmp_path, monkeypatch, capsys):
    def fails(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def job(plan):
        raise DivergenceError("diverged")

    monkeypatch.setattr("phantom.engine.artifacts.records.write_json", fails)
    assert run(monkeypatch, job, "-m", "k=1,3", f"runs={tmp_path}") == 1
    shown = capsys.readouterr()
    assert "failed: 2\n  k=1: diverged\n  k=3: diverged" in shown.out
    assert re.search(r"^error: \S+sweep\.json: No space left on device\. Free some space", shown.err, re.M)


def test_null_is_the_same_on_the_command_line_and_in_the_record(tmp_path, monkeypatch):
    seen = []
    job = ["experiment=table1/implicit", "pretraining=null", f"runs={tmp_path}"]
    assert run(monkeypatch, seen.append, *job) == 0
    (made,) = seen
    assert list(made.overrides) == job and made.config == plan(job).config and made.config["pretraining"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "grad=upg,implicit", "k=1,3"], "k is not used"),
        (["-m", "k=1,0"], "k=0 must be"),
        (["-m", "grad=upg,ugp"], "did you mean upg?"),
        (["grad=upg,npg"], "add -m"),
        (["-m", "clipping=null,total"], "run clipping=null on its own"),
        (["grad"], "key=value"),
    ],
)
def test_no_job_of_a_sweep_starts_before_all_are_checked(arguments, message, tmp_path, monkeypatch, capsys):
    started = []
    assert run(monkeypatch, lambda *job: started.append(job), *arguments, f"runs={tmp_path}") == 1
    assert message in capsys.readouterr().err and not started


def test_a_sweep_of_many_processes_is_refused_before_a_job_runs(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run(monkeypatch, seen.append, "-m", "seed=0,1", f"runs={tmp_path}") == 1
    assert seen == []
    assert "error: -m starts one run after the other" in capsys.readouterr().err


def test_one_of_many_processes_ends_at_its_error(tmp_path, monkeypatch, capsys):
    """The others wait for it in a collective."""
    seen = []

    def job(plan):
        seen.append(plan.config["seed"])
        raise DataError("damaged")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run(monkeypatch, job, "seed=1", f"runs={tmp_path}") == 1
    assert seen == [1]
    assert "error: damaged" in capsys.readouterr().err


def script(
    folder: Path, *arguments: str, processes: int = 1, timeout: int = 120, program: str = "train.py"
) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / program), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "grad=upg,npg", "k=0,1"], "k=0 must be an integer >= 1"),
        (["data=cifar10", "data.root=nowhere", "wandb=disabled"], "no CIFAR-10 in nowhere, which does not exist"),
    ],
)
def test_train_script_prints_one_line_and_leaves_nothing(arguments, message, tmp_path):
    done = script(tmp_path, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_picture_damaged_for_one_of_two_processes_ends_both(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for name in ("n01", "n02"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), (40 * i, 0, 0)).save(folder / f"{i}.JPEG")
    broken = tmp_path / "train" / "n01" / "3.JPEG"
    broken.write_bytes(broken.read_bytes()[:100])
    job = ["data=imagenet", f"data.root={tmp_path}", "data.workers=0", "data.batch_size=8"]
    small = ["data.crop=16", "data.resize=20", "model.channels=[8,8]", "model.final_channels=8", "solver.max_steps=2"]
    done = script(tmp_path, *job, *small, f"runs={tmp_path / 'runs'}", "wandb=disabled", "device=cpu", processes=2)
    assert done.returncode != 0
    assert done.stderr.count(f"error: the picture {broken} is damaged and cannot be decoded") == 1
    assert not list(tmp_path.rglob("record.json"))


NAMES = ["my runs", "l\u00e4ufe (neu)", "\u65e5\u672c", "a=b", "100", "it's", 'so "so"', "c\\", "50%", "[x]"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_taken_as_it_is_typed(name, tmp_path, monkeypatch):
    seen = []
    assert run(monkeypatch, seen.append, f"runs={tmp_path / name}", f"data.root={name}", "data=cifar10") == 0
    (made,) = seen
    assert made.root == tmp_path / name and made.root.is_dir() and made.config["data"]["root"] == name
    assert plan([f'runs="{tmp_path}/a,b"']).root == tmp_path / "a,b", "quotes of the user's own"
    assert plan(["data=cifar10", "data.root=null"]).config["data"]["root"] is None


@pytest.mark.parametrize(
    ("item", "quoted"),
    [
        ("runs=a,b", 'runs="a,b"'),
        ("wandb_project=l\u00e4ufe", 'wandb_project="l\u00e4ufe"'),
        ("data.name=a(b", 'data.name="a(b"'),
    ],
)
def test_a_value_that_needs_quotes_is_shown_in_them(item, quoted):
    with pytest.raises(ConfigError) as refused:
        plan([item])
    assert quoted in str(refused.value)


def test_a_folder_of_any_name_holds_a_whole_run(tmp_path, monkeypatch, capsys):
    runs = tmp_path / "l\u00e4ufe (neu), 2"
    record = tiny_run(tmp_path / "plain", "steps=1")
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "steps=1", f'runs="{runs}"'])
    command.run(train.job, CONFIGS)
    (found,) = runs.rglob("record.json")
    assert found.parent.relative_to(runs) == record["path"].relative_to(tmp_path / "plain")
    capsys.readouterr()
    evaluate.main([f"run={found.parent}"])
    assert json.loads(capsys.readouterr().out)["loss"] == record["final"]["test"]["loss"]


def test_a_finished_run_is_found_under_a_locale_without_its_letters(tmp_path, monkeypatch):
    runs = tmp_path / "l\u00e4ufe"
    tiny_run(runs, "steps=1")
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    done = script(tmp_path, *TINY, "steps=1", f"runs={runs}")
    assert done.returncode == 0 and "this run is finished" in done.stdout, done.stderr


@pytest.mark.slow  # half a minute; test_slurm.py has two processes in every suite
def test_two_processes_evaluate_and_print_once(tmp_path):
    record = tiny_run(tmp_path, "steps=1", "test_subset=9")
    done = script(tmp_path, f"run={record['path']}", processes=2, program="evaluate.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["accuracy"] == record["final"]["test"]["accuracy"]
    assert found["loss"] == pytest.approx(record["final"]["test"]["loss"], rel=1e-6)
    refused = script(tmp_path, f"run={tmp_path / 'nowhere'}", processes=2, program="evaluate.py")
    assert refused.returncode != 0 and refused.stderr.count("there is no run folder") == 1


@pytest.mark.parametrize("key", ["compile", "solver.compile"])
def test_a_machine_without_a_compiler_is_one_line(key, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-g++"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "empty"))
    done = script(tmp_path, *TINY, f"{key}=true", f"runs={tmp_path / 'runs'}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {key}=true needs a C++ compiler") and f"leave {key}=false" in done.stderr
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--run k=3", "--run"),
        ("-r", "-r"),
        ("--config-dir=elsewhere grad=mine", "--config-dir"),
        ("-cd elsewhere", "-cd"),
        ("--config-name=other", "--config-name"),
        ("--experimental-rerun=config.pickle", "--experimental-rerun"),
        ("--epochs=3", "--epochs"),
        ("-m --run k=1,2", "--run"),
        ("-m --info k=1,2", "--info -m"),
        ("--resolve", "--resolve"),
        ("--info --package=optimizer", "--info --package"),
    ],
)
def test_flags_that_would_do_nothing_are_refused_before_any_work(flags, named, monkeypatch, capsys, tmp_path):
    for name in ("make_plan", "_start_hydra"):
        monkeypatch.setattr(command, name, lambda *_: pytest.fail("no work is to be done"))
    assert run(monkeypatch, lambda plan: pytest.fail("no job is to run"), *flags.split()) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"error: {named} is not understood here: write settings as key=value, ")
    assert "configs/<group>/" in said and len(said.splitlines()) == 1 and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--info searchpath", str(CONFIGS.folder)),
        ("--cfg hydra --package hydra.launcher", "BasicLauncher"),
        ("-sc install=bash", "hydra_bash_completion"),
        ("--cfg job --resolve k=3", "\n  k: 3\n"),
        ("--hydra-help", "--cfg hydra"),
    ],
)
def test_flags_that_show_something_do(flags, expected, monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, lambda plan: pytest.fail("no job is to run"), *flags.split()) == 0
    assert expected in capsys.readouterr().out and not any(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [[], ["-m"]], ids=["one run", "a sweep"])
def test_keys_of_hydra_go_to_hydra(flags, monkeypatch, tmp_path):
    seen = []
    line = [*flags, "hydra/launcher=basic", "hydra.job.name=mine", "k=3", "lam=1e-1", f"runs={tmp_path}"]
    assert run(monkeypatch, seen.append, *line) == 0
    (made,) = seen
    assert made.overrides == ("k=3", "lam=1e-1", f"runs={tmp_path}") and bool(made.group) == bool(flags)


def test_a_path_is_meant_from_where_the_sweep_was_started(monkeypatch, tmp_path):
    seen = []
    line = ["-m", "hydra/launcher=basic", "hydra.job.chdir=true", "k=3", "runs=here"]
    assert run(monkeypatch, lambda plan: seen.append(plan.root), *line) == 0
    assert seen == [tmp_path / "here"]
