"""The dropout masks of the DEQ Transformer: where each one acts, that a solve keeps them, that evaluation has none."""

import pytest
import torch

from models.deq_transformer.attention import sinusoids
from models.deq_transformer.cell import CellMasks
from models.deq_transformer.model import Masks
from tests.models.transformers import make, tokens, written_out


def factors(*shape: int) -> torch.Tensor:
    """Return factors that no two entries share, so that a mask in a wrong place shows."""
    return 0.5 + torch.rand(*shape, dtype=torch.float64)


@pytest.mark.parametrize("norm", ["post", "pre"])
@torch.no_grad()
def test_masks_of_the_cell_are_in_its_formula(norm):
    """Behind Wo, on the ReLU, behind W2, and on the attention probabilities, which are not normalised again."""
    cell, (q, m) = make(norm=norm).cell, (3, 2)
    u, history = torch.randn(2, m + q, 36, dtype=torch.float64), torch.randn(2, m, 12, dtype=torch.float64)
    z = torch.randn(2, q, 12, dtype=torch.float64)
    sines = sinusoids(m + q, 12, device="cpu", dtype=torch.float64)
    masks = CellMasks(factors(2, 3, q, m + q), factors(2, 1, 12), factors(2, 1, 20), factors(2, 1, 12))
    expected = written_out(cell, z, u, history, 1000, masks=masks)
    torch.testing.assert_close(cell.bind(u, history, sines, masks=masks)(z), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_masks_around_the_cell_are_in_the_formula_of_the_model(norm):
    """Words and sinusoids enter the equilibrium masked; the softmax reads it masked, the memory keeps it whole."""
    model, (words, targets) = make(norm=norm), tokens(2, 4)
    masks = Masks(embedding=factors(2, 1, 12), positions=factors(1, 12), output=factors(2, 4, 1))
    nll, (solution,), (states, injections) = model(words, targets, None, masks=masks)
    u = model.injection(model.embedding(words) * masks.embedding)
    z, none = solution.z_star, torch.zeros(2, 0, 12, dtype=torch.float64)
    again = written_out(model.cell, z, u, none, 1000, positions=masks.positions[0])
    torch.testing.assert_close(again, z, rtol=1e-8, atol=1e-8)
    other = written_out(model.cell, z, u, none, 1000)
    assert (other - z).abs().max() > 1e-3, "without the mask it is the equilibrium of another map"
    expected = model.softmax(solution.value * masks.output, targets, model.embedding)
    torch.testing.assert_close(nll, expected, rtol=1e-12, atol=0)
    assert torch.equal(states, solution.value) and torch.equal(injections, u)


def test_training_draws_the_masks_that_it_is_not_given():
    """Words and sinusoids by channel, each stream with its own; the output by position."""
    model, (words, targets) = make(dropout=0.5), tokens(40, 5)
    torch.manual_seed(3)
    found, _, (_, injections) = model(words, targets, None)
    torch.manual_seed(3)
    masks = model._draw(words)
    expected, _, _ = model(words, targets, None, masks=masks)
    assert torch.equal(found, expected)
    for mask in masks[:2] + masks[3:]:
        assert set(mask.unique().tolist()) == {0.0, 2.0}, "inverted dropout: what is kept is doubled"
    for mask in (masks.embedding, masks.output):
        assert 0.3 < (mask == 0).double().mean() < 0.7 and len(mask.flatten(1).unique(dim=0)) > 10
    assert torch.equal(injections, model.injection(model.embedding(words) * masks.embedding))


@torch.no_grad()
def test_evaluation_drops_nothing():
    words, targets = tokens(3, 5)
    dropping = make(dropout=0.5, attention_dropout=0.5).eval()
    found, whole = dropping(words, targets, None), make().eval()(words, targets, None)
    assert torch.equal(found[0], dropping(words, targets, None)[0])
    torch.testing.assert_close(found[0], whole[0], rtol=1e-9, atol=1e-9)
    for a, b in zip(found[2], whole[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_masks_of_a_solve():
    model = make(dropout=0.5, attention_dropout=0.5)
    masks = model._draw(tokens(2, 5)[0])
    assert [tuple(part.shape) for part in (masks.embedding, masks.positions, masks.output)] == [
        (2, 1, 12),
        (1, 12),
        (2, 5, 1),
    ]
    u, history = torch.randn(2, 9, 36, dtype=torch.float64), torch.randn(2, 4, 12, dtype=torch.float64)
    cell = model.cell._draw(u, 5)
    assert [tuple(part.shape) for part in cell] == [(2, 3, 5, 9), (2, 1, 12), (2, 1, 20), (2, 1, 12)]
    positions = sinusoids(9, 12, device="cpu", dtype=torch.float64)
    f, g = (model.cell.bind(u, history, positions) for _ in range(2))
    z = torch.randn(2, 5, 12, dtype=torch.float64)
    assert torch.equal(f(z), f(z)) and not torch.allclose(f(z), g(z))
    assert torch.equal(f(z), model.cell.bind(u, history, positions, masks=masks_of(f))(z))
    model.eval()
    drawn = model._draw(tokens(2, 5)[0])
    assert (drawn.embedding, drawn.positions, drawn.output) == (None, None, None)
    assert set(model.cell._draw(u, 5)) == {None}


def masks_of(f) -> CellMasks:
    attention, ffn = f.keywords["attention"], f.keywords["ffn"]
    return CellMasks(attention.attend.keywords["mask"], attention.mask, ffn.inner_mask, ffn.mask)


def test_a_dropped_position_predicts_from_zeros():
    model = make(dropout=0.5)
    words, targets = tokens(2, 6)
    masks = model._draw(words)
    nll, _, _ = model(words, targets, None, masks=masks)
    blind = model.softmax(torch.zeros(2, 6, 12, dtype=torch.float64), targets, model.embedding)
    dropped = masks.output[:, :, 0] == 0
    assert dropped.any() and not dropped.all()
    torch.testing.assert_close(nll[dropped], blind[dropped])
    assert (nll[~dropped] - blind[~dropped]).abs().min() > 1e-6
