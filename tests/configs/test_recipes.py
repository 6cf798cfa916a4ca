"""Recipes: a pair of model and data trains as the paper's row does, and the user's overrides beat it."""

import functools
import logging
import sys
from pathlib import Path

import pytest
import yaml

from phantom import Anderson, Broyden, FixedPoint
from phantom.engine import command
from phantom.engine.artifacts import identity
from phantom.engine.config.recipes import recipe_of_pair
from phantom.engine.plan import Plan
from phantom.engine.run import finished_folder
from tests.configs.tiny_data import tiny
from tests.plans import plan, trained
from tests.tiny_run import MODEL, TINY
from train import CONFIGS

LANGUAGE = "model=deq_transformer data=wikitext103"
ADAM = "optimizer=adam pretraining=unrolled"
PRETRAINING = "pretraining=unrolled pretraining.steps=32000 pretraining.layers=2 pretraining.of_steps=300000"
# a command line by groups, and the row of the paper that it is
ROWS = [
    ("data=cifar10", "table1/upg_k5_lam0.5"),
    ("model=mdeq_tiny data=cifar10 grad=upg k=5 lam=0.5", "table1/upg_k5_lam0.5"),
    ("data=cifar10 grad=npg", "table1/npg_k5_lam0.5"),
    ("data=cifar10 k=9 model.dropout=0.25", "table1/upg_k9_lam0.5_dropout"),
    ("data=cifar10 grad=implicit model.dropout=0.25", "table1/implicit_sgd_no_pretraining"),
    ("data=cifar10 grad=implicit model.dropout=0.25 optimizer=adam", "table1/implicit_no_pretraining"),
    (f"data=cifar10 grad=implicit {ADAM} pretraining.of_steps=19550", "table1/implicit_no_dropout"),
    ("model=mdeq_large data=cifar10 grad=upg k=5 lam=0.5", "table3/cifar10_upg"),
    ("model=mdeq_small data=imagenet grad=upg k=5 lam=0.6", "table3/imagenet_upg"),
    (f"{LANGUAGE} grad=upg k=5 lam=0.8", "table3/wikitext103_postln_upg"),
    (f"{LANGUAGE} grad=implicit {PRETRAINING}", "table3/wikitext103_postln_implicit"),
    *(
        (f"model=ignn data={data} grad=upg k=5 lam={lam}", f"table4/{data}_upg_k5_lam{lam}")
        for data in ("cox2", "proteins", "ppi")
        for lam in (0.5, 0.8, 1.0)
    ),
    *((f"model=ignn data={data} grad=implicit", f"table4/{data}_implicit") for data in ("cox2", "proteins", "ppi")),
]


@functools.cache
def named(line: str) -> Plan:
    return plan(line.split())


@pytest.mark.parametrize(("line", "row"), ROWS, ids=[line for line, _ in ROWS])
def test_a_command_by_groups_is_the_row(line, row):
    made, paper = named(line), named(f"experiment={row}")
    assert made.differences(paper.text) == []
    assert identity.config_hash(made.config) == identity.config_hash(paper.config)
    assert made.label == "-".join(made.choices[group] for group in ("model", "data", "grad")) and paper.label == row
    assert made.recipe == paper.recipe == f"{made.choices['model']}-{made.choices['data']}"


def test_every_recipe_is_compared_with_a_row():
    assert {named(line).recipe for line, _ in ROWS} == set(CONFIGS.leaves("recipe"))


@pytest.mark.parametrize("name", CONFIGS.leaves("recipe"))
def test_a_recipe_is_named_after_its_pair(name):
    made = plan([f"recipe={name}"])
    assert f"{made.choices['model']}-{made.choices['data']}" == name == made.recipe
    assert not made.differences(plan([f"model={made.choices['model']}", f"data={made.choices['data']}"]).text)


@pytest.mark.parametrize("scale", ["smoke", "gpu"])
def test_a_scale_comes_last(scale):
    made = plan(["data=cifar10", f"scale={scale}"])
    assert not made.differences(plan(["experiment=table1/upg_k5_lam0.5", f"scale={scale}"]).text)
    assert made.config["epochs"] == {"smoke": 1, "gpu": 20}[scale]


def test_the_default_run_has_no_recipe():
    made = plan([])
    assert made.recipe is None and (made.label, made.config["epochs"]) == ("mdeq_tiny-digits-upg", 12)
    assert (made.deq.solver.max_steps, made.config["optimizer"]["lr"], made.config["repeats"]) == (22, 0.1, 1)


@pytest.mark.parametrize("word", ["null", "none"])
def test_no_recipe_is_typed_in_two_ways_and_kept_in_one(word):
    made = plan(["model=ignn", "data=cox2", f"recipe={word}"])
    assert made.recipe is None and made.overrides[-1] == "recipe=null"
    assert made.folder.parent.name == "data=cox2,model=ignn,recipe=null"
    config = made.config
    assert (config["epochs"], config["seed"]) == (12, 0) and type(made.deq.solver) is Broyden


def test_a_recipe_that_the_pair_has_anyway_is_no_override():
    typed = plan(["data=cifar10", "recipe=mdeq_tiny-cifar10"])
    assert typed.overrides == ("data=cifar10",) and typed.folder == plan(["data=cifar10"]).folder
    other = plan(["data=cifar10", "model=mdeq_large", "recipe=mdeq_tiny-cifar10"])
    assert other.recipe == "mdeq_tiny-cifar10" and other.choices["model"] == "mdeq_large"
    assert other.config["epochs"] == 50 and len(other.overrides) == 3


def test_an_experiment_is_given_no_recipe():
    assert plan(["experiment=language/pydocs", "model=deq_transformer", "data=wikitext103"]).recipe is None
    assert plan(["experiment=null", "data=cifar10"]).recipe == "mdeq_tiny-cifar10"
    row = plan(["experiment=table1/implicit", "recipe=null"])
    assert (row.recipe, row.config["epochs"], row.choices["data"]) == (None, 12, "digits")


def test_what_is_typed_beats_the_recipe():
    config = plan(["data=cifar10", "epochs=3", "optimizer.lr=0.3", "data.augment=crop_flip", "seed=7"]).config
    assert (config["epochs"], config["optimizer"]["lr"], config["data"]["augment"]) == (3, 0.3, "crop_flip")
    assert config["optimizer"]["momentum"] == 0.9 and config["data"]["seed"] == 7
    made = plan(["model=deq_transformer", "data=wikitext103", "clipping=null", "schedule=constant"])
    assert made.clipping is None and type(made.schedule).__name__ == "Constant"


def leaf(group: str, name: str) -> dict:
    return yaml.safe_load((Path(CONFIGS.folder) / group / f"{name}.yaml").read_text())


@pytest.mark.parametrize("start", ["model=mdeq_small data=imagenet", "experiment=table3/imagenet_upg"])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_numbers_of_an_optimiser_go_with_it(start, name):
    assert plan([*start.split(), f"optimizer={name}"]).config["optimizer"] == leaf("optimizer", name)
    config = plan([*start.split(), f"optimizer={name}", "optimizer.lr=0.02", "optimizer.betas=[0.5,0.6]"]).config
    assert config["optimizer"] == leaf("optimizer", name) | {"lr": 0.02, "betas": [0.5, 0.6]}


def test_numbers_that_solvers_share_stay():
    """The budget and the test of convergence are the problem's; an Anderson memory of 6 is no memory of Broyden."""
    made = plan(["model=mdeq_small", "data=imagenet", "solver=anderson"])
    assert made.deq.solver == Anderson(
        max_steps=26, tol=1e-5, stop="absolute", norm="rms", memory=6, lam=1.0, ridge=1e-6
    )
    made = plan(["model=ignn", "data=cox2", "solver=broyden", "solver.memory=9"])
    assert made.deq.solver == Broyden(max_steps=300, tol=3e-6, stop="absolute", norm="max", memory=9)
    made = plan(["experiment=table3/wikitext103_preln_upg", "solver=broyden", "eval_solver=fixed_point"])
    assert made.deq.solver == Broyden(max_steps=8, tol=1e-3, memory=None)
    assert made.deq.eval_solver == FixedPoint(max_steps=8, tol=1e-3, lam=1.0)


def test_numbers_of_data_go_where_the_source_does_not_take_them():
    config = plan(["experiment=table3/imagenet_upg", "model=mdeq_tiny", "data=cifar10"]).config
    assert "scale" not in config["data"] and "ratio" not in config["data"] and config["epochs"] == 100
    config = plan(["experiment=language/pydocs", "data=wikitext103"]).config
    assert (config["data"]["streams"], config["data"]["eval_streams"], config["data"]["segment"]) == (8, 4, 64)


def run(monkeypatch, *arguments: str) -> list:
    """Run the command line in this process and return the plans of its jobs."""
    seen = []
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    command.run(seen.append, CONFIGS)
    return seen


@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=basic"]])
def test_every_job_of_a_sweep_has_its_own(launcher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = run(monkeypatch, "-m", "data=cifar10,digits", "model=mdeq_tiny,mdeq_large", "k=3", *launcher)
    assert [made.recipe for made in jobs] == ["mdeq_tiny-cifar10", "mdeq_large-cifar10", None, None]
    assert [made.config["epochs"] for made in jobs] == [50, 220, 12, 12]
    assert [made.overrides for made in jobs] == [
        (f"data={data}", f"model={model}", "k=3")
        for data in ("cifar10", "digits")
        for model in ("mdeq_tiny", "mdeq_large")
    ]
    assert all(made.config["k"] == 3 and "recipe" not in str(made.folder) for made in jobs)


def test_a_key_that_the_recipe_brings_is_swept_by_a_launcher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    items = ["model=deq_transformer", "data=wikitext103", "clipping.max_norm=0.1,0.2"]
    jobs = run(monkeypatch, "-m", *items, "hydra/launcher=basic")
    assert [made.clipping.max_norm for made in jobs] == [0.1, 0.2]
    assert jobs[0].overrides == (*items[:2], "clipping.max_norm=0.1")


@pytest.mark.parametrize("show", [["--cfg", "job"], ["--cfg=job"], ["-c", "job", "--resolve"]])
def test_the_config_that_is_shown_is_that_of_the_run(show, monkeypatch, capsys):
    assert run(monkeypatch, "model=mdeq_small", "data=imagenet", "optimizer=adam", *show) == []
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown == plan(["model=mdeq_small", "data=imagenet", "optimizer=adam"]).config and shown["epochs"] == 100


SMALL = [*MODEL, "solver.max_steps=2", "steps=1", "wandb=disabled", "progress=false", "device=cpu"]


def test_the_log_and_the_record_name_it_and_the_run_counts_as_its_row(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="phantom.engine.run")
    items = [*tiny("cifar10", tmp_path / "data"), *SMALL, f"runs={tmp_path / 'runs'}"]
    row = plan(["experiment=table1/npg_k5_lam0.5", *items])
    assert finished_folder(row) is None
    _, record = trained(["data=cifar10", "grad=npg", *items])
    assert (record["recipe"], record["choices"]["recipe"], record["experiment"]) == (*["mdeq_tiny-cifar10"] * 2, None)
    assert [line for line in caplog.messages if line.startswith("recipe")] == [
        "recipe: mdeq_tiny-cifar10; model=mdeq_tiny data=cifar10 starts from it, recipe=null from the general defaults"
    ]
    assert finished_folder(row) == tmp_path / "runs" / record["folder"] != row.folder
    for other in ("seed=1", "optimizer.lr=0.2", "lam=0.6", "precision=tf32", "resume=never"):
        assert finished_folder(plan(["experiment=table1/npg_k5_lam0.5", *items, other])) is None
    assert finished_folder(plan(["experiment=table1/upg_k5_lam0.5", *items])) is None
    trained(["experiment=table1/npg_k5_lam0.5", *items])
    assert finished_folder(row) == row.folder, "its own folder comes first"


def test_a_pair_without_one_is_told_so(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="phantom.engine.run")
    _, record = trained([*TINY, "steps=1", f"runs={tmp_path}"])
    assert record["recipe"] is None
    line = "recipe: none; model=mdeq_tiny data=digits starts from the general defaults of train.yaml"
    assert caplog.messages.count(line) == 1


def test_a_pair_is_read_from_the_command_line():
    assert recipe_of_pair(["model=ignn", "data=ppi"], CONFIGS) == "ignn-ppi"
    assert recipe_of_pair(["data=cifar10"], CONFIGS) == "mdeq_tiny-cifar10"
    assert recipe_of_pair(["model=mdeq_tny", "data=cifar10"], CONFIGS) is None
