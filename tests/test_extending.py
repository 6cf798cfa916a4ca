"""docs/extending.md is done word by word: its files are written, its commands run, and its mathematics checked."""

import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import train
from phantom import FixedPoint, Implicit, fixed_point
from phantom.engine import command
from phantom.engine.config.configs import Configs
from phantom.engine.source import Shard
from phantom.solve import solve
from tests.tiny_run import MODEL

TEXT = (Path(__file__).parents[1] / "docs/extending.md").read_text()
FILES = dict(re.findall(r"^`([\w/]+\.\w+)`\n\n```\w+\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL))
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
LINES = [line for language, body in BLOCKS if not language for line in body.splitlines()]
TRAINING = [line for line in LINES if line.startswith("python train.py")]
# two steps on a few images
SHORT = (
    *("steps=2", "log_every=1", "subset=16", "test_subset=10", "data.batch_size=8", "solver.max_steps=3"),
    *("wandb=disabled", "progress=false", "device=cpu"),
)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Write the files of the page beside a copy of configs/, as its reader does, and make them importable."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(train.CONFIGS.folder, folder / "configs")
    for name, text in FILES.items():
        assert not (folder / name).exists(), f"{name} is taken"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield Configs(folder / "configs")
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


def mine(configs: Configs, name: str):
    """Return a class of the page."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"mine.{module}"), attribute)


def test_everything_of_the_page_is_found():
    groups = {name.split("/")[1] for name in FILES if name.startswith("configs/")}
    assert groups == {"solver", "grad", "data", "model"}
    assert len(FILES) == len([language for language, _ in BLOCKS if language])
    assert len(TRAINING) >= 6 and len(LINES) == len(TRAINING) + 1
    leaves = [Path(name).stem for name in FILES if name.startswith("configs/")]
    assert all(any(f"={leaf}" in line for line in TRAINING) for leaf in leaves)


@pytest.mark.parametrize("line", TRAINING)
def test_a_command_trains_and_its_run_evaluates(line, configs, tmp_path, monkeypatch, capsys):
    words = shlex.split(line)[2:]
    model = () if any(word.startswith("model=") for word in words) else MODEL
    own_data = any(word.startswith("data=") for word in words)
    short = [item for item in SHORT if not (own_data and "subset" in item)]
    monkeypatch.setattr(sys, "argv", ["train.py", *model, *short, f"runs={tmp_path}", *words])
    command.run(train.job, configs)
    (path,) = tmp_path.rglob("record.json")
    record = json.loads(path.read_text())
    assert record["steps"] == 2 and sum(record["parameter_groups"].values()) == record["num_parameters"]
    assert record["metric"] == ("rmse" if "amounts" in line else "accuracy")

    (asked,) = [line for line in LINES if line.startswith("python evaluate.py")]
    monkeypatch.setattr(evaluate, "CONFIGS", configs)
    capsys.readouterr()
    evaluate.main(shlex.split(asked.replace("<folder>", f"'{path.parent}'"))[2:])
    metrics = json.loads(capsys.readouterr().out)
    final = record["final"]["test"]
    assert metrics[record["metric"]] == pytest.approx(final[record["metric"]]) and metrics["loss"] < float("inf")


def linear_map(radius: float):
    """Return f(z) = z A^T + b with the singular values of A at `radius`, A and b."""
    generator = torch.Generator().manual_seed(0)
    A = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0] * radius
    b = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    return A, b


@pytest.mark.parametrize("omega", [1.0, 0.8])
def test_the_solver_solves(omega, configs):
    A, b = linear_map(0.6)
    exact = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - A, b.T).T
    solver = mine(configs, "overrelaxed.Overrelaxed")(omega=omega, max_steps=300, tol=1e-12)
    value, stats, _ = solve(lambda z: z @ A.T + b, torch.zeros_like(b), solver)
    assert bool(stats.converged.all()) and torch.allclose(value, exact, rtol=0, atol=1e-10)


def test_the_estimator_tends_to_the_exact_adjoint(configs):
    A, b = linear_map(0.6)
    estimator = mine(configs, "heavy_ball.HeavyBall")
    g = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = torch.linalg.solve((torch.eye(6, dtype=torch.float64) - A).T, g.T).T

    def gradient(grad) -> torch.Tensor:
        bias = b.clone().requires_grad_()
        z0, solver = torch.zeros_like(b), FixedPoint(max_steps=300, tol=1e-12)
        fixed_point(lambda z: z @ A.T + bias, z0, solver=solver, grad=grad).value.backward(g)
        return bias.grad

    assert torch.allclose(gradient(estimator(k=200, lam=0.5, beta=0.2)), exact, rtol=0, atol=1e-9)
    short = gradient(estimator(k=2, lam=0.5, beta=0.2))
    assert torch.allclose(short, 0.5 * g + 0.25 * g @ A + 0.25 * g + 0.2 * 0.5 * g, rtol=0, atol=1e-12)
    assert torch.allclose(gradient(Implicit(solver=FixedPoint(max_steps=300, tol=1e-12))), exact, rtol=0, atol=1e-9)


def test_the_data_is_shared_exactly_and_resumes(configs):
    source = mine(configs, "bars.Bars")(num_train=22, num_test=9, size=8, batch_size=8, seed=3)
    whole = list(source.train(epoch=1, start=0, shard=Shard()))
    assert [len(batch[0][1]) for batch in whole] == [8, 8, 6] and len(whole) == source.steps(1)
    ranks = [list(source.train(epoch=1, start=1, shard=Shard(rank=rank, world=2, micro=2))) for rank in (0, 1)]
    for step, batch in enumerate(whole[1:]):
        parts = [part for micro in zip(*(rank[step] for rank in ranks), strict=True) for part in micro]
        assert torch.equal(torch.cat([images for images, _ in parts]), batch[0][0])
    shares = [list(source.evaluate("test", shard=Shard(rank=rank, world=2))) for rank in (0, 1)]
    seen = torch.cat([images for share in shares for images, _ in share])
    assert sorted(seen.sum(dim=(1, 2, 3)).tolist()) == sorted(source.sets["test"][0].sum(dim=(1, 2, 3)).tolist())
    images, labels = source.sets["train"]
    rows, columns = (images.mean(dim=dim).amax(dim=(1, 2)) for dim in (3, 2))
    assert torch.equal((columns > rows).long(), labels), "a horizontal bar is the brightest row"


def test_an_empty_split_is_refused_before_the_first_step(tmp_path, configs, monkeypatch, capsys):
    words = [*(item for item in SHORT if "subset" not in item), "data=bars", "data.num_test=0"]
    monkeypatch.setattr(sys, "argv", ["train.py", *MODEL, *words, f"runs={tmp_path}"])
    with pytest.raises(SystemExit):
        command.run(train.job, configs)
    assert "error: the split 'test' is empty: leave it out of eval_splits" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pt"))


def test_the_model_is_an_equilibrium_and_every_parameter_learns(configs):
    from phantom import DEQ, UPG

    torch.manual_seed(0)
    deq = DEQ(solver=FixedPoint(max_steps=200, tol=1e-6, lam=0.5), grad=UPG(k=5, lam=0.5))
    model = mine(configs, "conv_deq.ConvDEQ")(channels=4, in_channels=1, num_classes=2, deq=deq)
    with torch.no_grad():
        model.cell.conv.weight.mul_(0.1)
    images = torch.randn(2, 1, 8, 8)
    logits, (solution,) = model(images)
    z = solution.z_star
    assert bool(solution.stats.converged.all())
    torch.testing.assert_close(model.cell(z, model.stem(images)), z, rtol=0, atol=1e-3)
    logits.sum().backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in model.parameters())


def test_the_task_divides_sums(configs):
    task = mine(configs, "amounts.Regression")()
    output, values = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0.0, 0.0, 1.0])
    tally = task.score(lambda _: (output, ()), (None, values), None).tally
    assert task.report(tally) == pytest.approx({"loss": 21 / 3, "rmse": 7**0.5})
    amounts = mine(configs, "amounts.Amounts")(num_train=4, num_test=4, size=8, batch_size=4, seed=0)
    images, values = amounts.sets["train"]
    assert torch.allclose(values, torch.stack([(image**2).sum() / 64 for image in images]))


BARE = """
import torch
from torch import nn


class Bare(nn.Linear):
    kinds = ("image_classification",)

    def __init__(self, *, in_channels, num_classes, deq, returned):
        super().__init__(in_channels, num_classes)
        self.deq, self.returned = deq if returned else None, returned

    def forward(self, images):
        x = super().forward(images.mean(dim=(2, 3)))
        out = self.deq(lambda z: 0.5 * z + x, torch.zeros_like(x))
        return {"value": out.value, "out": out, "value, out": (out.value, out), "value, 1": (out.value, (1,))}[
            self.returned
        ]
"""
NEEDED = (
    "model: Bare.forward must return (output, solutions), where solutions is a tuple of the Solution of every solve: "
    "return logits, (solution,). It returns "
)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("", "model: Bare holds no DEQ: keep the argument `deq` as a child module, self.deq = deq"),
        ("value", f"{NEEDED}Tensor"),
        ("out", f"{NEEDED}Solution"),
        ("value, out", f"{NEEDED}Tensor, Solution"),
        ("value, 1", f"{NEEDED}Tensor, tuple"),
    ],
)
def test_a_model_without_its_duties_is_refused_in_one_sentence(
    tmp_path, configs, monkeypatch, capsys, returned, message
):
    (Path(configs.folder).parent / "mine/bare.py").write_text(BARE)
    (configs.folder / "model/bare.yaml").write_text(f"_target_: mine.bare.Bare\nreturned: '{returned}'\n")
    monkeypatch.setattr(sys, "argv", ["train.py", *SHORT, f"runs={tmp_path}", "model=bare"])
    with pytest.raises(SystemExit):
        command.run(train.job, configs)
    assert capsys.readouterr().err.strip() == f"error: {message}"
