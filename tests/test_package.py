"""The package: its requirements are written once and complete, and the wheel works without this repository."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# the repository's own names, and how they are imported from an installed wheel: not at all
OWN = ("models", "data", "scripts", "tests", "train", "evaluate")
DISTRIBUTIONS = packages_distributions()


def parsed(lines: list[str]) -> dict[str, str]:
    """Return the versions that requirement lines ask for, by name."""
    found = [Requirement(line) for line in lines]
    return {normal(requirement.name): str(requirement.specifier) for requirement in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def third_party(folder: str) -> dict[str, set[str]]:
    """Return the distributions whose modules a folder's files import, with the files."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for root in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names):
                for distribution in DISTRIBUTIONS.get(root, []) if root not in (*OWN, "phantom") else []:
                    found.setdefault(normal(distribution), set()).add(path.relative_to(ROOT).as_posix())
    return found


def test_requirements_txt_says_what_pyproject_says():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    without = ("dashboard", "slurm", "dev", "docs")
    listed = [line for extra, names in EXTRAS.items() if extra not in without for line in names]
    assert parsed(lines) == parsed([*PROJECT["dependencies"], *listed]) and len(parsed(lines)) == len(lines)
    assert set(EXTRAS) == {"train", "report", "dashboard", "graphs", "text", "images", "slurm", "test", "dev", "docs"}


@pytest.mark.parametrize("extra", ["text", "images"])
def test_no_version_of_datasets_runs_scripts_of_a_data_set(extra):
    """Before 4, a folder or a set of the hub may hold a loading script, which 2.19 runs without asking."""
    (found,) = [one for one in map(Requirement, EXTRAS[extra]) if one.name == "datasets"]
    assert not any(version in found.specifier for version in ("2.19.2", "3.6.0")) and "4.0.0" in found.specifier


def test_torch_geometric_reads_ppi_beside_every_networkx():
    """Up to 2.6 it leaves a name of the file's format to networkx, and networkx 3.6 has another one for it."""
    (found,) = [one for one in map(Requirement, EXTRAS["graphs"]) if one.name == "torch_geometric"]
    assert "2.6.1" not in found.specifier and "2.7.0" in found.specifier


def test_the_workflow_is_the_test_script_with_the_oldest_and_the_newest_torch():
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]
    assert jobs["test"]["steps"][-1] == {"run": "bash scripts/test.sh"}
    assert jobs["docs"]["steps"][-1] == {"run": "bash scripts/docs.sh"}
    (torch,) = [Requirement(line) for line in PROJECT["dependencies"]]
    asked = [Requirement(entry["torch"]) for entry in jobs["test"]["strategy"]["matrix"]["include"]]
    (oldest,) = [str(asks.specifier) for asks in asked if asks != torch]
    assert torch in asked and str(torch.specifier) == oldest.replace("==", ">=").removesuffix(".*")
    pythons = [entry["python"] for entry in jobs["test"]["strategy"]["matrix"]["include"]]
    assert PROJECT["requires-python"] == f">={pythons[0]}"


def test_the_hooks_are_those_of_the_test_script():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = [hook["entry"] for hook in hooks]
    script = (ROOT / "scripts/test.sh").read_text()
    for tool in (".venv/bin/ruff check", ".venv/bin/ruff format", ".venv/bin/python -m pytest -q"):
        assert tool in script and any(entry.startswith(tool) for entry in entries)
    named = [word for entry in entries for word in entry.split() if word.startswith("tests/")]
    assert named and all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("phantom", ["train"]),
        ("models", ["graphs"]),
        ("data", ["train", "graphs", "text", "images"]),
        ("scripts", ["train", "report", "dashboard"]),
    ],
)
def test_every_import_is_listed(folder, extras):
    listed = parsed([*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])])
    found = third_party(folder)
    assert "torch" in found
    listed = {*listed, "triton"}  # comes with torch where there is one, and is imported where it is used
    unlisted = {name: sorted(files) for name, files in found.items() if name not in listed}
    assert not unlisted, f"add them to one of the extras {extras} in pyproject.toml, and to requirements.txt"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """Build the wheel of this checkout, unpack it in an empty folder, and return the folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source, wheels, site = folder / "source", folder / "wheels", folder / "site"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "phantom", source / "phantom", ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_the_wheel_has_every_module(unpacked):
    def modules(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in (folder / "phantom").rglob("*.py")}

    assert modules(unpacked) == modules(ROOT) and "phantom/engine/training/loop.py" in modules(unpacked)
    assert (unpacked / "phantom" / "py.typed").is_file()
    assert {path.name.split("-")[0] for path in unpacked.iterdir()} == {"phantom", "phantom_gradients"}


def import_from(site: Path, statement: str, blocked: tuple[str, ...]) -> None:
    """Run `statement` in a fresh interpreter that finds `phantom` in `site` and cannot import the blocked names."""
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocked())
{statement}
import phantom
assert phantom.__file__.startswith({str(site)!r}), phantom.__file__
"""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=site.parent, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_method_needs_torch_alone(unpacked):
    others = [module for module, names in DISTRIBUTIONS.items() if normal(names[0]) in parsed(EXTRAS["train"])]
    assert {"hydra", "omegaconf", "yaml", "rich"} <= set(others)
    imported = "from phantom import UPG, Broyden, fixed_point; import torch; z = torch.zeros(2, 3)"
    solve = "print(fixed_point(torch.cos, z, solver=Broyden(max_steps=9, tol=1e-6), grad=UPG(k=2, lam=0.5)).value)"
    import_from(unpacked, f"{imported}; {solve}", (*OWN, *set(others) - {"numpy"}))


def test_the_engine_needs_no_repository(unpacked):
    modules = ("build", "command", "training.loop", "plan", "rebuild", "run")
    import_from(unpacked, f"import {', '.join(f'phantom.engine.{name}' for name in modules)}", OWN)
