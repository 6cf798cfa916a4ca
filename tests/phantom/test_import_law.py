"""Who may import whom, read from the source: arrows point one way, and `import phantom` is torch alone."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 400
COUNTED = (".py", ".yaml", ".yml", ".sh", ".md", ".toml", ".cff")
HYDRA = {"hydra", "omegaconf"}
HEAVY = HYDRA | {"torchvision", "wandb", "datasets", "sklearn", "scipy", "pandas", "matplotlib", "torch_geometric"}


def files(*suffixes: str) -> list[str]:
    """Return the repository's own files, as paths relative to its root."""
    inside = ("configs", "data", "models", "phantom", "scripts", "tests", ".ci", "results")
    found = [p for p in ROOT.iterdir() if p.is_file()] + [p for folder in inside for p in (ROOT / folder).rglob("*")]
    paths = [p for p in found if p.suffix in suffixes and p.is_file() and "__pycache__" not in p.parts]
    return sorted(p.relative_to(ROOT).as_posix() for p in paths)


def imports(path: str, *, top_level: bool = False) -> set[str]:
    """Return the full names of the modules that a file imports, inside functions too unless `top_level`."""
    tree = ast.parse((ROOT / path).read_text(), path)
    names = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from phantom import engine` names a module too
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


PYTHON = files(".py")
METHOD = [p for p in PYTHON if p.startswith("phantom/") and not p.startswith("phantom/engine/")]
ENGINE = [p for p in PYTHON if p.startswith("phantom/engine/")]
MODELS = [p for p in PYTHON if p.startswith("models/")]
DATA = [p for p in PYTHON if p.startswith("data/")]


def test_the_files_are_found():
    assert {"phantom/solve.py", "phantom/gradient/adjoint.py"} <= set(METHOD) and MODELS and DATA and ENGINE
    assert imports("phantom/solve.py") >= {"torch", "phantom.solver.base", "phantom.solver.base.Solver"}


@pytest.mark.parametrize("path", METHOD)
def test_the_method_imports_torch_alone(path):
    """Triton comes with torch where there is one; its kernels have a file of their own, which is imported on demand."""
    kernels = "phantom/solver/kernels.py"
    assert roots(imports(path)) <= {"torch", "phantom"} | ({"triton"} if path == kernels else set())
    assert "phantom.solver.kernels" not in imports(path, top_level=True)
    assert not any(within(name, "phantom.engine") for name in imports(path))


@pytest.mark.parametrize("path", MODELS)
def test_models_import_torch_and_the_method(path):
    kernels = {"triton"} if path.startswith("models/mdeq") else set()
    assert roots(imports(path)) <= {"torch", "phantom", "models"} | kernels
    assert not any(within(name, "phantom.engine") for name in imports(path))


# the engine's contract with data, and the checks of arguments
KNOWN_TO_DATA = {
    *("phantom.engine.source", "phantom.engine.errors", "phantom.validate"),
    *(f"phantom.engine.errors.{name}" for name in ("DataError", "first_line")),
    *(f"phantom.engine.source.{name}" for name in ("Source", "Spec", "Shard", "share")),
    *(
        f"phantom.validate.{name}"
        for name in ("check_count", "check_counts", "check_number", "check_choice", "check_flag")
    ),
}


@pytest.mark.parametrize("path", DATA)
def test_data_knows_no_model_and_no_method(path):
    assert not roots(imports(path)) & ({"models"} | HYDRA)
    assert {name for name in imports(path) if within(name, "phantom")} <= KNOWN_TO_DATA
    assert not roots(imports(path, top_level=True)) & HEAVY, "import heavy packages inside functions"


@pytest.mark.parametrize("path", METHOD + ENGINE)
def test_the_package_imports_nothing_else_of_the_repository(path):
    own = {entry.stem for entry in ROOT.iterdir() if entry.is_dir() or entry.suffix == ".py"} - {"phantom"}
    assert not roots(imports(path)) & own, (
        "the package names what it needs by _target_ strings, or takes it as argument"
    )


@pytest.mark.parametrize("path", ENGINE)
def test_hydra_stays_where_configs_are_read(path):
    if not path.startswith(("phantom/engine/config/", "phantom/engine/command.py")):
        assert not roots(imports(path)) & HYDRA


@pytest.mark.parametrize("path", PYTHON)
def test_nothing_imports_the_entry_points_or_the_tests(path):
    found = roots(imports(path))
    assert not found & {"train", "evaluate"} or path.startswith(("tests/", "scripts/", "evaluate.py"))
    assert "tests" not in found or path.startswith("tests/")


def loaded_by(statement: str) -> set[str]:
    """Return the modules that a fresh interpreter has after `statement`, and had not after `import torch`."""
    code = f"import sys, torch; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("package", ["phantom", "models"])
def test_importing_loads_torch_alone(package):
    loaded = {name.split(".")[0] for name in loaded_by(f"import {package}")} - set(sys.stdlib_module_names)
    assert package in loaded
    assert not loaded & (HEAVY | ({"data"} if package == "models" else {"data", "models"}))
    if package == "phantom":
        assert {name for name in loaded_by("import phantom") if within(name, "phantom.engine")} == set()


def test_importing_data_is_cheap():
    assert not {name.split(".")[0] for name in loaded_by("import data")} & (HEAVY | {"phantom", "models"})


@pytest.mark.parametrize("path", files(*COUNTED))
def test_no_file_is_long(path):
    assert len((ROOT / path).read_text().splitlines()) <= MOST_LINES
