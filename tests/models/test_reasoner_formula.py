"""The reasoner's parts written out: attention block, embedding, positions, what evaluation and training count."""

from functools import partial

import pytest
import torch
from torch import Tensor

from models.reasoner import Reasoner
from models.reasoner.cell import TwoSpeeds
from models.reasoner.evaluation import Run, score
from models.reasoner.layers import AttentionBlock, Stack, rotary_tables
from models.reasoner.model import relative_change
from models.reasoner.supervision import Supervision
from phantom import DEQ, UPG, Rollout
from tests.models.reasoners import ATTENTION, MIXER, WIDTH, batch, flat, make

DTYPE = torch.float64


def one_cycle() -> DEQ:
    return DEQ(solver=Rollout(max_steps=1), grad=UPG(k=1, lam=1.0))


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


@torch.no_grad()
def test_the_attention_block_is_its_formula():
    """Positions turn complex numbers made of channel i and channel i + h / 2 of queries and keys."""
    torch.manual_seed(0)
    block = AttentionBlock(width=8, length=5, num_heads=2, expansion=1, multiple=4).double()
    x = torch.randn(2, 5, 8, dtype=DTYPE)
    angles = torch.arange(5, dtype=DTYPE)[:, None, None] * 10_000.0 ** (-torch.arange(2, dtype=DTYPE) / 2)

    def turn(t: Tensor) -> Tensor:  # (B, S, heads, h)
        turned = torch.complex(*t.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    q, k, v = (x @ block.mix.query_key_value.weight.T).view(2, 5, 3, 2, 4).unbind(2)
    weights = (torch.einsum("bihc,bjhc->bhij", turn(q), turn(k)) / 4**0.5).softmax(dim=-1)
    mixed = torch.einsum("bhij,bjhc->bihc", weights, v).reshape(2, 5, 8) @ block.mix.output.weight.T
    middle = rms(x + mixed)
    gate, value = (middle @ block.mlp.up.weight.T).chunk(2, dim=-1)
    expected = rms(middle + (gate * gate.sigmoid() * value) @ block.mlp.down.weight.T)
    found = block(x, rotary_tables(torch.arange(5)[:, None], 4))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # the tables are float32
    with pytest.raises(AssertionError):
        torch.testing.assert_close(block(x, None), expected, rtol=1e-3, atol=1e-3)


def test_the_embedding_is_its_formula():
    model, (inputs, _) = make(prefix_tokens=3, positions="learned"), batch()
    first, rest = model.prefix.expand(3, 1, -1), torch.zeros(3, 2, WIDTH, dtype=DTYPE)
    table = torch.cat([first, rest, model.embedding.weight[inputs]], dim=1)
    torch.testing.assert_close(model.embed(inputs), WIDTH**0.5 * (table + model.positions) / 2**0.5)


def test_embedded_puzzles_have_unit_variance():
    model = make(d_model=256, vocab_size=50)
    x = model.embed(torch.arange(48).view(8, 6))[:, model.prefix_tokens :]
    assert x.std().item() == pytest.approx(1, rel=0.05)


def test_rows_turn_the_first_half_of_a_head():
    model = make(block=ATTENTION, positions="rope2d", prefix_tokens=0)
    places = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])
    for found, expected in zip((model.cosines, model.sines), rotary_tables(places, 4), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_new_model_never_halts():
    cell = partial(TwoSpeeds, num_fast=1, shared=True, stack=partial(Stack, num_layers=1, block=MIXER), lam=1.0)
    supervision = Supervision(steps=2, halting="halt")
    sizes = {"d_model": 8, "prefix_tokens": 0, "vocab_size": 5, "height": 2, "width": 3}
    kind = {"positions": "none", "start": "fixed", "noise": 0.0, "differentiate": "cycle"}
    model = Reasoner(**sizes, **kind, cell=cell, supervision=supervision, deq=DEQ())
    assert model.halting.bias.tolist() == [-5.0, -5.0] and not model.halting.weight.any()


def test_the_calmest_start_is_that_of_the_last_three_steps():
    """One whose logits rest at the very end, after they have moved most, is not calm."""

    def run(is_exact: bool, changes: list[float]) -> Run:
        exact, change = torch.tensor([[is_exact]] * 4), torch.tensor([[float("inf")], *[[c] for c in changes]])
        return Run(change[-1], exact, exact * 6, change, change)

    _, sums = score([run(True, [1.0, 9.0, 0.1]), run(False, [1.0, 1.0, 1.0])], torch.tensor([6]))
    assert sums["exact"] == 0 and sums["exact@1"] == 1


def test_a_relative_change_is_a_ratio_of_lengths():
    new, old = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]])
    assert relative_change(new, old).item() == pytest.approx(0.2)
    assert relative_change((new, 2 * new), (old, 2 * old)).item() == pytest.approx(0.2)


@torch.no_grad()
def test_logits_move_by_the_mean_over_the_cells():
    model = make(supervision=Supervision(steps=2, halting="fixed"), deq=one_cycle()).eval()
    inputs, labels = batch()
    state, logits = model.start_state(inputs), []
    for _ in range(2):
        step = model.step(inputs, state)
        state = step.state
        logits.append(step.logits)
    run, _ = model._run(inputs, labels, torch.Generator().manual_seed(0))
    moved = (logits[1] - logits[0]).square().sum(dim=2).sqrt().mean(dim=1)
    torch.testing.assert_close(run.logit_change[1], moved)
    assert run.logit_change[0].isinf().all()


def test_training_counts_the_cells_of_the_rows_that_finish():
    model = make(supervision=Supervision(steps=2, halting="fixed"), deq=one_cycle())
    carry, found = None, []
    for _ in range(2):
        outcome, _, carry = model(*batch(), carry)
        found.append(outcome.sums["cells"].item())
        assert outcome.sums["right"] <= outcome.sums["cells"]
    assert found == [0, 18]


def test_training_draws_its_noise():
    model = make(supervision=Supervision(steps=2, halting="fixed"), deq=one_cycle(), noise=0.1)
    a, b = (flat(model(*batch())[2]["state"]) for _ in range(2))
    assert not torch.equal(a, b)


@torch.no_grad()
def test_every_restart_has_a_start_of_its_own():
    supervision = Supervision(steps=2, halting="fixed", restarts=3)
    model = make(supervision=supervision, deq=one_cycle(), start="random").eval()
    seen, start = [], model.start_state
    model.start_state = lambda *arguments: seen.append(start(*arguments)) or seen[-1]
    model(*batch())
    starts = [flat(state) for state in seen]
    assert len(starts) == 3 and not any(torch.equal(starts[0], other) for other in starts[1:])
    assert not torch.equal(starts[1], starts[2])
