"""The set-up makes the repository importable, installs quietly, and lets pip's errors through."""

import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path):
    """Return a repository with the set-up script, one requirement that nobody has, and a module."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "setup.sh").write_text((ROOT / "scripts" / "setup.sh").read_text())
    (tmp_path / "scripts" / "show.py").write_text("from package import VALUE\nprint(VALUE)\n")
    (tmp_path / "requirements.txt").write_text("phantom-no-such-package==1\n")
    (tmp_path / "package.py").write_text("VALUE = 7\n")
    return tmp_path


def set_up(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    line = ["bash", str(tree / "scripts" / "setup.sh")]
    return subprocess.run(line, cwd="/", env=kept | environment, capture_output=True, text=True, timeout=120)


def test_scripts_find_the_repository_wherever_it_lies(tree):
    venv.create(tree / ".venv", with_pip=False, symlinks=True)
    installed = subprocess.run("cksum < requirements.txt", shell=True, cwd=tree, capture_output=True, text=True).stdout
    (tree / ".venv" / ".installed").write_text(installed)
    done = set_up(tree, CDPATH=str(tree))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), "nothing to install"
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for place in (tree, tree.with_name("moved")):
        tree.replace(place)
        line = [str(place / ".venv/bin/python"), str(place / "scripts/show.py")]
        assert subprocess.run(line, cwd="/", env=kept, capture_output=True, text=True).stdout == "7\n"
    (link,) = place.rglob("repository.pth")
    before = link.stat().st_mtime_ns
    assert set_up(place).returncode == 0 and link.stat().st_mtime_ns == before, "an installation may be another user's"


def test_a_script_of_another_tree_is_refused(tmp_path):
    """As in a second clone or a worktree: it would run the code of the tree that is installed."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "report.py").write_text((ROOT / "scripts" / "report.py").read_text())
    line = [sys.executable, str(tmp_path / "scripts" / "report.py"), "html"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and f"would run the code of {ROOT}" in done.stderr
    assert f"set PYTHONPATH={tmp_path}" in done.stderr


def test_pip_is_quiet_but_for_its_errors(tree):
    pytest.importorskip("pip")
    (tree / ".venv" / "bin").mkdir(parents=True)
    python = tree / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = set_up(tree, PIP_NO_INDEX="1", PIP_FIND_LINKS="file:///no/such/folder")
    assert done.returncode != 0 and not (tree / ".venv" / ".installed").exists()
    assert "ERROR: No matching distribution found for phantom-no-such-package==1" in done.stderr
    assert "WARNING" not in done.stderr + done.stdout
    loud = [sys.executable, "-m", "pip", "install", "-q", "-r", "requirements.txt"]
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "file:///no/such/folder"}
    found = subprocess.run(loud, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)
    assert "WARNING" in found.stderr, "there was something to hide"


def test_an_editable_install_is_this_folder():
    """setuptools then writes the folder into a .pth file; without it, only phantom would be found."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {"": "."}


@pytest.mark.parametrize("says", ["sys.exit(1)", "import no_such_pip"])
def test_a_python_that_cannot_do_is_named_before_anything_is_installed(tree, says):
    """An old one, or one whose pip is missing, as a failed set-up leaves it behind."""
    (tree / ".venv" / "bin").mkdir(parents=True)
    python = tree / ".venv" / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 && exit\nexec "{sys.executable}" -c "{says}"\n'
    )
    python.chmod(0o755)
    done = set_up(tree)
    assert done.returncode == 1 and not (tree / ".venv" / ".installed").exists()
    assert "error: .venv has Python 3.9.1, and 3.11 or newer with pip is needed: remove .venv" in done.stderr
