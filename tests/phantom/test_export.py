"""torch.export and ONNX record a solve that never asks the host, for every batch size; they refuse another one."""

import io

import pytest
import torch
from torch import Tensor, nn

from phantom import BPTT, DEQ, NPG, UPG, Anderson, Broyden, FixedPoint, Rollout
from tests.phantom.problems import TanhMap, randn

SAME = 1e-12
SOLVERS = {
    "plain": FixedPoint(max_steps=3, tol=None, lam=0.7),
    "anderson": Anderson(max_steps=3, tol=None, memory=2),
    "broyden": Broyden(max_steps=3, tol=None, memory=2),
    "plain_held": FixedPoint(max_steps=20, tol=1e-2, sync_every=None),
    "broyden_held": Broyden(max_steps=9, tol=1e-4, sync_every=None, stop="absolute"),
}


class Model(nn.Module):
    """An equilibrium of a tensor (B, 4), or of a dict of an image (B, 1, 1, 3) and a tensor (B, 1)."""

    def __init__(self, deq: DEQ, *, parts: bool = False) -> None:
        super().__init__()
        self.cell, self.deq, self.parts = TanhMap(4, seed=1), deq, parts

    def forward(self, x: Tensor) -> Tensor:
        f = self.cell.bind(x)
        if not self.parts:
            return self.deq(f, torch.zeros_like(x)).value

        def f_parts(z: dict[str, Tensor]) -> dict[str, Tensor]:
            image, rest = f(torch.cat((z["image"].flatten(1), z["rest"]), 1)).split([3, 1], 1)
            return {"image": image[:, None, None], "rest": rest}

        image, rest = torch.zeros_like(x).split([3, 1], 1)
        value = self.deq(f_parts, {"image": image[:, None, None], "rest": rest}).value
        return torch.cat((value["image"].flatten(1), value["rest"]), 1)


def program_of(model: nn.Module) -> torch.export.ExportedProgram:
    batch = {"x": {0: torch.export.Dim("batch")}}
    return torch.export.export(model, (randn(5, 4, seed=2),), dynamic_shapes=batch)


def exported(model: nn.Module) -> nn.Module:
    return program_of(model).module()


def check(model: nn.Module, recorded: nn.Module, *, same: float = SAME) -> None:
    for batch in (1, 3, 8):
        x = 2 * randn(batch, 4, seed=batch)
        torch.testing.assert_close(recorded(x), model(x), rtol=same, atol=same)
    assert (model(x) - model(torch.zeros_like(x))).abs().max() > 0.1


@pytest.mark.parametrize("name", SOLVERS)
def test_an_exported_model_has_the_numbers_of_eager(name):
    model = Model(DEQ(solver=SOLVERS[name], grad=UPG(k=2)))
    recorded = exported(model)
    check(model, recorded)
    x = randn(3, 4, seed=9)
    gradients = [
        torch.autograd.grad(each(x).square().sum(), list(each.parameters()), materialize_grads=True)
        for each in (model, recorded)
    ]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=SAME, atol=SAME)


@pytest.mark.parametrize(
    ("solver", "grad", "parts"),
    [
        (SOLVERS["plain"], NPG(), False),
        (SOLVERS["broyden"], UPG(), True),
        (Rollout(max_steps=2), UPG(), True),
        (Rollout(max_steps=2), BPTT(num_steps=2), False),
    ],
    ids=["plain", "broyden of a dict", "rollout of a dict", "rollout"],
)
def test_inference_is_exported_and_saved(solver, grad, parts):
    model, file = Model(DEQ(solver=solver, grad=grad), parts=parts), io.BytesIO()
    with torch.no_grad():
        torch.export.save(program_of(model), file)
        file.seek(0)
        check(model, torch.export.load(file).module())


def test_no_evaluation_is_recorded_for_statistics_alone():
    with torch.no_grad():
        recorded = exported(Model(DEQ(solver=SOLVERS["plain"])))
    code = "".join(part.code for part in recorded.modules() if isinstance(part, torch.fx.GraphModule))
    assert code.count("aten.tanh") == SOLVERS["plain"].max_steps + 1


def test_a_tolerance_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"a fixed number of steps, and solver\.tol=0\.001 .* with tol=None"):
        exported(Model(DEQ(solver=FixedPoint(max_steps=3, tol=1e-3))))


@pytest.mark.parametrize("solver", [SOLVERS["plain"], SOLVERS["broyden"]], ids=["plain", "broyden"])
def test_onnx_has_the_numbers_of_eager(solver, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = Model(DEQ(solver=solver))
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            (randn(5, 4, seed=2),),
            dynamo=True,
            dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
        program.save(tmp_path / "model.onnx")
        session = runtime.InferenceSession(tmp_path / "model.onnx")
        # the number 0.7 of the damped iteration is a float32 there
        name = session.get_inputs()[0].name
        check(model, lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), same=1e-7)
