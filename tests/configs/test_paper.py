"""What the rows of the paper pin, written down a second time; and the paper's numbers in the tables."""

import pytest
import torch

from phantom import NPG, UPG, Broyden, FixedPoint, Implicit
from phantom.engine.training.rules import Pretraining
from scripts import studies
from tests.plans import plan
from train import CONFIGS

ADAM, SGD = ("Adam", 1e-3, 0.0), ("SGD", 0.1, 1e-4)
PRE = Pretraining(steps=3000, layers=10, of_steps=19_550)
A5, A9 = {"k": 5, "lam": 0.5}, {"k": 9, "lam": 0.5}
# row: estimator, optimiser with rate and weight decay, dropout, pretraining
TABLE1 = {
    "implicit": (Implicit, ADAM, 0.25, PRE),
    "implicit_no_pretraining": (Implicit, ADAM, 0.25, None),
    "implicit_no_dropout": (Implicit, ADAM, 0.0, PRE),
    "implicit_sgd": (Implicit, SGD, 0.25, PRE),
    "implicit_sgd_no_pretraining": (Implicit, SGD, 0.25, None),
    "upg_k5_lam0.5": (UPG(**A5), SGD, 0.0, None),
    "npg_k5_lam0.5": (NPG(**A5), SGD, 0.0, None),
    "upg_k9_lam0.5_dropout": (UPG(**A9), SGD, 0.25, None),
}
HALF = Pretraining(steps=500_000, layers=5, of_steps=1_001_000)
NESTEROV = ("SGD", 0.05, 5e-5)
# row: estimator, solver steps, optimiser, dropout, pretraining, epochs, repeats
TABLE3 = {
    "cifar10_implicit": (Implicit, 18, ADAM, 0.3, Pretraining(steps=20_000, layers=10, of_steps=86_020), 220, 3),
    "cifar10_upg": (UPG(**A5), 18, SGD, 0.0, None, 220, 3),
    "imagenet_implicit": (
        Implicit,
        26,
        NESTEROV,
        0.0,
        Pretraining(steps=500_000, layers=5, of_steps=1_001_000),
        100,
        1,
    ),
    "imagenet_upg": (UPG(k=5, lam=0.6), 26, NESTEROV, 0.0, None, 100, 1),
}
LAMS = {"implicit": None, "upg_k5_lam0.5": 0.5, "upg_k5_lam0.8": 0.8, "upg_k5_lam1.0": 1.0}
# the metric as printed, in the order of the columns Implicit, UPG 0.5, 0.8, 1.0
TABLE4 = {
    "cox2": ("84.1 ± 2.9", "83.9 ± 3.0", "83.9 ± 2.7", "83.0 ± 2.9"),
    "proteins": ("78.6 ± 4.1", "78.4 ± 4.2", "78.6 ± 4.2", "78.8 ± 4.2"),
    "ppi": ("97.6", "98.2", "97.4", "96.2"),
}
PRINTED = {
    "table1/implicit": "85.0 ± 0.2",
    "table1/implicit_no_pretraining": "82.3 ± 1.3",
    "table1/implicit_no_dropout": "83.7 ± 0.1",
    "table1/implicit_sgd": "84.5 ± 0.3",
    "table1/implicit_sgd_no_pretraining": "82.9 ± 1.5",
    "table1/upg_k5_lam0.5": "85.8 ± 0.5",
    "table1/npg_k5_lam0.5": "85.6 ± 0.5",
    "table1/upg_k9_lam0.5_dropout": "86.1 ± 0.5",
    "table3/cifar10_implicit": "93.8 ± 0.17",
    "table3/cifar10_upg": "95.0 ± 0.16",
    "table3/imagenet_implicit": "75.3",
    "table3/imagenet_upg": "75.7",
    "table3/wikitext103_postln_implicit": "24.0",
    "table3/wikitext103_postln_upg": "25.7",
    "table3/wikitext103_preln_implicit": "24.5",
    "table3/wikitext103_preln_upg": "24.4",
    "table3/wikitext103_preln_upg_steps": "24.0",
    **{f"table4/{data}_{row}": paper for data, line in TABLE4.items() for row, paper in zip(LAMS, line, strict=True)},
}
SPEED = {
    "table3/cifar10_implicit": "1.0x",
    "table3/cifar10_upg": "1.4x",
    "table3/imagenet_implicit": "1.0x",
    "table3/imagenet_upg": "1.7x",
    "table3/wikitext103_postln_implicit": "1.0x",
    "table3/wikitext103_postln_upg": "1.7x",
    "table3/wikitext103_preln_implicit": "1.7x",
    "table3/wikitext103_preln_upg": "2.2x",
    "table3/wikitext103_preln_upg_steps": "1.7x",
}


def check_vision(made, grad, steps, optimizer, dropout, pretraining, epochs, repeats):
    """Check a row of MDEQ: the forward solve stops at an RMS of 1e-5, the backward solve runs for as many steps."""
    config, deq = made.config, made.deq
    assert deq.solver == Broyden(max_steps=steps, tol=1e-5, stop="absolute", norm="rms") and deq.eval_solver is None
    if grad is Implicit:
        grad = Implicit(solver=Broyden(max_steps=steps, tol=None))
    assert deq.grad == grad
    name, lr, decay = optimizer
    built = made.make_optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(built).__name__ == name and (built.defaults["lr"], built.defaults["weight_decay"]) == (lr, decay)
    if name == "SGD":
        assert (built.defaults["momentum"], built.defaults["nesterov"]) == (0.9, optimizer is NESTEROV)
    assert config["model"]["dropout"] == dropout
    assert made.rules.pretraining == pretraining
    assert (config["epochs"], config["steps"], config["repeats"]) == (epochs, None, repeats)
    assert config["data"]["batch_size"] == 128 and config["subset"] is None
    assert config["clipping"] is None and config["penalty"] is None and config["jitter"] is None
    schedule = made.schedule
    rates = [schedule.rate(t, base=lr, total=1000, epoch=0) for t in (0, 500, 1000)]
    assert rates == pytest.approx([lr, (lr + 1e-6) / 2, 1e-6])


@pytest.mark.parametrize("row", TABLE1)
def test_table1(row):
    grad, optimizer, dropout, pretraining = TABLE1[row]
    made = plan([f"experiment=table1/{row}"])
    config, choices = made.config, made.choices
    assert (choices["model"], choices["data"], config["data"]["augment"]) == ("mdeq_tiny", "cifar10", "none")
    check_vision(made, grad, 22, optimizer, dropout, pretraining, 50, 6)


@pytest.mark.parametrize("row", TABLE3)
def test_table3(row):
    made = plan([f"experiment=table3/{row}"])
    config, choices = made.config, made.choices
    check_vision(made, *TABLE3[row])
    if row.startswith("cifar10"):
        assert (choices["model"], choices["data"], config["data"]["augment"]) == ("mdeq_large", "cifar10", "crop_flip")
        return
    phantom_row = row == "imagenet_upg"
    assert (choices["model"], choices["data"]) == ("mdeq_small", "imagenet")
    assert config["model"]["init"] == ("default" if phantom_row else "normal")
    area, aspect = ([0.1, 1.0], [0.8, 1.25]) if phantom_row else ([0.08, 1.0], [0.75, 4 / 3])
    assert config["data"]["scale"] == area and config["data"]["ratio"] == pytest.approx(aspect)
    assert (config["data"]["crop"], config["data"]["resize"]) == (224, 256)


@pytest.mark.parametrize("data", TABLE4)
@pytest.mark.parametrize("row", LAMS)
def test_table4(data, row):
    made = plan([f"experiment=table4/{data}_{row}"])
    config, choices, deq = made.config, made.choices, made.deq
    assert (choices["model"], choices["data"], config["seed"]) == ("ignn", data, 42)
    assert deq.solver == FixedPoint(max_steps=300, tol=3e-6, stop="absolute", norm="max")
    if LAMS[row]:
        assert deq.grad == UPG(k=5, lam=LAMS[row])
    elif data == "ppi":
        assert deq.grad == Implicit(solver=FixedPoint(max_steps=300, tol=1e-6, stop="relative", norm="l2"))
    else:  # the official 3e-6, of the gradient of the sum over 128 graphs instead of their mean
        assert deq.grad == Implicit(solver=FixedPoint(max_steps=300, tol=128 * 3e-6, stop="absolute", norm="max"))
    assert deq.eval_solver is None and deq.gradient_precision is None
    built = made.make_optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert (type(built), built.defaults["weight_decay"]) == (torch.optim.Adam, 0.0)
    assert (built.defaults["betas"], built.defaults["eps"]) == ((0.9, 0.999), 1e-8)
    assert config["clipping"] is None and config["penalty"] is None and config["pretraining"] is None
    assert config["ema"] is None and config["jitter"] is None
    schedule = made.schedule
    rates = [schedule.rate(0, base=built.defaults["lr"], total=1, epoch=epoch) for epoch in (0, 49, 50)]
    if data == "ppi":
        assert (config["epochs"], rates, config["data"]["batch_size"]) == (1000, [5e-3] * 3, 1)
        assert config["data"]["eval_batch_size"] == 2 and config["eval_splits"] == ["test", "valid"]
        return
    assert (config["epochs"], rates, config["data"]["batch_size"]) == (200, [1e-3, 1e-3, 5e-4], 128)
    assert (config["data"]["folds"], config["data"]["eval_adjacency"]) == ("official", "doubled")
    assert (config["data"]["shuffle"], config["data"]["validation"]) == (False, 0.0)
    assert config["eval_splits"] == ["test"], "the best test epoch of a fold is what the paper reports"


def test_the_tables_quote_the_paper():
    tables = [table for name in studies.names() for table in studies.load(name).get("tables", {}).values()]
    rows = [row for table in tables for row in table["rows"]]
    quoted = {row["experiment"]: row["paper"] for row in rows}
    ours = {name: paper for name, paper in quoted.items() if not name.startswith("table")}
    assert {name: quoted[name] for name in quoted if name not in ours} == PRINTED
    assert {row["experiment"]: row["speed"] for row in rows if "speed" in row} == SPEED
    groups = {row["experiment"].split("/")[1].split("_")[0]: row["group"] for row in rows if "group" in row}
    assert groups == {"cifar10": "CIFAR-10", "imagenet": "ImageNet", "wikitext103": "WikiText-103"}
    assert set(ours.values()) <= {"--"}, "the paper has no number for experiments of our own"
    assert set(quoted) <= set(CONFIGS.leaves("experiment"))
