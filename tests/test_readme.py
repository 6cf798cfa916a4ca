"""What the README shows is run, composed or looked for as it is printed."""

import contextlib
import inspect
import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

import evaluate
import phantom
from phantom.engine.config.overrides import change, expand
from phantom.gradient.adjoint import AdjointEstimator
from phantom.solve import solve
from scripts import benchmark, reproduce, studies
from scripts.arguments import split
from scripts.running import process
from tests.plans import plan
from train import CONFIGS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
EXAMPLES = [body for language, body in BLOCKS if language == "python"]
TRAIN = ("python train.py", "bash scripts/run.sh", "torchrun")


def commands() -> list[str]:
    """Return the command lines of all blocks, comments left out and continued lines joined."""
    lines = [line for language, body in BLOCKS if not language for line in body.replace("\\\n", " ").splitlines()]
    return [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]


def items(command: str) -> list[str]:
    """Return what follows the script's name."""
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")))
    return words[script + 1 :]


TRAINING = [line for line in commands() if line.startswith(TRAIN)]
EVALUATING = [line for line in commands() if line.startswith("python evaluate.py")]


def test_the_blocks_are_found():
    assert len(EXAMPLES) >= 2 and len(TRAINING) >= 10 and len(EVALUATING) >= 2
    assert any("-m grad=upg,npg" in line for line in TRAINING)


def test_the_first_example():
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(EXAMPLES[0], names)
    lines = [line.split() for line in printed.getvalue().splitlines()]
    assert [line[0] for line in lines] == ["UPG", "Implicit"] and len(EXAMPLES[0].splitlines()) <= 16
    W = names["W"].detach().double().requires_grad_()
    z = torch.zeros(8, 16, dtype=torch.float64)
    for _ in range(200):
        z = torch.tanh(z @ W.T + names["x"].double())
    (exact,) = torch.autograd.grad(z.square().sum(), W)
    assert float(lines[1][-1]) == pytest.approx(float(exact.norm()), rel=1e-4)
    assert float(lines[0][-1]) != pytest.approx(float(exact.norm()), rel=1e-4), (
        "a phantom gradient is not the exact one"
    )


@pytest.mark.parametrize("command", TRAINING)
def test_training_lines_compose(command):
    words = [word for word in items(command) if word != "-m"]
    jobs = expand(words)
    assert len(jobs) == 1 or "-m" in command
    for job in (jobs[0], jobs[-1]):
        config = plan(job).config
        assert config["epochs"] >= 1


@pytest.mark.parametrize("command", EVALUATING)
def test_evaluation_lines_fit_a_run(command):
    named, overrides = evaluate.split_arguments(items(command))
    assert "run" in named and named.get("checkpoint", "last") in ("last", "best")
    for job in expand(overrides):
        config = plan(["experiment=language/pydocs"]).config
        assert change(config, job, CONFIGS)["eval_solver"]["max_steps"] in (5, 10, 30, 40)


def test_lines_of_scripts_name_scripts_and_tables(monkeypatch, capsys):
    lines = [shlex.split(line) for line in commands() if line.startswith("python scripts/")]
    assert len(lines) >= 3 and all((ROOT / line[1]).is_file() for line in lines)
    monkeypatch.setattr(process, "train", lambda *_, **__: pytest.fail("nothing is to be run"))
    monkeypatch.setattr(benchmark.suite, "run", lambda study, rows, **_: [] if rows else pytest.fail("no row"))
    monkeypatch.setattr(benchmark.pages, "write", lambda study: None)
    for _, script, *items in lines:
        if script.endswith("reproduce.py"):
            reproduce.main([*items, *([] if "list" in items else ["list"])])
        elif script.endswith("report.py"):
            assert set(items) <= set(studies.names())
        elif "suite" in items:
            benchmark.main(items)
        else:
            own, _, overrides = split(items, doc="", own=benchmark.OWN)
            benchmark.read(own)
            assert expand(overrides)
    assert len(capsys.readouterr().out.splitlines()) > 10


def test_the_tree():
    (tree,) = [body for language, body in BLOCKS if not language and body.startswith("configs/")]
    folder, found = "", []
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith("  ") else (name if name.endswith("/") else "")
        found.append(folder + name if line.startswith("  ") else name)
    missing = [path for path in found if not (ROOT / path).exists()]
    assert not missing and {"phantom/solve.py", "phantom/gradient/", "train.py", "tests/"} <= set(found)
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    shown = {path.rstrip("/") for path in found}
    code = {Path(path).parts[0] for path in kept if path.endswith((".py", ".yaml"))}
    assert code <= shown, f"the tree leaves out {code - shown}"


def test_the_two_commands_are_scripts_that_parse():
    for name in ("run", "test"):
        assert f"bash scripts/{name}.sh" in TEXT
        subprocess.run(["bash", "-n", str(ROOT / "scripts" / f"{name}.sh")], check=True)


def test_paths_in_the_text_exist():
    named = re.findall(r"`((?:phantom|configs|models|data|scripts|results)/[\w./*]+)`", TEXT)
    assert len(named) >= 5
    # the leaf of the example is for the reader to write
    missing = [path for path in named if path != "configs/solver/overrelaxed.yaml" and not list(ROOT.glob(path))]
    assert not missing


def test_the_solver_of_the_reader_solves():
    names = {}
    exec(next(example for example in EXAMPLES if "class Overrelaxed" in example), names)
    generator = torch.Generator().manual_seed(0)
    A = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0] * 0.6
    b = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - A, b.T).T
    for omega in (1.0, 0.8):
        solver = names["Overrelaxed"](omega=omega, max_steps=300, tol=1e-12)
        value, stats, _ = solve(lambda z: z @ A.T + b, torch.zeros_like(b), solver)
        assert bool(stats.converged.all()) and torch.allclose(value, exact, rtol=0, atol=1e-10)


def test_the_method_of_an_estimator_is_called_as_written():
    (written,) = re.findall(r"`cotangent\((.*?)\)`", TEXT)
    assert written.split(", ") == list(inspect.signature(AdjointEstimator.cotangent).parameters)[1:]


def test_the_estimators_of_the_table_exist_with_those_arguments():
    rows = re.findall(r"^\| (?:one step: )?`(\w+)\((.*?)\)`", TEXT, flags=re.MULTILINE)
    assert len(rows) >= 5
    for name, arguments in rows:
        known = inspect.signature(getattr(phantom, name)).parameters
        assert {part.split("=")[0] for part in arguments.split(", ") if part} <= set(known)
