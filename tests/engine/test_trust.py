"""A run folder from elsewhere cannot run code: what its config names is refused before anything is constructed."""

import sys

import pytest
import torch
import yaml

from phantom.engine.artifacts import checkpoint
from phantom.engine.build import build_source
from phantom.engine.config.trust import check_trusted
from phantom.engine.errors import CheckpointError, ConfigError
from phantom.engine.rebuild import _saved_plan, rebuild_run
from tests.plans import composed
from train import CONFIGS

CONFIG, _ = composed([])
REFUSED = [
    ("data", {"_target_": "torch.load", "f": "payload.pt", "weights_only": False}),
    ("data", {"_target_": "phantom.deq.torch.load", "f": "payload.pt", "weights_only": False}),
    ("solver", {"_target_": "shutil.copyfile", "src": "a", "dst": "b"}),
    ("solver", {"_target_": "pathlib.Path.touch", "self": "a"}),
    ("grad", {"_target_": "os.system", "command": "touch pwned"}),
    ("grad", {"_target_": "builtins.eval", "_args_": ["1"]}),
    ("grad", {"_target_": "hydra.utils.get_method", "path": "os.system"}),
    ("grad", {"_target_": "phantom.engine.config.instantiate.hydra.utils.get_method", "path": "os.system"}),
    ("schedule", {"_target_": "functools.partial", "_args_": ["os.system"]}),
    ("optimizer", {"_target_": "timm.optim.create_optimizer", "_partial_": True}),
    ("optimizer", {"_target_": "torch.optim.optimizer.Optimizer.load_state_dict"}),
    ("optimizer", {"_target_": "torch.utils.cpp_extension.load", "name": "x", "sources": "x.cpp"}),
    ("solver", {"_target_": "phantom.UPG", "k": 1, "lam": 1.0}),  # of the project, but no solver
    ("model", {"_target_": "phantom.engine.artifacts.journal.MetricsLog", "path": "x", "keep_until": 0}),
    (
        "monitor",
        {"_target_": "phantom.engine.measure.monitor.Monitor", "every": 1, "exact_solver": {"_target_": "os.system"}},
    ),
    ("model", {"_target_": "models.ignn.GraphIGNN", "layer": {"_target_": "os.system", "_partial_": True}}),
    ("model", {"_target_": "models.ignn.GraphIGNN", "layer": [{"_target_": "os.system"}]}),
    ("penalty", {"_target_": "nothing.Like"}),
    ("data", {"_target_": "data.nothing.Source"}),
    ("seed", {"_target_": "os.getpid"}),
]


@pytest.mark.parametrize(("group", "node"), REFUSED, ids=[f"{g}={n['_target_']}" for g, n in REFUSED])
def test_what_is_refused(group, node):
    with pytest.raises(ConfigError, match=r"of the saved config is refused: .*trust=<package>"):
        check_trusted(CONFIG | {group: node})


def test_an_interpolation_is_refused():
    with pytest.raises(ConfigError, match=r"runs='\$\{oc.env:HOME\}' of the saved config is refused"):
        check_trusted(CONFIG | {"runs": "${oc.env:HOME}"})


@pytest.mark.parametrize(
    "value", ["!!pairs [a: {_target_: os.system}]", "!!omap [a: {_target_: os.system}]", "!!set {a}", "!!binary YQ=="]
)
def test_values_that_are_not_plain_are_refused(value):
    """YAML makes tuples of pairs, and Hydra builds what is in a tuple."""
    extra = yaml.safe_load(value)
    with pytest.raises(ConfigError, match=r"optimizer\.extra.* is refused: a run saves plain values"):
        check_trusted(CONFIG | {"optimizer": CONFIG["optimizer"] | {"extra": extra}})


def test_nothing_is_imported_to_find_out(tmp_path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="elsewhere"):
        check_trusted(CONFIG | {"solver": {"_target_": "elsewhere.Solver"}})
    assert "elsewhere" not in sys.modules


@pytest.mark.parametrize("name", CONFIGS.leaves("experiment"))
def test_every_experiment_is_trusted(name):
    check_trusted(composed([f"experiment={name}"])[0])


@pytest.mark.parametrize("items", [["optimizer=timm"], ["monitor=cosine"], ["penalty=jacobian", "jitter=below"]])
def test_every_kind_of_leaf_is_trusted(items):
    check_trusted(composed(items)[0])


def test_a_package_of_the_user_is_admitted_by_name(tmp_path, monkeypatch):
    (tmp_path / "mine_of_test.py").write_text(
        "from phantom import FixedPoint\nclass Mine(FixedPoint):\n    pass\ndef function(**_):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = CONFIG | {"solver": {"_target_": "mine_of_test.Mine", "max_steps": 3, "tol": None}}
    with pytest.raises(ConfigError, match="trust=<package>"):
        check_trusted(config)
    check_trusted(config, trust="mine_of_test")


def test_what_a_named_package_defines_is_admitted_whatever_it_is(tmp_path, monkeypatch):
    """A part of a part that only the user knows, and a function that makes one; but nothing that it imports."""
    (tmp_path / "parts_of_test.py").write_text(
        "from os import system\nfrom subprocess import Popen\nclass Flip:\n    pass\ndef make(**_):\n    pass\n"
    )
    (tmp_path / "other_of_test").mkdir()
    (tmp_path / "other_of_test" / "deep.py").write_text("class Crop:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    def check(*targets: str, trust: str) -> None:
        parts = [{"_target_": target} for target in targets]
        check_trusted(CONFIG | {"data": {**CONFIG["data"], "transform": parts}}, trust=trust)

    check("parts_of_test.Flip", "parts_of_test.make", trust="parts_of_test")
    for trust in ("parts_of_test,other_of_test", "parts_of_test, other_of_test.deep"):
        check("parts_of_test.Flip", "other_of_test.deep.Crop", trust=trust)
    for target in ("parts_of_test.system", "parts_of_test.Popen", "parts_of_test.Nothing", "other_of_test.deep.Crop"):
        with pytest.raises(ConfigError, match=rf"transform\.0\._target_='{target}'.*what parts_of_test defines"):
            check(target, trust="parts_of_test")
    for name in ("parts", "parts_of_test.elsewhere", "", ","):
        with pytest.raises(ConfigError, match="refused"):
            check("parts_of_test.Flip", trust=name)


def test_a_checkpoint_that_would_run_code_is_refused_by_the_evaluation(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save(Payload(), tmp_path / "payload.pt")
    attack = {"_target_": "torch.load", "f": str(tmp_path / "payload.pt"), "weights_only": False}
    state = {"config": yaml.safe_dump(CONFIG | {"data": attack}), "ema": None, "model": {}, "step": 1}
    checkpoint.save(tmp_path / "last.pt", state)
    with pytest.raises(ConfigError, match=r"data\._target_='torch.load' of the saved config is refused"):
        rebuild_run(tmp_path, which="last", overrides=[], configs=CONFIGS)
    assert not (tmp_path / "pwned").exists()


def test_a_saved_config_does_not_say_where_files_are_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    (tmp_path / "text").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "text" / f"wiki.{split}.tokens").write_text("a b c d e f g\n" * 40)
    config, _ = composed(["model=deq_transformer_small", "data=wikitext103", "data.segment=4", "data.streams=2"])
    config["data"] |= {"root": str(tmp_path / "text"), "allow_partial": True, "eval_streams": 2}
    config["data"] |= {"cache": str(tmp_path / "elsewhere"), "download": True}
    text = yaml.safe_dump(config)

    def evaluate(*overrides: str) -> dict:
        plan = _saved_plan(text, tmp_path, overrides=overrides, configs=CONFIGS, trust=None)
        build_source(plan)
        return plan.config["data"]

    found = evaluate()
    assert found["download"] is False and found["cache"] is None
    assert not (tmp_path / "elsewhere").exists() and (tmp_path / "own").is_dir()
    found = evaluate("data.download=true", f"data.cache={tmp_path / 'typed'}")
    assert found["download"] is True and (tmp_path / "typed").is_dir() and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("node", [None, "x", [1], {"a": 1}, {"_target_": None}, {}], ids=repr)
@pytest.mark.parametrize("group", ["data", "model", "solver", "grad", "optimizer", "schedule"])
def test_a_group_that_is_no_constructor_is_said_in_one_sentence(tmp_path, group, node):
    state = {"config": yaml.safe_dump(CONFIG | {group: node}), "ema": None, "model": {}, "step": 1}
    checkpoint.save(tmp_path / "last.pt", state)
    with pytest.raises(ConfigError, match=rf"{group}\b.* of the saved config is (no mapping|refused)"):
        rebuild_run(tmp_path, which="last", overrides=[], configs=CONFIGS)


@pytest.mark.parametrize("state", [{}, {"config": 5, "ema": None, "model": {}, "step": 1}, {"config": ""}])
def test_a_checkpoint_without_a_config_is_said_in_one_sentence(tmp_path, state):
    checkpoint.save(tmp_path / "last.pt", state)
    with pytest.raises(CheckpointError, match=r"last\.pt is not a checkpoint of a run"):
        rebuild_run(tmp_path, which="last", overrides=[], configs=CONFIGS)
