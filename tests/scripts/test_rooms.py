"""Who may do what under scripts/: reporting renders without torch, running and bench write numbers."""

import ast
import re
import subprocess
import sys

import pytest

from scripts import studies
from scripts.running.study import rows_of
from tests.phantom.test_import_law import PYTHON, ROOT, imports, roots

SCRIPTS = [path for path in PYTHON if path.startswith("scripts/")]
REPORTING = [path for path in SCRIPTS if path.startswith("scripts/reporting/")]
COMMANDS = [path for path in SCRIPTS if path.count("/") == 1]
WRITES = {"write_text", "write_bytes", "savefig", "write_json", "dump", "to_csv", "writelines"}
RENDERED = (".md", ".png", ".html", ".pdf", ".svg", ".csv", ".tex")


def nodes(path: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse((ROOT / path).read_text(), path)))


def texts(path: str) -> list[str]:
    """Return the string constants of a file, those inside f-strings included, and docstrings left out."""
    found = nodes(path)
    lone = {id(node.value) for node in found if isinstance(node, ast.Expr)}
    strings = [node for node in found if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.value for node in strings if id(node) not in lone]


def called(path: str) -> set[str]:
    """Return the last names of what a file calls."""
    functions = [node.func for node in nodes(path) if isinstance(node, ast.Call)]
    return {getattr(function, "attr", getattr(function, "id", "")) for function in functions}


def test_the_rooms_are_found():
    assert {"scripts/report.py", "scripts/reproduce.py", "scripts/benchmark.py"} <= set(COMMANDS)
    assert {"scripts/reporting/markdown.py", "scripts/reporting/tables.py"} <= set(REPORTING)
    assert "write_text" in called("scripts/reporting/pages.py") and ".md" in texts("scripts/reporting/pages.py")


@pytest.mark.parametrize("path", REPORTING)
def test_reporting_knows_the_studies_and_no_torch(path):
    drawing = {"jinja2", "markdown_it", "plotly"} if path.startswith("scripts/reporting/html/") else {"matplotlib"}
    drawing = {"wandb_workspaces"} if path == "scripts/reporting/dashboard.py" else drawing
    assert roots(imports(path)) <= {"scripts", "yaml", *drawing}
    known = {name for name in imports(path) if name.startswith("scripts.")}
    assert all(name.startswith(("scripts.reporting", "scripts.studies", "scripts.logged")) for name in known)


def test_rendering_loads_no_torch():
    code = "import sys; from scripts.reporting import pages; from scripts import report, studies;"
    code += "[pages.of(studies.load(name)) for name in studies.names()];"
    code += "print('torch' in sys.modules, 'phantom' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_only_reporting_writes_pages():
    for path in PYTHON:
        if not path.startswith(("tests/", "scripts/reporting/", "data/")):  # data/ reads images
            assert "savefig" not in called(path), path
            assert not [text for text in texts(path) if text.endswith(RENDERED) and " " not in text], path


def test_only_markdown_py_writes_tables():
    for path in SCRIPTS:
        if path != "scripts/reporting/markdown.py":
            assert not [text for text in texts(path) if re.search(r"^ ?\| | \| ?$|---", text)], path


@pytest.mark.parametrize("path", SCRIPTS)
def test_only_running_and_bench_write_numbers(path):
    if path.startswith("scripts/reporting/"):
        assert not called(path) & {"write_json", "dump", "dumps"}, "a renderer only reads records"
    elif not path.startswith(("scripts/running/", "scripts/bench/", "scripts/drilling/")):  # the last breaks files
        assert not called(path) & (WRITES | {"open"}), "commands are thin"


def test_runs_are_planned_in_one_place():
    """`scripts.running.process.plan` composes; the benchmark builds its own variants, and its own sources."""
    engine = ("phantom.engine.build", "phantom.engine.command", "phantom.engine.plan")
    for path in SCRIPTS:
        used = {name for name in imports(path) if name in engine}
        assert not used or path in (
            "scripts/running/process.py",
            "scripts/bench/variants.py",
            "scripts/bench/pipeline.py",
        ), path


def test_nothing_bends_the_import_path():
    for path in PYTHON:
        found = [node for node in nodes(path) if isinstance(node, ast.Attribute) and node.attr == "path"]
        assert not [node for node in found if getattr(node.value, "id", "") == "sys"], path
        lines = (ROOT / path).read_text().splitlines()
        assert not [line for line in lines if re.search(r"# noqa\b.*\bE402", line)], f"{path}: imports stand at the top"


@pytest.mark.parametrize("name", studies.names())
def test_a_study_is_one_of_the_known_kinds(name):
    study = studies.load(name)
    assert (
        {"title"}
        < set(study) - {"name", "folder"}
        <= {*("title", "tables", "grids", "figure", "measures", "benchmark", "explore")}
    )
    parts = [*study.get("tables", {}).values(), *([study["figure"]] if "figure" in study else [])]
    rows = [row for part in parts for row in part.get("rows", part.get("lines"))]
    points = [name for grid in study.get("grids", {}).values() for name in grid["experiments"]]
    assert len(rows_of(study)) == len(rows) + len(points) + len(study.get("measures", ())), "two rows have one name"


@pytest.mark.parametrize("path", [path for path in COMMANDS if "__main__" in (ROOT / path).read_text()])
def test_a_command_that_cannot_import_says_what_to_do(path):
    # without site-packages, as on a machine where nothing is set up
    done = subprocess.run([sys.executable, "-S", "-E", path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: No module named ") and "bash scripts/setup.sh" in done.stderr
