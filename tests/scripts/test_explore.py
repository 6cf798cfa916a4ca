"""The comparison of estimators: cosines against a dense solve, costs by definition, the front, and the command."""

import io
import itertools
import json
import shlex
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from phantom import DEQ, UPG, Broyden, FixedPoint
from phantom.engine.artifacts import checkpoint
from phantom.engine.build import build_trainer
from phantom.engine.errors import ConfigError
from phantom.engine.rebuild import Rebuilt, begin_run
from phantom.engine.source import Shard
from phantom.engine.tasks.base import Score, Tally
from scripts import explore
from scripts.bench import explore as bench
from scripts.reporting import explore as page
from scripts.reporting import pages
from tests.plans import plan
from tests.tiny_run import MODEL, TINY, tiny_run
from train import CONFIGS

WIDTH, INPUTS, BATCH = 5, 3, 4
GRID = {"grad": "upg,npg,one_step,implicit", "k": "2,6", "lam": "0.7", "adjoint_solver.max_steps": "4"}


class Layer(nn.Module):
    """z = tanh(z W^T + x U^T), read out by v."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draws = (torch.randn(WIDTH, size, generator=generator, dtype=torch.float64) for size in (WIDTH, INPUTS, 1))
        W, U, v = draws
        self.W, self.U, self.v = (
            nn.Parameter(0.8 * W / torch.linalg.matrix_norm(W, 2)),
            nn.Parameter(U),
            nn.Parameter(v),
        )
        self.deq = DEQ(solver=Broyden(max_steps=60, tol=1e-12), grad=UPG(k=1, lam=1.0), confirm=False)

    def f(self, z, x):
        return torch.tanh(z @ self.W.T + x @ self.U.T)

    def forward(self, x):
        solution = self.deq(lambda z: self.f(z, x), x.new_zeros(len(x), WIDTH))
        return solution.value @ self.v, (solution,)


class Squares:
    unit = "points"

    def score(self, model, batch, carry):
        output, solutions = model(batch[0])
        return Score(Tally((output - batch[1]).square().sum(), len(output)), solutions, None)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(BATCH, size, generator=generator, dtype=torch.float64) for size in (INPUTS, 1))
        for _ in range(2)
    ]


def layer_run(solver=None) -> Rebuilt:
    model = Layer()
    source = SimpleNamespace(train=lambda **_: ([batch] for batch in batches()))
    deq = SimpleNamespace(solver=solver or model.deq.solver)
    return Rebuilt(SimpleNamespace(task=Squares(), deq=deq), model, source, torch.device("cpu"), Shard(), {})


def dense_gradient(model: Layer, batch, adjoint) -> torch.Tensor:
    """Return the gradient to W and U as one vector: adjoint(J, g) is u, from the dense J (B, D, D)."""
    x, y = batch
    with torch.no_grad():
        z = torch.zeros(BATCH, WIDTH, dtype=torch.float64)
        for _ in range(400):
            z = model.f(z, x)
        slope = 1 - z.square()
        u = adjoint(slope[:, :, None] * model.W, 2 * (z @ model.v - y) * model.v.T)
        return torch.cat([((u * slope).T @ z).flatten(), ((u * slope).T @ x).flatten()])


def exact(J, g):
    return torch.linalg.solve(torch.eye(WIDTH, dtype=J.dtype) - J.mT, g)


def neumann(k, lam):
    def adjoint(J, g):
        damped = (lam * J + (1 - lam) * torch.eye(WIDTH, dtype=J.dtype)).mT
        return lam * sum(torch.linalg.matrix_power(damped, i) @ g[:, :, None] for i in range(k))[..., 0]

    return adjoint


@pytest.fixture(scope="module")
def measured():
    return bench.measure(layer_run(), GRID, batches=2)


def test_cosine_and_norm_ratio_are_those_of_a_dense_solve(measured):
    """At an exact equilibrium NPG and UPG are the same matrix; one step is A(1, 1)."""
    rows, model = {row["estimator"]: row for row in measured["rows"]}, Layer()
    names = {f"grad={grad} k={k} lam=0.7": neumann(k, 0.7) for grad in ("upg", "npg") for k in (2, 6)}
    for name, adjoint in (names | {"grad=one_step": neumann(1, 1.0)}).items():
        pairs = [(dense_gradient(model, batch, adjoint), dense_gradient(model, batch, exact)) for batch in batches()]
        cosines = [float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for a, b in pairs]
        ratios = [float(a.norm() / b.norm()) for a, b in pairs]
        assert rows[name]["cosine"] == pytest.approx(sum(cosines) / 2, abs=1e-5), name
        assert rows[name]["norm_ratio"] == pytest.approx(sum(ratios) / 2, rel=1e-4), name
    assert rows["grad=npg k=2 lam=0.7"]["cosine"] < 0.999 < rows["grad=npg k=6 lam=0.7"]["cosine"] + 0.05


def test_costs_are_those_of_the_definitions(measured):
    rows = {row["estimator"]: row for row in measured["rows"]}
    counts = {name: (row["graph_evals"], row["vjps"]) for name, row in rows.items()}
    assert counts["grad=one_step"] == (1, 0)
    assert (counts["grad=upg k=2 lam=0.7"], counts["grad=upg k=6 lam=0.7"]) == ((2, 0), (6, 0))
    assert (counts["grad=npg k=2 lam=0.7"], counts["grad=npg k=6 lam=0.7"]) == ((1, 1), (1, 5))
    assert counts["grad=implicit adjoint_solver=broyden adjoint_solver.max_steps=4"] == (1, 4)
    state = 8 * BATCH * WIDTH  # bytes of one activation
    assert rows["grad=upg k=6 lam=0.7"]["bytes"] >= rows["grad=upg k=2 lam=0.7"]["bytes"] + 4 * state
    assert rows["grad=npg k=6 lam=0.7"]["bytes"] < rows["grad=npg k=2 lam=0.7"]["bytes"] + 4 * state
    assert all(row["seconds"] > 0 for row in rows.values())
    assert measured["examples"] == "2 training batches of 4 points"


def test_the_damping_of_the_spectrum_is_part_of_the_grid():
    run = layer_run()
    found = bench.measure(run, {"grad": "npg", "k": "3", "lam": "1.0,best"}, batches=1)
    names = [row["estimator"] for row in found["rows"]]
    assert names == ["grad=npg k=3 lam=1.0", f"grad=npg k=3 lam={found['best_lam']:g}"]
    x = batches()[0][0]
    z = run.model.deq(lambda z: run.model.f(z, x), x.new_zeros(BATCH, WIDTH)).z_star.detach()
    J = (1 - z.square())[:, :, None] * run.model.W.detach()
    eigenvalues = torch.linalg.eigvals(J)
    for lam, radius in found["radius"].items():
        dense = (float(lam) * eigenvalues + 1 - float(lam)).abs().amax(dim=1).mean()
        assert radius == pytest.approx(float(dense), rel=1e-6)


def test_shine_needs_the_steps_of_broyden():
    run = layer_run(solver=FixedPoint(max_steps=60, tol=1e-12))
    assert "grad=shine" not in bench.estimators({"k": "1", "lam": "1.0"}, 0.5, run.plan.deq.solver)
    once = bench.estimators({"grad": "upg", "k": "3", "lam": "best,1.0"}, 1.0, run.plan.deq.solver)
    assert list(once) == ["grad=upg k=3 lam=1.0"]
    with pytest.raises(ConfigError, match="needs a run with solver=broyden"):
        bench.estimators({"grad": "shine"}, 0.5, run.plan.deq.solver)


def row(name, seconds, cosine):
    return {"estimator": name, "seconds": seconds, "cosine": cosine}


def test_the_front_and_the_cheapest():
    rows = [row("a", 1.0, 0.5), row("b", 2.0, 0.4), row("c", 3.0, 0.9), row("d", 3.0, 0.95), row("e", 0.1, None)]
    assert [found["estimator"] for found in page.front(rows)] == ["a", "d"], "b costs more for less, c ties in time"
    assert page.cheapest(rows, 0.4)["estimator"] == "a" and page.cheapest(rows, 0.92)["estimator"] == "d"
    assert page.cheapest(rows, 0.96) is None


def test_without_a_finite_cosine_the_page_is_kept_and_nothing_is_drawn(tmp_path):
    spent = {"graph_evals": 1, "vjps": 0, "norm_ratio": None, "adjoint_residual": None}
    rows = [row(name, 1.0, None) | spent for name in ("grad=upg k=2 lam=0.5", "grad=implicit")]
    about = {"title": "T", "command": "c", "step": 0, "examples": "x", "device": "cpu", "radius": {}, "wanted": 0.9}
    solved = {"residual": 0.1, "reference": {"vjps": 1, "adjoint_residual": None}, "solvers": [{"residual": {}}]}
    solved["solvers"][0]["solver"] = "Broyden"
    path = tmp_path / "found.json"
    path.write_text(json.dumps(about | solved | {"rows": rows}))
    text = pages.write_explored(path)
    assert path.with_suffix(".md").read_text() == text and "None has a cosine of 0.9." in text
    assert not path.with_suffix(".png").exists()
    assert page.family("grad=upg k=2 lam=0.5") == "upg" and page.family("UPG, k=5") == "UPG"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explore")
    trainer = build_trainer(plan([*TINY, "steps=1", f"runs={folder}"]))
    trainer.fit(resume=False)
    return trainer.folder


@pytest.fixture(scope="module")
def explored(folder):
    """Return an exploration of a run, and what was printed."""
    out, grid = folder / "found.json", ["grad=upg,npg,shine", "k=2", "lam=0.5"]
    with redirect_stdout(io.StringIO()) as printed:
        explore.main([f"run={folder}", "batches=1", "solver.max_steps=12", *grid, "cosine=0.999", f"out={out}"])
    return json.loads(out.read_text()), printed.getvalue()


def test_of_a_run_the_page_and_the_figure_are_kept(folder, explored):
    found, printed = explored
    out = folder / "found.json"
    assert found["step"] == 1 and found["examples"] == "1 training batch of 8 images"
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    text = out.with_suffix(".md").read_text()
    assert text == printed.rstrip("\n") + "\n"
    for name in ("grad=upg k=2 lam=0.5", "grad=npg k=2 lam=0.5", "grad=shine"):
        assert f"| {name} |" in text
    assert "None has a cosine of 0.999; the nearest is `grad=" in text
    for solver in found["solvers"]:
        assert all(a >= b for a, b in itertools.pairwise(solver["residual"].values())), "a best iterate gets no worse"


def test_of_a_model_the_weights_are_those_that_a_run_begins_with(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(explore.explore, "measure", lambda run, grid, batches: seen.update(run=run) or {})
    monkeypatch.setattr(explore.page, "render", lambda found: seen.update(command=found["command"]) or "")
    items = [item for item in TINY if item.split("=")[0] not in ("log_every", "eval_every")]
    explore.main([*items, "seed=3", "grad=npg"])
    begun = build_trainer(plan([*TINY, "seed=3", f"runs={tmp_path}"])).unwrapped.state_dict()
    weights = seen["run"].model.state_dict()
    assert weights.keys() == begun.keys() and all(torch.equal(weights[name], begun[name]) for name in begun)
    words = shlex.split(seen["command"])
    assert shlex.join(words) == seen["command"] and {"grad=npg", MODEL[0]} <= set(words), "a shell reads it as typed"


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["run=none"], "no run folder"),
        (["checkpoint=best", "model=mdeq_tiny"], "name it with run=<folder>"),
        (["cosine=2"], "cosine=2 must be a number above 0, at most 1"),
        (["out=page.md"], "must be a file that ends in .json"),
        ([*MODEL, "subset=8", "wandb=disabled", "grad=upgg"], "grad=upgg is not known; did you mean upg"),
    ],
)
def test_mistakes_are_one_sentence(items, message):
    with pytest.raises(SystemExit, match=message):
        explore.main(items)


def test_the_page_that_is_printed_is_the_one_that_is_kept(tmp_path, monkeypatch, capsys):
    measure = bench.measure

    def overflowing(*args):
        found = measure(*args)
        found["rows"][0] |= {"cosine": float("nan"), "norm_ratio": float("nan"), "seconds": 0.0}
        return found | {"residual": float("nan")}

    monkeypatch.setattr(bench, "measure", overflowing)
    out = tmp_path / "page.json"
    explore.main([*TINY, "batches=1", "grad=npg", "k=1,2", "lam=0.5", "cosine=1", f"out={out}"])
    printed = capsys.readouterr().out
    assert printed.rstrip("\n") == out.with_suffix(".md").read_text().rstrip("\n")
    assert "median forward residual --." in printed and "; the nearest is `grad=npg k=2 lam=0.5` with" in printed


@pytest.mark.parametrize(("residual", "said"), [(None, True), (0.1, True), (0.09, False)])
def test_a_state_that_is_no_equilibrium_is_told(explored, residual, said):
    found, _ = explored
    assert ("This is no equilibrium" in page.render(found | {"residual": residual})) == said


def test_a_config_begins_with_the_weights_of_init(tmp_path):
    run = tiny_run(tmp_path, "steps=1")["path"]
    items = [*TINY, f"init={run / 'last.pt'}"]
    found = begin_run(items, CONFIGS, load_reference=None)
    weights = checkpoint.load(run / "last.pt")["model"]
    assert all(torch.equal(value, weights[name]) for name, value in found.model.state_dict().items())
    assert found.about["init"] == str(run / "last.pt")
    with pytest.raises(ConfigError, match="name it with run=<folder>"):
        begin_run([*TINY, f"continue_from={run}"], CONFIGS, load_reference=None)


def test_the_summary_sets_explorations_beside_each_other():
    def record(title, **cosines):
        rows = [{"estimator": f"grad={name} k=1", "cosine": cosine} for name, cosine in cosines.items()]
        return {
            **{"title": title, "rows": rows, "radius": {"1": 1.234}, "residual": 1e-3, "commit": "0123456789"},
            **{"dirty": False, "reference": {"adjoint_residual": 2e-6}},
        }

    one, two = record("A", upg=0.5, npg=0.25, shine=0.1), record("B", npg=None, upg=-0.75)
    text = page.summary("Title", {"one": one, "two": two})
    assert "| [one](one.md) | A | 1.23 | 1.0e-03 | 2.0e-06 |" in text
    assert "| grad=upg k=1 | 0.500 | -0.750 |\n| grad=npg k=1 | 0.250 | -- |" in text and "shine" not in text
    assert page.is_labelled(one) and not page.is_labelled(one | {"rows": [{"estimator": "one step"}]})
