"""Laws of the program that no single module can keep: what a run builds, and when."""

import ast
import functools
import sys
from collections import Counter
from pathlib import Path

import hydra
import pytest

import train
from phantom import DEQ
from phantom.engine import command
from phantom.engine.build import build_trainer
from tests.plans import plan
from tests.tiny_run import TINY

ROOT = Path(train.__file__).parent
SHORT = [*(item for item in TINY if not item.startswith("steps=")), "steps=2"]


def test_a_trainer_has_all_its_attributes_before_fit(tmp_path):
    trainer = build_trainer(plan([*SHORT, f"runs={tmp_path}", "ema=0.9", "monitor=radius", "monitor.every=1"]))
    before = [set(vars(part)) for part in (trainer, trainer._take_step, trainer.rules)]
    trainer.fit(resume=False)
    assert trainer.step == 2
    assert [set(vars(part)) for part in (trainer, trainer._take_step, trainer.rules)] == before


@pytest.mark.parametrize(
    ("overrides", "runs"),
    [
        (["grad=implicit", "monitor=cosine", "monitor.every=1"], 1),
        (["-m", "grad=upg,npg", "k=2"], 2),
    ],
    ids=["one run", "a sweep of two"],
)
def test_a_run_is_composed_once_and_has_one_deq(overrides, runs, tmp_path, monkeypatch):
    counts = Counter()

    def counted(name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(hydra, "compose", counted("compositions", hydra.compose))
    monkeypatch.setattr(DEQ, "__init__", counted("DEQs", DEQ.__init__))
    monkeypatch.setattr(sys, "argv", ["train.py", *SHORT, f"runs={tmp_path}", *overrides])
    command.run(train.job, train.CONFIGS)
    assert len(list(tmp_path.rglob("record.json"))) == runs
    assert counts == {"compositions": runs, "DEQs": runs}


def test_every_text_is_utf8_whatever_the_locale():
    """Under a locale of another encoding our files would be read wrong, or written so that others read them wrong."""
    files = [path for room in ("phantom", "models", "data", "scripts") for path in (ROOT / room).rglob("*.py")]
    for path in [*files, ROOT / "train.py", ROOT / "evaluate.py"]:
        for call in (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
            named = "encoding" in {keyword.arg for keyword in call.keywords}
            place = f"{path.relative_to(ROOT)}:{call.lineno}: "
            if name == "read_text":
                assert named or call.args, f"{place}read_text('utf-8')"
            elif name == "write_text":
                assert named or len(call.args) > 1 or call.args[0].value.isascii(), f"{place}write_text(text, 'utf-8')"
            elif name == "open" and isinstance(call.func, ast.Name):
                modes = [word for word in map(ast.unparse, call.args[1:]) if "b" in word]
                assert named or modes, f"{place}open(..., encoding='utf-8')"


def test_every_folder_of_configs_is_a_group():
    folders = {path.name for path in train.CONFIGS.folder.iterdir() if path.is_dir()}
    assert folders <= set(train.CONFIGS.groups), "Hydra offers every folder of configs/ as a group: mount it or move it"
