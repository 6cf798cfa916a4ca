"""Changing the config of a finished run: values are read as on the command line of train.py."""

import pytest

from phantom.engine.config.overrides import change, expand
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


def test_a_root_key_that_the_data_repeat_is_changed_in_both_places():
    saved = config() | {"subset": 8, "test_subset": None, "data": {"subset": 8, "test_subset": None, "batch_size": 4}}
    found = change(saved, ["test_subset=3", "subset=null"], CONFIGS)
    assert (found["test_subset"], found["data"]) == (3, {"subset": None, "test_subset": 3, "batch_size": 4})
    with pytest.raises(ConfigError, match="'test_subset=3' changes nothing: the data of this run take no test_subset"):
        change(saved | {"data": {"streams": 4}}, ["test_subset=3"], CONFIGS)


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


def test_a_job_of_a_sweep_has_its_other_items_as_they_were_typed():
    assert expand(["init=w.pt", "seed=0,1"]) == [["init=w.pt", "seed=0"], ["init=w.pt", "seed=1"]]
