"""Every experiment composes, builds at paper scale, and takes a step on tiny data at its full width.

The language rows take their step, at a reduced width, in tests/engine/test_language_experiments.py.
"""

import math

import pytest
import torch

from phantom import UPG
from phantom.engine.artifacts import identity
from phantom.engine.build import build_model, build_trainer
from phantom.engine.run import run
from tests.configs.tiny_data import spec, tiny
from tests.plans import composed, plan
from train import CONFIGS

NAMES = CONFIGS.leaves("experiment")
# measured on the official classes; models of our own size are not listed
PARAMETERS = {
    ("mdeq_tiny", "cifar10"): 158_986,
    ("mdeq_large", "cifar10"): 11_098_398,
    ("mdeq_small", "imagenet"): 16_808_936,
    ("deq_transformer", "wikitext103"): 97_691_888,
    ("ignn", "cox2"): 37_634,
    ("ignn", "proteins"): 33_538,
    ("ignn", "ppi"): 4_656_931,
    ("ignn", "ppi_synthetic"): 4_656_931,
    ("ignn", "chains"): 3_504,
    ("reasoner_small", "sudoku"): 23_490,
}


def test_there_are_experiments_of_every_table():
    assert {name.split("/")[0] for name in NAMES} >= {"table1", "table3", "table4"} and len(NAMES) >= 39


@pytest.mark.parametrize("name", NAMES)
def test_builds_at_paper_scale(name):
    made = plan([f"experiment={name}"])
    config, choices = made.config, made.choices
    assert config["scale"] == "paper" and made.label == name
    with torch.device("meta"):
        model = build_model(made, spec(choices["data"]))
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS.get((choices["model"], choices["data"]), count)
    assert made.task.metric in ("accuracy", "perplexity", "micro_f1", "exact_match")
    optimizer = made.make_optimizer(model.parameters())
    assert optimizer.param_groups[0]["lr"] == config["optimizer"]["lr"]


@pytest.mark.parametrize("name", NAMES)
def test_upg_on_top(name):
    made = plan([f"experiment={name}", "grad=upg", "k=3", "lam=0.7"])
    assert made.deq.grad == UPG(k=3, lam=0.7) and made.choices["experiment"] == name


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("language/", "table3/wikitext"))])
def test_takes_a_step(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = name.split("/")[1].split("_")[0]
    leaf = {
        "table1": "cifar10",
        "speedrun": "cifar10",
        "fig2": "cifar10",
        "fig3": "cifar10",
        "reasoners": "sudoku",
        "table3": first,
        "table4": first,
    }
    (tmp_path / "data").mkdir()
    small = tiny(leaf.get(name.split("/")[0], name.split("/")[0]), tmp_path / "data")
    job = [f"experiment={name}", "scale=smoke", "smoke_steps=1", *small, f"runs={tmp_path}", "wandb=disabled"]
    made = plan(job)
    config, choices, trainer = made.config, made.choices, build_trainer(made)
    before = [p.detach().clone() for p in trainer.unwrapped.parameters()]
    record = run(trainer, made)
    assert (record["steps"], record["scale"], record["experiment"]) == (1, "smoke", name)
    assert math.isfinite(record["train"]["loss"])
    for split in config["eval_splits"]:
        assert 0 <= record["final"][split][record["metric"]] <= 100
    still = sum(torch.equal(p, b) for p, b in zip(trainer.unwrapped.parameters(), before, strict=True))
    assert still <= (len(before) // 2 if choices["model"] == "ignn" else 0), "IGNN alone has dead parameters"
    if choices["model"] == "mdeq_small":  # two classes are on disk
        assert record["num_parameters"] == PARAMETERS["mdeq_small", "imagenet"] - 998 * 2049
    else:
        pair = (choices["model"], choices["data"])
        assert pair in PARAMETERS, (
            f"{pair} has no row in PARAMETERS of tests/configs/test_experiments.py: add its count"
        )
        assert record["num_parameters"] == PARAMETERS[pair]


@pytest.mark.parametrize("scale", ["gpu", "smoke"])
@pytest.mark.parametrize(
    "name", ["table1/implicit", "table3/imagenet_upg", "table3/wikitext103_preln_upg", "table4/ppi_implicit"]
)
def test_scale_changes_the_budget_alone(name, scale):
    paper, smaller = plan([f"experiment={name}"]).config, plan([f"experiment={name}", f"scale={scale}"])
    other = smaller.config
    assert other["scale"] == scale and smaller.label == f"{name}@{scale}"
    budget = {"epochs", "steps", "repeats", "subset", "test_subset", "scale"}
    assert {"scale", "epochs", "steps"} <= set(identity.differences(paper, other)) <= budget | {"data"}
    without = [{k: v for k, v in c["data"].items() if k not in ("subset", "test_subset")} for c in (paper, other)]
    assert without[0] == without[1]


def test_a_changed_gradient_leaves_no_pinned_number_behind():
    config, _ = composed(["experiment=table1/upg_k9_lam0.5_dropout", "grad=implicit"])
    assert "k" not in config and "lam" not in config


def test_null_leaves_a_group_out():
    config, _ = composed(["experiment=table1/implicit", "pretraining=null", "clipping=null"])
    assert config["pretraining"] is None and config["clipping"] is None
    plain, _ = composed(["experiment=table1/implicit_no_pretraining"])
    assert not identity.differences(config, plain)
    assert plan(["experiment=null"]).label == "mdeq_tiny-digits-upg"


def test_the_command_line_of_the_paper():
    made = plan(["model=mdeq_small", "data=imagenet", "grad=upg", "k=5", "lam=0.6"])
    assert made.deq.grad == UPG(k=5, lam=0.6)
    with torch.device("meta"):
        model = build_model(made, spec("imagenet"))
    assert sum(p.numel() for p in model.parameters()) == 16_808_936
    assert made.label == "mdeq_small-imagenet-upg"
