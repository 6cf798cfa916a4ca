"""What the README and the pages of docs/ show is run, composed or looked for as it is printed."""

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
from phantom import Broyden
from phantom.engine.config.overrides import change, expand
from scripts import benchmark, explore, reproduce, studies
from scripts.arguments import split
from scripts.running import process
from scripts.running import study as running
from tests.plans import plan
from train import CONFIGS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
# docs/extending.md has a test of its own
METHOD = ("start", "choosing", "method", "failures", "migration", "data", "results")
RUNNING = ("runs", "scaling", "survival", "campaign", "reasoners")
NAMES = ("README.md", *(f"docs/{name}.md" for name in (*METHOD, *RUNNING)))
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(TEXT)
EXAMPLES = [body for language, body in BLOCKS if language == "python"]
ELSEWHERE = ("hydra/launcher=", "hydra.launcher.")  # a plugin that starts jobs
TRAIN = ("python train.py", "bash scripts/run.sh", "torchrun")


def commands() -> list[str]:
    """Return the command lines of all blocks, comments left out and continued lines joined."""
    blocks = [block for page in PAGES.values() for block in BLOCK.findall(page)]
    lines = [line for language, body in blocks if not language for line in body.replace("\\\n", " ").splitlines()]
    return [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]


def items(command: str) -> list[str]:
    """Return what follows the script's name."""
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")))
    return words[script + 1 :]


TRAINING = [line for line in commands() if line.startswith(TRAIN)]
EVALUATING = [line for line in commands() if line.startswith("python evaluate.py")]


def test_the_blocks_are_found():
    assert len(EXAMPLES) == 1 and len(TRAINING) >= 10 and len(EVALUATING) >= 2
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
    words = [word for word in items(command) if word != "-m" and not word.startswith(ELSEWHERE)]
    jobs = expand(words) if "-m" in items(command) else [words]
    for job in (jobs[0], jobs[-1]):
        config = plan(job).config
        assert config["epochs"] >= 1


@pytest.mark.parametrize("command", EVALUATING)
def test_evaluation_lines_fit_a_run(command):
    named, overrides = evaluate.split_arguments(items(command))
    if "weights" in named:
        assert named["weights"] in evaluate.shipped_names() and not overrides
        return
    assert "run" in named and named.get("checkpoint", "last") in ("last", "best")
    of_puzzles = any("supervision" in item for item in overrides)
    config = plan(["model=reasoner_eqr", "data=sudoku"] if of_puzzles else ["experiment=language/pydocs"]).config
    for job in expand(overrides):
        changed = change(config, job, CONFIGS)
        assert of_puzzles or changed["eval_solver"]["max_steps"] in (5, 10, 30, 40)


def test_lines_of_scripts_name_scripts_and_tables(monkeypatch, capsys):
    lines = [shlex.split(line) for line in commands() if line.startswith("python scripts/")]
    assert len(lines) >= 3 and all((ROOT / line[1]).is_file() for line in lines)
    monkeypatch.setattr(process, "train", lambda *_, **__: pytest.fail("nothing is to be run"))
    monkeypatch.setattr(benchmark.suite, "run", lambda study, rows, **_: [] if rows else pytest.fail("no row"))
    monkeypatch.setattr(benchmark.pages, "write", lambda study: None)
    listed = set()
    for _, script, *items in (line[: line.index(">")] if ">" in line else line for line in lines):
        if script.endswith("reproduce.py"):
            # one study for `all`, and its first row alone: all take minutes to compose
            name, *others = ["table1" if item == "all" else item for item in items if item != "list"]
            row = next(iter(running.rows_of(studies.load(name))))
            whole = any(item.startswith("rows=") or item in studies.names() for item in others)
            rows = [] if whole else [f"rows={row}"]
            listed.add((name, *others, *rows, "list"))
        elif script.endswith("report.py"):
            assert set(items) <= {*studies.names(), "html", "runs=runs"}
        elif script.endswith("explore.py"):
            _, _, others = split(items, doc="", own=explore.OWN)
            assert explore.explore.estimators(explore.explore.split(others)[0], 0.5, Broyden())
        elif "suite" in items:
            benchmark.main(items)
        elif script.endswith("benchmark.py"):
            own, _, overrides = split(items, doc="", own=benchmark.OWN, words=benchmark.WORDS)
            benchmark.read(own)
            assert expand(overrides)
    for items in sorted(listed):
        reproduce.main(items)
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
    code = {Path(path).parts[0] for path in kept if path.endswith((".py", ".yaml")) and path[0] != "."}
    assert code <= shown, f"the tree leaves out {code - shown}"


def test_the_two_commands_are_scripts_that_parse():
    for name in ("run", "test", "docs"):
        assert f"bash scripts/{name}.sh" in TEXT
        subprocess.run(["bash", "-n", str(ROOT / "scripts" / f"{name}.sh")], check=True)


@pytest.mark.parametrize("page", [*PAGES, "docs/index.md", "docs/extending.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_paths_and_links_lead_somewhere(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    named = re.findall(r"`((?:phantom|configs|models|data|scripts|results|tests|docs)/[\w./*]+)`", text)
    # the leaves of the examples are for the reader to write
    written = re.findall(r"^`([\w./]+)`\n\n```", text, flags=re.MULTILINE)
    assert not [path for path in named if path not in written and not list(ROOT.glob(path))]
    for link in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            assert (folder / path).exists(), link
            headings = re.findall(r"^#+ (.*)$", (folder / path).read_text(), re.MULTILINE) if anchor else []
            assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], link


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of every row of the tables of a page."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in rows if not set("".join(row)) <= set(":- ")]


def test_the_results_are_those_of_the_rendered_pages():
    pages = [ROOT / "results" / name for name in ("table1/table.md", "table4/graphs.md")]
    rendered = [row for page in pages for row in rows_of(page.read_text())]
    shown = [row for row in rows_of(TEXT) if re.fullmatch(r"[0-9a-f]{8}\*?", row[-1])]
    assert len(shown) >= 5
    for _, here, paper, count, commit in shown:
        number = count.split()[0]
        fits = [row for row in rendered if row[-1] == commit and row[1] == paper]
        assert any(here in row or f"{here} ({number})" in row for row in fits), (here, paper, commit)
        assert any(number in row or f"{here} ({number})" in row for row in fits), (here, number)


def test_the_estimators_are_compared_as_the_rendered_pages_have_it():
    digits, cifar = (
        {row[0]: row for row in rows_of((ROOT / f"results/explore/{name}.md").read_text()) if len(row) > 5}
        for name in ("mdeq_tiny_digits", "mdeq_tiny_epoch35")
    )
    broyden = "grad=implicit adjoint_solver=broyden adjoint_solver.max_steps=22"
    names = {
        "UPG": ("grad=upg k=5 lam=0.5", "UPG k=5 lam=0.5"),
        "NPG": ("grad=npg k=5 lam=0.5", "NPG k=5 lam=0.5"),
        "Implicit": (broyden, "implicit, 22 Broyden steps"),
        "OneStep": ("grad=one_step", "one step"),
        "SHINE": ("grad=shine", "SHINE"),
    }
    rendered = {short: (digits[one][4], cifar[two][4], digits[one][3]) for short, (one, two) in names.items()}
    shown = {match.group(1): tuple(row[2:]) for row in rows_of(TEXT) if (match := re.match(r"`(\w+)\(", row[0]))}
    assert shown.pop("BPTT") == ("", "", "") and shown == rendered


def test_every_data_set_and_its_folder_are_on_the_page_of_data():
    rows = {row[0].strip("`"): row[1].strip("`") for row in rows_of(PAGES["docs/data.md"])}
    for leaf in CONFIGS.leaves("data"):
        named = re.search(r"\$PHANTOM_DATA/(\w+)", (CONFIGS.folder / "data" / f"{leaf}.yaml").read_text())
        assert rows[leaf] == (named.group(1) if named else ""), leaf


def test_the_estimators_of_the_table_exist_with_those_arguments():
    text = TEXT + PAGES["docs/method.md"] + PAGES["docs/choosing.md"]
    rows = re.findall(r"^\| (?:one step: )?`(\w+)\((.*?)\)`", text, flags=re.MULTILINE)
    assert len(rows) >= 14
    for name, arguments in rows:
        known = inspect.signature(getattr(phantom, name)).parameters
        assert {part.split("=")[0] for part in arguments.split(", ") if part} <= set(known)
