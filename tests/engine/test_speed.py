"""What a run does to be fast: chosen by itself on a GPU, and nothing on a CPU."""

import logging
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from models.mdeq.cell import ResidualBlock
from models.mdeq.convolution import Padded
from phantom import DEQ, Broyden, FixedPoint, Implicit, OneStep
from phantom.engine import build, speed
from phantom.engine.build import build_trainer
from phantom.engine.errors import ConfigError
from phantom.engine.machine.precision import settle
from phantom.engine.speed import (
    COMPILE_PAYS,
    GRAPH_PAYS,
    Speed,
    check_speed,
    choose_speed,
    obstacles_to_graphs,
    speed_up,
)
from phantom.engine.training.rules import Rules
from tests.engine import tiny
from tests.plans import plan

UNSET = {
    **{"speed": "auto", "compile": None, "cuda_graph": None},
    **{"penalty": None, "jitter": None, "course": None, "accumulate": 1},
}


class Fusible:
    def fuse(self):
        raise AssertionError("choosing changes nothing")


class Paddable:
    def pad(self):
        raise AssertionError("choosing changes nothing")


CELL = object()


@pytest.fixture
def choose(monkeypatch):
    """Return the choice for a plan of these keys: whether f is compiled, steps are graphs, and kernels serve."""

    def choice(*, device="cuda", world_size=1, steps=COMPILE_PAYS, cell=CELL, solver=None, compiler=True, **keys):
        monkeypatch.setattr(speed, "can_compile", lambda device: compiler)
        task = SimpleNamespace(fixed_shapes=True)
        made = SimpleNamespace(config=UNSET | keys, task=task, deq=SimpleNamespace(solver=solver))
        found = choose_speed(made, SimpleNamespace(cell=cell), steps, torch.device(device), world_size)
        return (found.compile, found.cuda_graph, found.kernels), str(found)

    return choice


@pytest.mark.parametrize(
    ("given", "expected", "sentence"),
    [
        ({}, (True, True, False), "f is compiled, steps are CUDA graphs"),
        ({"device": "cpu"}, (False, False, False), "f runs as written .there is nothing to choose on a CPU"),
        ({"device": "cpu", "compile": True}, (True, False, False), "f is compiled"),
        ({"speed": "off"}, (False, False, False), "speed=off"),
        (
            {"speed": "off", "cuda_graph": True},
            (False, True, False),
            "steps are CUDA graphs, where a solve takes all its max_steps .speed=off",
        ),
        ({"steps": COMPILE_PAYS - 1}, (False, True, False), f"{COMPILE_PAYS - 1} steps do not earn the time to"),
        ({"steps": GRAPH_PAYS - 1}, (False, False, False), f"{GRAPH_PAYS - 1} steps do not earn a graph"),
        ({"steps": 3, "compile": True, "cuda_graph": True}, (True, True, False), "f is compiled, steps are CUDA"),
        ({"compile": False}, (False, True, False), "steps are CUDA graphs"),
        ({"world_size": 8}, (True, False, False), "CUDA graphs take one process"),
        ({"penalty": {}}, (True, False, False), "CUDA graphs need penalty=null"),
        ({"compiler": False}, (False, True, False), "torch cannot compile here"),
        ({"cell": None}, (False, True, False), "the model has no module `cell`"),
        ({"cell": Fusible()}, (True, True, False), "f is compiled, steps are CUDA graphs"),
        ({"speed": "kernels", "cell": Fusible()}, (False, True, True), "own kernels .speed=kernels"),
        ({"speed": "kernels", "cell": Fusible(), "compile": True}, (True, True, True), "f is compiled"),
        ({"speed": "kernels", "solver": Broyden()}, (True, True, True), "f is compiled, .* max_steps, own kernels"),
        (
            {"speed": "kernels", "solver": Broyden(), "cell": Fusible()},
            (False, True, True),
            "own kernels .speed=kernels",
        ),
    ],
    ids=lambda value: None if isinstance(value, tuple | str) else "-".join(value) or "default",
)
def test_the_choice(given, expected, sentence, choose):
    found, text = choose(**given)
    assert found == expected
    assert re.search(sentence, text), text


def test_padding_is_as_auto_and_needs_a_cell_that_pads(choose):
    for steps, on in ((COMPILE_PAYS, True), (GRAPH_PAYS - 1, False)):
        found, text = choose(speed="padded", cell=Paddable(), steps=steps)
        assert found == (on, on, False) and "padded channels (" in text
    for cell in (CELL, None):
        with pytest.raises(ConfigError, match="speed=padded needs a model whose cell pads its channels"):
            choose(speed="padded", cell=cell)


def test_kernels_need_a_cell_or_a_solver_that_has_them(choose):
    with pytest.raises(
        ConfigError, match=r"speed=kernels needs a model whose cell has kernels.*, or solver=broyden: use"
    ):
        choose(speed="kernels")


def test_on_a_cpu_it_is_one_line_and_nothing_else(tmp_path, caplog):
    tiny = ["subset=32", "test_subset=16", "steps=1", f"runs={tmp_path}", "device=cpu"]
    with caplog.at_level(logging.INFO):
        trainers = [build_trainer(plan([*tiny, *more])) for more in ([], ["speed=off"])]
    lines = [record.message for record in caplog.records if record.message.startswith("speed: ")]
    assert lines[0] == "speed: f runs as written (there is nothing to choose on a CPU)"
    weights = [torch.cat([p.flatten() for p in trainer.unwrapped.parameters()]) for trainer in trainers]
    assert torch.equal(*weights)
    assert trainers[0].folder == trainers[1].folder, "how fast a run is does not make it another one"


@pytest.mark.parametrize("asked", ["kernels", "padded"])
def test_what_needs_a_gpu_is_refused_on_a_cpu_before_the_data_are_read(asked, tmp_path):
    with pytest.raises(ConfigError, match=f"speed={asked} needs a GPU"):
        build_trainer(plan(["data=cifar10", "data.root=nowhere", f"speed={asked}", f"runs={tmp_path}", "device=cpu"]))


def test_kernels_without_triton_are_refused_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match="speed=kernels: the kernels need Triton"):
        check_speed({"cuda_graph": None, "speed": "kernels"}, torch.device("cuda"), 1)


def test_a_cuda_graph_is_of_one_process_on_a_gpu():
    asked = {"cuda_graph": True, "speed": "auto", "compile": None, "solver": {}, "grad": {}, "eval_solver": None}
    check_speed(asked, torch.device("cuda"), 1)
    for device, world_size in (("cuda", 2), ("cpu", 1)):
        with pytest.raises(ConfigError, match="cuda_graph=true needs a GPU and one process"):
            check_speed(asked, torch.device(device), world_size)


@pytest.mark.parametrize("tol", ["1e-3", "null"])
def test_a_tolerance_is_no_obstacle_to_graphs(tol, tmp_path):
    made = plan([f"solver.tol={tol}", "grad=implicit", f"adjoint_solver.tol={tol}", f"runs={tmp_path}"])
    assert obstacles_to_graphs(made.config, made.task) == []
    made = plan([f"solver.tol={tol}", "accumulate=2", f"runs={tmp_path}"])
    assert obstacles_to_graphs(made.config, made.task) == ["accumulate=1"]


def test_precision_is_settled_by_the_machine(monkeypatch, tmp_path):
    for there, expected in ((False, "fp32"), (True, "tf32")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert plan([f"runs={tmp_path}"]).config["precision"] == expected
        assert settle("auto", "cpu") == "fp32"
        for asked in ("fp32", "tf32", "bf16"):
            assert settle(asked, "auto") == asked


def test_a_run_that_compiles_f_compiles_its_solvers(monkeypatch, tmp_path):
    chosen = Speed(compile=True, cuda_graph=False, kernels=False, padded=False, reason="a test")
    monkeypatch.setattr(build, "choose_speed", lambda *_, **__: chosen)
    monkeypatch.setattr(speed, "compile_cell", lambda model: None)
    trainer = build_trainer(plan(["grad=implicit", "subset=32", "steps=1", f"runs={tmp_path}", "device=cpu"]))
    deq = trainer.unwrapped.deq
    assert deq.solver.compile and deq.grad.solver.compile
    assert trainer.rules.solver.compile and trainer.rules.grad.solver.compile
    assert not deq.solver.kernels and trainer.speed == chosen


def test_a_run_with_kernels_has_them_in_its_cell_and_in_broyden_alone(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    chosen = Speed(compile=False, cuda_graph=False, kernels=True, padded=False, reason="a test")
    monkeypatch.setattr(build, "choose_speed", lambda *_, **__: chosen)
    line = ["grad=implicit", "eval_solver=anderson", "subset=32", "steps=1", f"runs={tmp_path}", "device=cpu"]
    trainer = build_trainer(plan(line))
    deq = trainer.unwrapped.deq
    assert deq.solver.kernels and deq.grad.solver.kernels and not deq.solver.compile
    assert trainer.rules.solver.kernels and trainer.rules.grad.solver.kernels
    assert not hasattr(deq.eval_solver, "kernels")
    assert all(block.fused for block in trainer.unwrapped.modules() if isinstance(block, ResidualBlock))


def test_a_run_that_pads_has_a_cell_that_pads(monkeypatch, tmp_path):
    chosen = Speed(compile=False, cuda_graph=False, kernels=False, padded=True, reason="a test")
    monkeypatch.setattr(build, "choose_speed", lambda *_, **__: chosen)
    trainer = build_trainer(plan(["subset=32", "steps=1", f"runs={tmp_path}", "device=cpu"]))
    assert isinstance(trainer.unwrapped.cell.post_fuse[0].convolution, Padded)


@pytest.mark.parametrize(
    "grad", [tiny.GRAD, Implicit(solver=FixedPoint(max_steps=4, tol=None))], ids=["tiny", "implicit"]
)
def test_the_layers_of_the_config_are_sped_up_and_go_on_to_be_governed(grad, monkeypatch):
    model = tiny.Classifier()
    model.deq = DEQ(solver=tiny.SOLVER, grad=grad, eval_solver=FixedPoint(max_steps=9), confirm=False)
    model.inner = DEQ(solver=FixedPoint(max_steps=3, tol=None), grad=OneStep())
    own = (model.inner.solver, model.inner.grad)
    chosen = Speed(compile=True, cuda_graph=False, kernels=False, padded=False, reason="a test")
    monkeypatch.setattr(speed, "compile_cell", lambda model: None)
    rules = speed_up(model, Rules(solver=tiny.SOLVER, grad=grad, seed=0), chosen)
    assert rules.govern(model.deq) and model.deq.solver is rules.solver and model.deq.grad is rules.grad
    assert model.deq.solver.compile and model.deq.eval_solver.compile
    assert not hasattr(grad, "solver") or model.deq.grad.solver.compile
    assert (model.inner.solver, model.inner.grad) == own and not rules.govern(model.inner)
