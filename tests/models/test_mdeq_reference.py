"""MDEQ-Tiny against arrays recorded from the official code, in float64.

The folder of the arrays is named by PHANTOM_REFERENCE; without it these tests are skipped.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from models.mdeq.model import MDEQ
from models.official.load import load_reference
from models.official.mdeq import rename_mdeq
from phantom import DEQ, NPG, UPG, Broyden, FixedPoint, GradientEstimator, Implicit, fixed_point

FOLDER = os.environ.get("PHANTOM_REFERENCE")
FILE = Path(FOLDER or ".") / "mdeq_tiny.npz"
pytestmark = pytest.mark.skipif(
    not (FOLDER and FILE.is_file()), reason="PHANTOM_REFERENCE does not name a folder with mdeq_tiny.npz"
)

NO_SOLVE = FixedPoint(max_steps=0, tol=None)


@pytest.fixture(scope="module")
def arrays():
    with np.load(FILE) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture
def model(arrays):
    model = MDEQ(
        in_channels=3,
        num_classes=10,
        channels=(24, 24),
        head_channels=(8, 16),
        final_channels=200,
        num_downsamples=0,
        expansion=5,
        num_groups=8,
        num_blocks=1,
        dropout=0.0,
        init="normal",
        channels_last=False,
        deq=DEQ(solver=Broyden(max_steps=22, tol=None, stop="absolute"), grad=UPG(k=5, lam=0.5)),
    ).double()
    load_reference(model, section(arrays, "sd/"), "phantom_grad")
    return model


def section(arrays, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): torch.tensor(arrays[name]) for name in arrays if name.startswith(prefix)}


def branches(arrays, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(arrays[f"{name}_0"]), torch.tensor(arrays[f"{name}_1"])


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_stem_cell_and_head(model, arrays, mode):
    model.train(mode == "train")
    z = branches(arrays, "z_rand")
    with torch.no_grad():
        u = model.stage0(model.stem(torch.tensor(arrays["x"])))
        assert relative(u, torch.tensor(arrays[f"injection_{mode}"])) < 1e-12
        f = model.cell.bind((u, None))
        for value, expected in zip(f(z), branches(arrays, f"cell_{mode}"), strict=True):
            assert relative(value, expected) < 1e-12
        for i, expected in enumerate(branches(arrays, f"cell_{mode}_block")):
            block = model.cell.branches[i][0]
            assert relative(block(z[i], block.bind((u, None)[i], None)), expected) < 1e-12
        assert relative(model.head(z), torch.tensor(arrays[f"head_{mode}_at_zrand"])) < 1e-12


def test_cell_with_dropout_masks(model, arrays):
    masks = tuple((mask,) for mask in branches(arrays, "dropmask"))
    with torch.no_grad():
        f = model.cell.bind((torch.tensor(arrays["injection_train"]), None), masks=masks)
        for value, expected in zip(f(branches(arrays, "z_rand")), branches(arrays, "cell_train_drop"), strict=True):
            assert relative(value, expected) < 1e-12


@pytest.mark.parametrize(
    ("name", "grad"),
    [
        ("upg", UPG(k=5, lam=0.5)),
        ("npg", NPG(k=5, lam=0.5)),
        ("ift", Implicit(solver=Broyden(max_steps=90, tol=1e-13))),
    ],
)
def test_gradients_at_the_recorded_equilibrium(model, arrays, name: str, grad: GradientEstimator):
    f, _ = model.bind(torch.tensor(arrays["x"]))
    solution = fixed_point(f, branches(arrays, "zstar_train"), solver=NO_SOLVE, grad=grad)
    logits = model.head(solution.value)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(arrays["labels"]))
    loss.backward()
    assert relative(logits, torch.tensor(arrays[f"{name}_logits"])) < 1e-10
    assert loss.item() == pytest.approx(arrays[f"{name}_loss"].item(), rel=1e-10)
    expected = {rename_mdeq(k): v for k, v in section(arrays, f"grad_{name}/").items()}
    found = {name: p.grad for name, p in model.named_parameters()}
    assert len(found) == 62
    assert found.keys() == expected.keys()
    # a bias in front of a BatchNorm that sees batch statistics has gradient zero: only rounding is left of it
    for dead in ("head.downsamp.0.0.bias", "head.final.0.bias"):
        assert max(found.pop(dead).abs().max(), expected[dead].abs().max()) < 1e-14
    assert {name: error for name in found if (error := relative(found[name], expected[name])) > 1e-9} == {}


def test_batch_statistics_after_a_training_forward(model, arrays):
    expected = {rename_mdeq(k): v for k, v in section(arrays, "bn_after/").items()}
    f, _ = model.bind(torch.tensor(arrays["x"]))
    model.head(fixed_point(f, branches(arrays, "zstar_train"), solver=NO_SOLVE, grad=UPG(k=5, lam=0.5)).value)
    buffers = dict(model.named_buffers())
    assert len(expected) == 24
    assert {name: error for name in expected if (error := relative(buffers[name], expected[name])) > 1e-12} == {}


@torch.no_grad()
def test_logits_at_the_evaluation_equilibrium(model, arrays):
    model.eval()
    logits, (solution,) = model(torch.tensor(arrays["x"]))
    assert solution.stats.num_evals == 23
    # 22 Broyden steps end at a relative residual of about 1e-3; from there a tight solve must reach the recorded point
    f, _ = model.bind(torch.tensor(arrays["x"]))
    tight = fixed_point(f, solution.value, solver=Broyden(max_steps=120, tol=1e-13), grad=UPG(k=1, lam=1.0))
    for value, expected in zip(tight.value, branches(arrays, "zstar_eval"), strict=True):
        assert relative(value, expected) < 1e-10
    expected = torch.tensor(arrays["logits_eval_at_zstar"])
    assert relative(model.head(tight.value), expected) < 1e-10
    assert 1e-10 < relative(logits, expected) < 1e-1


@pytest.mark.parametrize("mode", ["train", "eval"])
@torch.no_grad()
def test_residuals_of_the_official_broyden_solve(model, arrays, mode):
    model.train(mode == "train")
    _, (solution,) = model(torch.tensor(arrays["x"]))
    whole_batch = solution.stats.trace.pow(2).sum(dim=1).sqrt()
    expected = torch.tensor(arrays[f"broyden22fix_{mode}_trace"])
    assert whole_batch.shape == expected.shape
    # rounding is amplified from step to step: the first 15 tightly, as the official solvers agree among themselves
    torch.testing.assert_close(whole_batch[:15], expected[:15], rtol=1e-6, atol=0)


def test_alias_copies_are_accepted_and_checked(model, arrays):
    state = section(arrays, "sd/")
    aliases = {
        n.replace("fullstage.", "deq.func.", 1): t.clone() for n, t in state.items() if n.startswith("fullstage.")
    }
    full = state | aliases
    assert sorted(full) == sorted(arrays["sd_names_all"].tolist())
    load_reference(model, {f"module.{name}": tensor for name, tensor in full.items()}, "phantom_grad")
    full["deq.func.branches.0.blocks.0.gn1.bias"] += 1.0
    with pytest.raises(ValueError, match=r"deq\.func\.branches\.0\.blocks\.0\.gn1\.bias .* differ"):
        load_reference(model, full, "phantom_grad")
