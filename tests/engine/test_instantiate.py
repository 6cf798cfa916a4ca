"""An error of a user's own constructor can be found: a refused value is one line, code that fails a traceback."""

import re
import traceback

import pytest

from phantom.engine.config.instantiate import instantiate, locate
from phantom.engine.errors import ConfigError

PARTS = """
import torch
from phantom.engine.errors import DataError
from phantom.validate import check_count
from deep_parts import look_up

class Part:
    def __init__(self, way):
        if way == "value":
            raise ValueError("way must be short")
        if way == "inside of torch":
            torch.empty(2, 3).reshape(7, "x")
        if way == "type":
            look_up(None)
        if way == "check":
            check_count("count", 0, least=1)
        if way == "data":
            raise DataError("there are no data")
        if way == "key":
            look_up({})
        if way == "attribute":
            torch.nothing_like_that
        if way == "runtime":
            torch.zeros(2) @ torch.zeros(3)
        if way == "missing":
            open("/nothing/here")
"""
DEEP = """
def look_up(found):
    return found["labels"]
"""


@pytest.fixture(autouse=True)
def parts(tmp_path, monkeypatch):
    (tmp_path / "parts_of_constructors.py").write_text(PARTS)
    (tmp_path / "deep_parts.py").write_text(DEEP)
    (tmp_path / "broken_parts.py").write_text("\nlabels = {}['labels']\n")
    monkeypatch.syspath_prepend(tmp_path)


def line_of(text: str) -> int:
    return PARTS[: PARTS.index(text)].count("\n") + 1


def build(**keys):
    return instantiate({"_target_": "parts_of_constructors.Part", **keys}, "data")


@pytest.mark.parametrize(
    ("way", "message", "place"),
    [
        ("value", r"way must be short \(ValueError", "raise ValueError"),
        ("inside of torch", r".*reshape.* \(TypeError", "torch.empty"),
        ("type", r"'NoneType' object is not subscriptable \(TypeError", "look_up(None)"),
        ("check", r"count=0 must be .* \(ValueError", 'check_count("count"'),
        ("missing", r".*No such file or directory: '/nothing/here' \(FileNotFoundError", 'open("'),
    ],
)
def test_a_value_that_is_refused_is_one_line_with_its_place(way, message, place):
    with pytest.raises(
        ConfigError, match=rf"^data: {message} in \S+parts_of_constructors\.py, line {line_of(place)}\)$"
    ):
        build(way=way)


def test_a_message_for_users_and_wrong_keys_need_no_place():
    with pytest.raises(ConfigError, match=r"^data: there are no data$"):
        build(way="data")
    with pytest.raises(ConfigError, match=r"^data: parts_of_constructors.Part has no key other; valid keys: way$"):
        build(way="none", other=1)
    with pytest.raises(ConfigError, match=r"missing 1 required positional argument: 'way'$"):
        build()
    with pytest.raises(ConfigError, match=r"^solver: max_steps=-1 must be an integer >= 0[^(]*$"):
        instantiate({"_target_": "phantom.FixedPoint", "max_steps": -1, "tol": None}, "solver")


@pytest.mark.parametrize(
    ("way", "kind", "place"),
    [
        ("key", KeyError, 'return found["labels"]'),
        ("attribute", AttributeError, "torch.nothing_like_that"),
        ("runtime", RuntimeError, "torch.zeros(2) @"),
    ],
)
def test_code_that_fails_keeps_its_traceback(way, kind, place):
    with pytest.raises(kind) as error:
        build(way=way)
    shown = "".join(traceback.format_exception(error.value))
    assert place in shown and "raised while data was built, from parts_of_constructors.Part" in shown
    assert len(re.findall("Traceback", shown)) == 1


def test_a_module_that_cannot_be_imported_names_the_line():
    with pytest.raises(ConfigError, match=r"KeyError\('labels'\).* \(KeyError in \S+broken_parts\.py, line 2\)$"):
        locate("broken_parts.Part")
    with pytest.raises(ConfigError, match=r"KeyError\('labels'\).* \(KeyError in \S+broken_parts\.py, line 2\)$"):
        instantiate({"_target_": "broken_parts.Part"}, "data")
    with pytest.raises(ConfigError, match=r"nothing_parts[^(]*(\([^(]*\))?[^(]*$"):
        locate("nothing_parts.Part")
