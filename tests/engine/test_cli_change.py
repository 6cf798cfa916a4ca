"""Changing the config of a finished run: values are read as on the command line of train.py."""

import pytest

from phantom.engine.config.overrides import change
from phantom.engine.errors import ConfigError
from train import CONFIGS


def config() -> dict:
    return {"eval_solver": None, "solver": {"tol": 1e-5, "max_steps": 3}, "files": {"train": "a", "test": "b"}}


@pytest.mark.parametrize(
    ("item", "path", "value"),
    [
        ("solver.tol=1e-3", ("solver", "tol"), 1e-3),
        ("solver.tol=null", ("solver", "tol"), None),
        ("eval_solver.max_steps=7", ("eval_solver", "max_steps"), 7),
        ("files.test=null", ("files", "test"), None),
        ("files={train: c, test: d}", ("files",), {"train": "c", "test": "d"}),
        ("files.train=/data/some text.tokens", ("files", "train"), "/data/some text.tokens"),
    ],
)
def test_values(item, path, value):
    found = change(config(), [item], CONFIGS)
    for key in path:
        found = found[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("solver.tolerance=1", "'solver.tolerance=1' does not fit .* max_steps, tol"),
        ("nothing=1", "eval_solver, files, solver"),
        ("solver.tol", "key=value"),
        ("solver.tol=[1", "key=value"),
    ],
)
def test_mistakes(item, message):
    with pytest.raises(ConfigError, match=message):
        change(config(), [item], CONFIGS)
