"""On a GPU: the numbers of the CPU, no waiting in a fixed budget, graphs that replay the eager step.

Run them with `bash scripts/test.sh tests/gpu`; without a GPU they are skipped.
"""

import json
from dataclasses import replace

import pytest
import torch

from models.mdeq.model import MDEQ
from phantom import DEQ, NPG, UPG, Anderson, Broyden, FixedPoint, Implicit
from phantom.engine import build
from phantom.engine.build import build_trainer
from phantom.engine.measure.timing import StepTimer
from phantom.engine.tasks.base import Score
from phantom.engine.tasks.images import ImageClassification
from phantom.engine.training.cuda_graph import WARM_UP_STEPS, StepGraphs
from scripts import benchmark
from scripts.bench import measure, variants
from scripts.reporting import limits
from tests.plans import plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
SOLVERS = {
    "broyden": Broyden(max_steps=9, tol=None),
    "broyden_ring": Broyden(max_steps=9, tol=None, memory=4),
    "anderson": Anderson(max_steps=9, tol=None, memory=4),
    "fixed_point": FixedPoint(max_steps=9, tol=None, lam=0.6),
}
ESTIMATORS = {
    "upg": UPG(k=3, lam=0.5),
    "upg_checkpoint": UPG(k=3, lam=0.5, checkpoint=True),
    "npg": NPG(k=3, lam=0.5),
    "implicit": Implicit(solver=Broyden(max_steps=8, tol=None)),
}


def tiny(*, solver=SOLVERS["broyden"], grad=ESTIMATORS["upg"], dropout: float = 0.0) -> MDEQ:
    torch.manual_seed(0)
    return MDEQ(
        in_channels=3,
        num_classes=10,
        channels=[8, 8],
        head_channels=[2, 4],
        final_channels=20,
        num_downsamples=0,
        expansion=2,
        num_groups=4,
        num_blocks=1,
        dropout=dropout,
        init="default",
        channels_last=True,
        deq=DEQ(solver=solver, grad=grad),
    )


def batch(count: int = 6, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=draws, dtype=dtype)
    return images, torch.randint(10, (count,), generator=draws)


def gradients(model: MDEQ, images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    logits, _ = model(images)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("grad", ESTIMATORS.values(), ids=ESTIMATORS)
def test_numbers_of_the_cpu(solver, grad):
    images, labels = batch(dtype=torch.float64)
    expected = gradients(tiny(solver=solver, grad=grad).double(), images, labels)
    found = gradients(tiny(solver=solver, grad=grad).double().to(GPU), images.to(GPU), labels.to(GPU))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-7, atol=1e-9)


NEVER_ASKED = {name: replace(solver, tol=1e-3, sync_every=None) for name, solver in SOLVERS.items()}
HELD = NEVER_ASKED["broyden"]


@pytest.mark.parametrize(
    "solver", [*SOLVERS.values(), *NEVER_ASKED.values()], ids=[*SOLVERS, *(f"{n}_to_tol" for n in SOLVERS)]
)
@pytest.mark.parametrize("grad", [*ESTIMATORS.values(), Implicit(solver=HELD)], ids=[*ESTIMATORS, "implicit_to_tol"])
def test_a_solve_that_never_asks_never_waits(solver, grad):
    model, (images, labels) = tiny(solver=solver, grad=grad).to(GPU), batch()
    images, labels = images.to(GPU), labels.to(GPU)
    gradients(model, images, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(model, images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def stepper(model: MDEQ, timer: StepTimer):
    def step(inputs) -> Score:
        score = ImageClassification().score(model, inputs, None)
        score.tally.loss_sum.backward()
        return Score(score.tally.detach(), score.solutions, None)

    for deq in (model.deq,):
        deq.clock = timer.phase
    return step


def run(
    count: int, *, graphs: bool, grad, dropout: float = 0.0, solver=SOLVERS["broyden"]
) -> tuple[list[float], MDEQ, StepTimer]:
    model, timer = tiny(solver=solver, grad=grad, dropout=dropout).to(GPU), StepTimer(GPU, warmup=0)
    step = stepper(model, timer)
    if graphs:
        step = StepGraphs(step, deqs=[model.deq], parameters=list(model.parameters()), timer=timer)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    torch.manual_seed(5)
    losses = []
    for i in range(count):
        images, labels = batch(4 if i % 4 == 3 else 6, seed=i)  # every fourth batch is short
        score = step((images.to(GPU), labels.to(GPU)))
        losses.append(score.tally.loss_sum)
        optimizer.step()
        optimizer.zero_grad()
        timer.end_step(len(labels))
    return [float(loss) for loss in losses], model, timer


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("grad", ESTIMATORS.values(), ids=ESTIMATORS)
def test_replayed_steps_are_the_eager_ones(grad, dropout):
    count = 4 * WARM_UP_STEPS + 8
    eager, plain, _ = run(count, graphs=False, grad=grad, dropout=dropout)
    replayed, graphed, timer = run(count, graphs=True, grad=grad, dropout=dropout)
    assert replayed == pytest.approx(eager, rel=1e-3)
    assert len(set(replayed)) == count, "every batch has a loss of its own"
    for a, b in zip(graphed.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
    times, _ = timer.recent()
    assert {"solve", "attach"} <= set(times), "a replay times its phases"
    assert all(seconds > 0 for seconds in times.values())


@pytest.mark.parametrize(
    "grad", [ESTIMATORS["npg"], Implicit(solver=replace(HELD, sync_every=1))], ids=["npg", "implicit"]
)
def test_a_tolerance_stays_under_capture(grad):
    """Eager steps ask, and stop early; replayed ones have the same numbers."""
    asks = Broyden(max_steps=30, tol=1e-2)
    eager, _, _ = run(4 * WARM_UP_STEPS + 8, graphs=False, grad=grad, solver=asks)
    replayed, _, _ = run(4 * WARM_UP_STEPS + 8, graphs=True, grad=grad, solver=asks)
    assert replayed == pytest.approx(eager, rel=1e-3)


@pytest.mark.parametrize(
    "options", [["cuda_graph=true"], ["compile=true"], ["compile=true", "cuda_graph=true"]], ids=str
)
def test_a_run_is_the_same_under_every_speed_option(tmp_path, options):
    losses = {}
    for name, extra in (("plain", []), ("fast", options)):
        trainer = make_trainer(tmp_path / name, *extra)
        trainer.fit(resume=False)
        rows = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["loss"] for row in rows if row["kind"] == "train"]
        assert {"solve", "attach", "backward", "optimizer", "step"} <= set(trainer.timer.summary())
    assert len(losses["fast"]) == 16
    # rounding differs: at blank pixels ReLU has ties, and the first gradient in float32 is 0.4 % off that in float64,
    # eager too. Training amplifies it
    assert losses["fast"][0] == pytest.approx(losses["plain"][0], rel=1e-5)
    assert losses["fast"][:5] == pytest.approx(losses["plain"][:5], rel=2e-2)
    assert losses["fast"] == pytest.approx(losses["plain"], rel=0.1)


def make_trainer(folder, *options: str):
    job = [
        *("data=digits", "solver.tol=null", "epochs=2", "precision=fp32", "device=cuda", "log_every=1"),
        *("wandb=disabled", "progress=false", f"runs={folder}", "optimizer.lr=0.01", "subset=500"),
        *options,
    ]
    trainer = build_trainer(plan(job))
    trainer.folder.mkdir(parents=True)
    return trainer


@pytest.mark.parametrize("options", [[], ["clipping=total", "clipping.max_norm=1.0"], ["ema=0.9"]], ids=str)
def test_a_training_step_never_waits(tmp_path, options):
    trainer = make_trainer(tmp_path, "log_every=1000", "eval_every=1000", *options)
    ordinary = trainer._train_step

    def watched(*arguments) -> None:
        # the first steps allocate the state of the optimiser
        torch.cuda.set_sync_debug_mode("error" if trainer.step > 2 else "default")
        try:
            ordinary(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer._train_step = watched
    trainer.fit(resume=False)
    assert trainer.step == 16


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_solver_products_stay_float32(precision):
    """Under TF32 and bfloat16 the solver's own products keep float32: one step of a linear map by hand."""
    build.precision.set_up(precision, deterministic=False)
    try:
        draws = torch.Generator().manual_seed(0)
        matrix = torch.randn(512, 512, generator=draws).to(GPU) / 40
        z0, x = torch.zeros(4, 512, device=GPU), torch.randn(4, 512, generator=draws).to(GPU)
        residuals = {}
        for dtype in (torch.float32, torch.float64):
            f = _linear(matrix.to(dtype), x.to(dtype))
            deq = DEQ(solver=Broyden(max_steps=10, tol=None, stop="absolute"), grad=UPG(k=1, lam=1.0))
            with torch.no_grad():
                residuals[dtype] = deq(f, z0.to(dtype)).stats.trace.double()
        torch.testing.assert_close(residuals[torch.float32], residuals[torch.float64], rtol=1e-3, atol=1e-4)
    finally:
        build.precision.set_up("fp32", deterministic=False)


def _linear(matrix: torch.Tensor, x: torch.Tensor):
    # elementwise, so that f itself is exact under every precision
    return lambda z: (z[:, None, :] * matrix).sum(-1) + x


@pytest.mark.parametrize("options", [[], ["compile=true"]], ids=str)
def test_the_benchmark_replays_its_steps(options):
    """A step before the capture must leave no graph alive: its nodes belong to another stream."""
    sizes = ["batch=4", "size=16", "k=2", "lam=0.5", "solver.max_steps=4", "adjoint_solver.max_steps=4"]
    ours = ["model=mdeq_tiny", "grad=upg,implicit", "cuda_graph=true", "precision=tf32", *sizes, *options]
    rows = benchmark.main([*ours, "repeats=2"])["rows"]
    assert len(rows) == 4, "each with its floor"
    assert all(row["seconds"][phase]["low"] > 0 for row in rows for phase in ("solve", "backward"))
    for row in rows[::2]:  # the work of an eager step, counted, takes at least its limit
        found = limits.limits(row, limits.Card(bandwidth=1e15, flops=dict.fromkeys(("fp32", "tf32", "bf16"), 1e18)))
        assert found is not None and 0 < max(found) < row["seconds"]["total"]["median"]


def test_work_is_counted_as_on_a_cpu():
    """FLOPs do not depend on the device, and bytes hardly: what differs are the buffers of its own kernels."""
    (setting,) = variants.settings(["model=mdeq_tiny", "batch=2", "size=8", "solver.max_steps=2", "precision=fp32"])
    cpu, gpu = (measure.trace(variants.make(setting, torch.device(name))) for name in ("cpu", "cuda"))
    assert gpu["flops"] == cpu["flops"] and gpu["moved_bytes"] == pytest.approx(cpu["moved_bytes"], rel=0.1)


def test_a_replayed_run_stops_at_its_target(tmp_path):
    trainer = make_trainer(tmp_path, "cuda_graph=true", "target=5", "eval_every=6")
    trainer.fit(resume=False)
    assert trainer.reached and trainer.step in (6, 12)
    watch = trainer.stopwatch
    assert 0 < trainer.timer.summary()["step"]["median"] * (trainer.step - 4) < watch.training < watch.total
