"""A small PostLN DEQ Transformer against arrays recorded from the official code, in float64.

The folder of the arrays is named by PHANTOM_REFERENCE; without it these tests are skipped. Official layouts: (B, C, T)
for states and injections, (T, B) for tokens, (T, B, C) for memories.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.deq_transformer.attention import sinusoids
from models.deq_transformer.cell import CellMasks
from models.deq_transformer.model import DEQTransformer, Masks
from models.official.deq_transformer import rename_deq_transformer
from models.official.load import load_reference
from phantom import BPTT, DEQ, UPG, Anderson, Broyden, FixedPoint, Implicit
from phantom.diagnostics import dense_jacobian, spectral_radius
from phantom.engine.training.clipping import ClipTotal, gradient_norm

FOLDER = os.environ.get("PHANTOM_REFERENCE")
FILE = Path(FOLDER or ".") / "deq_transformer_postln.npz"
pytestmark = pytest.mark.skipif(
    not (FOLDER and FILE.is_file()), reason="PHANTOM_REFERENCE does not name a folder with deq_transformer_postln.npz"
)

TIGHT = Broyden(max_steps=150, tol=1e-13)


class Arrays(dict):
    def tensor(self, name: str) -> torch.Tensor:
        return torch.tensor(self[name])

    def state(self, name: str) -> torch.Tensor:
        """Return a (B, C, T) array as (B, T, C)."""
        return self.tensor(name).transpose(1, 2).contiguous()

    def tokens(self, segment: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tensor(f"seg{segment}/data").T.contiguous(), self.tensor(f"seg{segment}/target").T.contiguous()

    def memory(self, segment: int, run: str = "tight") -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(self.tensor(f"{run}/seg{segment}/mem_{part}").transpose(0, 1).contiguous() for part in "zu")

    def section(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): torch.tensor(self[name]) for name in self if name.startswith(prefix)}


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    with np.load(FILE) as file:
        return Arrays({name: file[name] for name in file.files})


@pytest.fixture
def model(arrays):
    config = json.loads(str(arrays["config_json"]))
    model = DEQTransformer(
        vocab_size=config["n_token"],
        d_model=config["d_model"],
        num_heads=config["n_head"],
        d_inner=config["d_inner"],
        cutoffs=config["cutoffs"],
        div_val=config["div_val"],
        norm="post",
        preln_residual="normalised",
        mem_len=config["mem_len"],
        eval_mem_len=config["mem_len"],
        window=1000,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=0.01,
        deq=DEQ(solver=TIGHT, grad=UPG(k=5, lam=0.8)),
    ).double()
    load_reference(model, arrays.section("sd/"), "deq")
    return model


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


def renamed(arrays: Arrays, prefix: str) -> list[tuple[str, torch.Tensor]]:
    """Return recorded arrays under our names and shapes; those of tied projections come twice."""
    return [
        (rename_deq_transformer(official), array.squeeze(-1) if array.dim() == 3 else array)
        for official, array in arrays.section(prefix).items()
    ]


def expected_gradients(arrays: Arrays, prefix: str) -> dict[str, torch.Tensor]:
    """Return recorded gradients under our names; those of tied projections add."""
    total: dict[str, torch.Tensor] = {}
    for name, gradient in renamed(arrays, prefix):
        total[name] = total[name] + gradient if name in total else gradient
    return total


def assert_gradients(model: DEQTransformer, arrays: Arrays, prefix: str, tolerance: float = 1e-7) -> None:
    expected = expected_gradients(arrays, prefix)
    found = {name: p.grad for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    errors = {}
    for name, gradient in found.items():
        gradient = torch.zeros_like(expected[name]) if gradient is None else gradient
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)
        if error > tolerance:
            errors[name] = error.item()
    assert errors == {}


def test_embedding_injection_positions_and_effective_weights(model, arrays):
    tokens, _ = arrays.tokens(0)
    with torch.no_grad():
        assert relative(model.embedding(tokens), arrays.tensor("seg0/word_emb")) < 1e-12
        assert relative(model.inject(tokens), arrays.state("seg0/u")) < 1e-12
        expected = arrays.tensor("pos_emb_17")[0].T
        assert relative(sinusoids(17, 32, device="cpu", dtype=torch.float64), expected) < 1e-12
        for ours, name in (
            (model.cell.attention.qkv, "qkv"),
            (model.cell.attention.position, "r"),
            (model.cell.attention.out, "o"),
            (model.cell.ffn.inner, "ff1"),
            (model.cell.ffn.outer, "ff2"),
        ):
            expected = arrays.tensor(f"eff/{name}_weight")
            assert relative(ours(), expected.view(expected.shape[:2])) < 1e-12


def bound(model: DEQTransformer, u: torch.Tensor, history: torch.Tensor, **options):
    positions = sinusoids(u.shape[1], model.d_model, device="cpu", dtype=torch.float64)
    return model.cell.bind(u, history, positions, **options)


@pytest.mark.parametrize("is_explicit", [False, True])
@pytest.mark.parametrize("case", ["cell_nomem", "cell_mem"])
def test_cell_and_its_vjp(model, arrays, case, is_explicit):
    u, history = arrays.state(f"{case}/us"), arrays.state(f"{case}/z0")
    z = arrays.state(f"{case}/z").requires_grad_()
    ones = torch.ones(len(z), model.cell.num_heads, z.shape[1], u.shape[1], dtype=z.dtype)
    f = bound(model, u, history, masks=CellMasks(attention=ones) if is_explicit else CellMasks())
    a = F.layer_norm(z + model.cell.attention(z, f.keywords["attention"]), (32,))
    assert relative(a, arrays.state(f"{case}/attn_out")) < 1e-9
    out = f(z)
    assert relative(out, arrays.state(f"{case}/out")) < 1e-9
    (vjp,) = torch.autograd.grad(out, z, arrays.state(f"{case}/v"))
    assert relative(vjp, arrays.state(f"{case}/vjp")) < 1e-9


@torch.no_grad()
def test_three_chained_segments(model, arrays):
    model.eval()
    memory, total = None, 0.0
    for segment in range(3):
        name = f"tight/seg{segment}"
        nll, (solution,), memory = model(*arrays.tokens(segment), memory)
        assert relative(solution.z_star, arrays.state(f"{name}/z_star")) < 1e-9
        assert relative(nll, arrays.tensor(f"{name}/nll").T) < 1e-9
        for ours, expected in zip(memory, arrays.memory(segment), strict=True):
            assert ours.shape == expected.shape
            assert relative(ours, expected) < 1e-9
        total = total + nll.sum()
    assert torch.exp(total / 63).item() == pytest.approx(arrays["tight/ppl"].item(), rel=1e-9)


def test_implicit_gradient(model, arrays):
    model.deq.grad = Implicit(solver=Broyden(max_steps=200, tol=1e-13))
    nll, _, memory = model(*arrays.tokens(1), arrays.memory(0))
    nll.mean().backward()
    assert nll.mean().item() == pytest.approx(arrays["train_ift/loss"].item(), rel=1e-9)
    assert relative(memory[0], arrays.tensor("train_ift/mem_z").transpose(0, 1)) < 1e-9
    assert_gradients(model, arrays, "train_ift/grad/")


def test_one_step_of_clipping_and_adam(model, arrays):
    """The official optimiser steps a shared projection once per alias; truly tied, it is stepped once."""
    model.deq.grad = Implicit(solver=Broyden(max_steps=200, tol=1e-13))
    nll, _, _ = model(*arrays.tokens(1), arrays.memory(0))
    nll.mean().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norm = gradient_norm(model.parameters())
    separate = [gradient for _, gradient in renamed(arrays, "train_ift/grad/")]
    official_norm = torch.stack([gradient.norm() for gradient in separate]).norm()
    assert official_norm.item() == pytest.approx(arrays["train_step/grad_norm_before_clip"].item(), rel=1e-9)
    assert norm.item() == pytest.approx(official_norm.item(), rel=1e-3)
    ClipTotal(max_norm=0.25).clip(model.parameters(), norm)
    torch.optim.Adam(model.parameters(), lr=2.5e-4).step()
    after = dict(renamed(arrays, "train_step/sd_after/"))
    for name, parameter in model.named_parameters():
        step, expected = parameter.detach() - before[name], after[name] - before[name]
        if name in ("embedding.projections.1", "embedding.projections.2"):
            assert step.abs().max() < 2.51e-4 and expected.abs().max() > 4.9e-4, name
        else:  # the two clip norms differ, which Adam's first step forgets but for its epsilon
            assert relative(step, expected) < 1e-4, name


@pytest.mark.parametrize("start", ["tight", "coarse"])
def test_upg_gradient(model, arrays, start):
    model.deq.solver = TIGHT if start == "tight" else FixedPoint(max_steps=3, tol=None)
    name = f"upg_5_0.8_{start}"
    nll, (solution,), _ = model(*arrays.tokens(1), arrays.memory(0))
    assert relative(solution.z_star, arrays.state(f"{name}/z_start")) < 1e-9
    assert relative(solution.value, arrays.state(f"{name}/z_end")) < 1e-9
    assert nll.mean().item() == pytest.approx(arrays[f"{name}/loss"].item(), rel=1e-9)
    nll.mean().backward()
    assert_gradients(model, arrays, f"{name}/grad/")


def test_jacobian_loss_gradient(model, arrays):
    def recorded_probe(f, z):
        z = z.detach().requires_grad_()
        (product,) = torch.autograd.grad(f(z), z, arrays.state("jac/v"), create_graph=True)
        return product.square().mean()

    model.deq.regularizer = recorded_probe
    _, (solution,), _ = model(*arrays.tokens(1), arrays.memory(0))
    assert solution.penalty.item() == pytest.approx(arrays["jac/loss"].item(), rel=1e-9)
    solution.penalty.backward()
    assert_gradients(model, arrays, "jac/grad/")


def test_unrolled_pretraining_gradient(model, arrays):
    model.deq.grad = BPTT(num_steps=2)
    nll, _, _ = model(*arrays.tokens(0), None)
    assert nll.mean().item() == pytest.approx(arrays["pretrain2/loss"].item(), rel=1e-9)
    nll.mean().backward()
    assert_gradients(model, arrays, "pretrain2/grad/")


def test_recorded_dropout_masks_give_the_recorded_loss(model, arrays):
    masks = Masks(
        embedding=arrays.tensor("dropout/mask_word_emb")[:, :1],
        positions=arrays.tensor("dropout/mask_pos")[:, :, 0],
        cell=CellMasks(
            attention=arrays.tensor("dropout/mask_attn_prob"),
            out=arrays.state("dropout/mask_attn_out"),
            inner=arrays.tensor("dropout/mask_ff1"),
            ffn=arrays.tensor("dropout/mask_ff2"),
        ),
        output=arrays.state("dropout/mask_output_BDL")[:, :, :1],
    )
    model.deq.grad = BPTT(num_steps=2)
    nll, _, _ = model(*arrays.tokens(1), arrays.memory(0), masks=masks)
    assert nll.mean().item() == pytest.approx(arrays["dropout/loss"].item(), rel=1e-9)
    # recorded per cluster, so in another order
    assert relative(nll.flatten().sort().values, arrays.tensor("dropout/nll_unordered").flatten().sort().values) < 1e-9


@torch.no_grad()
def test_residuals_of_the_official_broyden_solve(model, arrays):
    model.eval()
    model.deq.solver = Broyden(max_steps=30, tol=None, stop="absolute")
    total = 0.0
    for segment in range(3):
        memory = arrays.memory(segment - 1, "broyden30") if segment else None
        nll, (solution,), _ = model(*arrays.tokens(segment), memory)
        whole_batch = solution.stats.trace.square().sum(dim=1).sqrt()
        expected = arrays.tensor(f"broyden30/seg{segment}/abs_trace")
        # the official trace begins behind the first step and stops at a relative residual of 1e-3 over the whole batch;
        # rounding is amplified from step to step
        steps = min(int(arrays[f"broyden30/seg{segment}/nstep"]), 12)
        torch.testing.assert_close(whole_batch[1 : steps + 1], expected[:steps], rtol=1e-6, atol=0)
        total = total + nll.sum()
    assert torch.exp(total / 63).item() == pytest.approx(arrays["broyden30/ppl"].item(), rel=1e-2)


@torch.no_grad()
def test_the_official_anderson_solve(model, arrays):
    model.eval()
    for segment in range(3):
        name, memory = f"anderson30/seg{segment}", arrays.memory(segment - 1, "anderson30") if segment else None
        model.deq.solver = Anderson(max_steps=10, tol=None, stop="absolute")
        _, (solution,), _ = model(*arrays.tokens(segment), memory)
        whole_batch = solution.stats.trace.square().sum(dim=1).sqrt()
        expected = arrays.tensor(f"{name}/abs_trace")
        # the official trace begins behind two plain steps, and its ridge is absolute: it weighs more at every step
        torch.testing.assert_close(whole_batch[2:4], expected[:2], rtol=1e-3, atol=0)
        torch.testing.assert_close(whole_batch[4:6], expected[2:4], rtol=2e-2, atol=0)
        model.deq.solver = Anderson(max_steps=30, tol=1e-3)
        nll, (solution,), _ = model(*arrays.tokens(segment), memory)
        assert relative(solution.z_star, arrays.state(f"{name}/z_star")) < 2e-2
        assert relative(nll, arrays.tensor(f"{name}/nll").T) < 1e-2


def test_spectral_radius_at_the_equilibrium(model, arrays):
    memory = arrays.memory(0)
    with torch.no_grad():
        _, (solution,), _ = model(*arrays.tokens(1), memory)
        u = torch.cat([memory[1], model.inject(arrays.tokens(1)[0])], dim=1)
        f = bound(model, u, memory[0])
    exact = torch.linalg.eigvals(dense_jacobian(f, solution.z_star)).abs().amax(dim=-1)
    torch.testing.assert_close(spectral_radius(f, solution.z_star, num_steps=80), exact, rtol=1e-6, atol=0)
    # recorded by power iteration
    torch.testing.assert_close(exact, arrays.tensor("spectral_radius_seg1")[:, 0], rtol=1e-3, atol=0)


def test_aliases_must_agree_and_copies_of_older_versions_are_dropped(model, arrays):
    state = arrays.section("sd/")
    older = {f"module.{name}": tensor for name, tensor in state.items()}
    older |= {name.replace("func.", "func_copy.", 1): t for name, t in older.items() if ".func." in name}
    older["module.func.pos_ff.ff1_net.weight_v"] = older["module.func.pos_ff.ff1_net.weight_v"][:, :, None]
    before = model.state_dict()["cell.ffn.inner.weight_v"].clone()
    with torch.no_grad():
        model.cell.ffn.inner.weight_v.zero_()
    load_reference(model, older, "deq")
    assert torch.equal(model.cell.ffn.inner.weight_v, before)
    state["crit.out_projs.1.weight"] = state["crit.out_projs.1.weight"] + 1
    with pytest.raises(ValueError, match=r"crit\.out_projs\.1\.weight .* differ"):
        load_reference(model, state, "deq")
    del state["crit.out_projs.1.weight"], state["crit.out_projs.0.weight"]
    with pytest.raises(ValueError, match=r"missing: softmax\.head_projection"):
        load_reference(model, state, "deq")
