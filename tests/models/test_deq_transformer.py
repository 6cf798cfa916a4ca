"""The DEQ Transformer: parameter counts, the cell against its formula written out, memory, estimators."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import models.deq_transformer.cell as transformer_cell
from models.deq_transformer.attention import causal_mask, padded, relative_shift, row_multiple, sinusoids
from models.deq_transformer.cell import CellMasks, TransformerCell
from models.deq_transformer.model import DEQTransformer
from phantom import BPTT, DEQ, NPG, UPG, Anderson, Broyden, FixedPoint, Implicit, JacobianRegularizer
from phantom.diagnostics import cosine
from phantom.engine.speed import compile_cell
from tests.models.transformers import V, make, tokens, written_out
from tests.phantom.attentions import Attentions

FULL_SIZE = {
    "d_model": 700,
    "num_heads": 10,
    "d_inner": 48_000,
    "cutoffs": [20_000, 40_000, 200_000],
    "vocab_size": 267_735,
}


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_parameter_counts_at_full_size(norm):
    with torch.device("meta"):
        model = make(dtype=torch.float32, div_val=4, norm=norm, **FULL_SIZE)
    assert model.parameter_counts() == {
        "embedding_tables": 25_057_350,
        "input_projections": 649_600,
        "injection": 1_472_100,
        "cell_attention": 2_455_600,
        "cell_ffn": 67_297_400,
        "output": 490_000 + 267_735 + 2_100 + 3,
    }
    assert sum(p.numel() for p in model.parameters()) == 97_691_888
    assert model.official_parameter_count == 97_851_488
    assert len(model.state_dict()) == len(list(model.parameters()))  # tied weights are stored once


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_float32_agrees_with_float64_at_full_width(norm):
    torch.manual_seed(0)
    cell = TransformerCell(
        d_model=700,
        num_heads=10,
        d_inner=48_000,
        norm=norm,
        preln_residual="normalised",
        dropout=0.0,
        attention_dropout=0.0,
        window=1000,
        init_std=0.01,
    )
    u, history, z = torch.randn(1, 5, 2100), torch.randn(1, 2, 700), torch.randn(1, 3, 700)
    positions = sinusoids(5, 700, device="cpu", dtype=torch.float64)
    with torch.no_grad():
        single = cell.bind(u, history, positions.float())(z)
        double = cell.double().bind(u.double(), history.double(), positions)(z.double())
    assert (single - double).norm() / double.norm() < 1e-5


@pytest.mark.parametrize(
    ("norm", "residual", "m", "window"),
    [
        ("post", "normalised", 4, 1000),
        ("pre", "normalised", 4, 1000),
        ("pre", "plain", 4, 3),
        ("post", "normalised", 0, 2),
    ],
)
@torch.no_grad()
def test_cell_is_its_formula(norm, residual, m, window):
    cell = make(norm=norm, preln_residual=residual, window=window).cell
    q = 5
    u = torch.randn(2, m + q, 36, dtype=torch.float64)
    history, z = torch.randn(2, m, 12, dtype=torch.float64), torch.randn(2, q, 12, dtype=torch.float64)
    positions = sinusoids(m + q, 12, device="cpu", dtype=torch.float64)
    f = cell.bind(u, history, positions)
    torch.testing.assert_close(f(z), written_out(cell, z, u, history, window), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("attention_dropout", [0.0, 0.2])
def test_padding_for_matrix_units_changes_no_value_and_no_gradient(monkeypatch, attention_dropout, dropout):
    cell = make(d_inner=13, dropout=dropout, attention_dropout=attention_dropout).cell
    cell.train()
    u, history = torch.randn(2, 9, 36, dtype=torch.float64), torch.randn(2, 4, 12, dtype=torch.float64)
    positions = sinusoids(9, 12, device="cpu", dtype=torch.float64)
    v = torch.randn(2, 5, 12, dtype=torch.float64)
    masks = cell._draw(u, 5)
    found = []
    for multiple in (1, 8):  # 12 and 13 columns, 3 heads of 4
        monkeypatch.setattr(transformer_cell, "row_multiple", lambda _, multiple=multiple: multiple)
        z = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        given, past = u.clone().requires_grad_(), history.clone().requires_grad_()
        f = cell.bind(given, past, positions, masks=masks)
        assert f.keywords["attention"].qkv.shape == ((36, 12) if multiple == 1 else (72, 16))
        cell.zero_grad()
        out = f(f(z))
        out.backward(v)
        found.append([out, z.grad, given.grad, past.grad, *(p.grad.clone() for p in cell.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("dtype", "multiple"), [(torch.bfloat16, 8), (torch.float32, 4)])
def test_rows_of_a_gpu_are_whole_16_bytes(dtype, multiple):
    with FakeTensorMode():
        x = torch.empty(2, 700, device="cuda", dtype=dtype)
        assert row_multiple(x) == multiple
        assert padded(x, 1, multiple).shape == (2, 704 if multiple == 8 else 700)
    assert row_multiple(torch.empty(2, 700, dtype=dtype)) == 1


def test_fused_and_explicit_attention_agree_with_their_gradients():
    cell = make().cell
    u, history = torch.randn(2, 9, 36, dtype=torch.float64), torch.randn(2, 4, 12, dtype=torch.float64)
    positions = sinusoids(9, 12, device="cpu", dtype=torch.float64)
    v = torch.randn(2, 5, 12, dtype=torch.float64)
    found = []
    ones = CellMasks(attention=torch.ones(2, 3, 5, 9, dtype=torch.float64))
    for masks in (CellMasks(), ones):
        z = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        cell.zero_grad()
        out = cell.bind(u, history, positions, masks=masks)(z)
        out.backward(v)
        found.append([out, z.grad, *(p.grad.clone() for p in cell.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_attention_dropout_alone_leaves_the_fused_kernel():
    """A penalty takes no fused kernel from the solve: it does without for itself."""
    model = make(attention_dropout=0.1)
    with Attentions() as attentions:
        model(*tokens(2, 5), None)
    assert attentions.fused == 0
    model.eval()
    solves = []
    for regularizer in (None, JacobianRegularizer()):
        model.deq.regularizer = regularizer
        with Attentions() as attentions:
            _, (solution,), _ = model(*tokens(2, 5), None)
        solves.append((attentions.fused, solution.value))
    assert solves[0][0] == solves[1][0] > 0 and torch.equal(solves[0][1], solves[1][1])
    solution.penalty.backward()
    assert solution.penalty > 0 and model.cell.ffn.inner.weight_v.grad.abs().sum() > 0


@pytest.mark.parametrize("attention_dropout", [0.0, 0.2])
def test_jacobian_penalty_gradient_against_finite_differences(attention_dropout):
    model = make(norm="pre", attention_dropout=attention_dropout, dropout=0.1)
    u, history = torch.randn(1, 5, 36, dtype=torch.float64), torch.randn(1, 2, 12, dtype=torch.float64)
    positions = sinusoids(5, 12, device="cpu", dtype=torch.float64)
    z = torch.randn(1, 3, 12, dtype=torch.float64)
    masks = model.cell._draw(u, 3)
    parameters = [model.cell.attention.qkv.weight_v, model.cell.ffn.inner.weight_g, model.cell.attention.position_bias]

    def penalty(*_):
        torch.manual_seed(3)
        return JacobianRegularizer()(model.cell.bind(u, history, positions, masks=masks), z)

    assert torch.autograd.gradcheck(penalty, parameters, fast_mode=True)


@torch.no_grad()
def test_chained_segments_equal_one_long_segment():
    model = make(eval_mem_len=12).eval()
    words, targets = tokens(3, 12)
    whole, _, _ = model(words, targets, None)
    memory, pieces = None, []
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        nll, _, memory = model(words[:, begin:end], targets[:, begin:end], memory)
        pieces.append(nll)
    # what was read before does not change with what comes after, so freezing it loses nothing
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_no_word_sees_the_future():
    model = make().eval()
    words, targets = tokens(2, 8)
    nll, _, _ = model(words, targets, None)
    changed = words.clone()
    changed[:, 5] = (changed[:, 5] + 1) % V
    other, _, _ = model(changed, targets, None)
    torch.testing.assert_close(other[:, :5], nll[:, :5], rtol=1e-9, atol=1e-9)
    assert (other[:, 5:] - nll[:, 5:]).abs().max() > 1e-3


def test_memory_grows_to_its_length_without_graph_and_without_hidden_storage():
    model = make(mem_len=6, eval_mem_len=9)
    words, targets = tokens(2, 4)
    memory, lengths = None, []
    for _ in range(3):
        _, (solution,), memory = model(words, targets, memory)
        lengths.append(memory[0].shape[1])
        assert [part.shape for part in memory] == [(2, lengths[-1], 12), (2, lengths[-1], 36)]
        assert torch.equal(memory[0][:, -4:], solution.value)
        assert not any(part.requires_grad for part in memory)
        assert all(part.untyped_storage().nbytes() == 8 * part.numel() for part in memory)
    assert lengths == [4, 6, 6]
    model.eval()
    assert model(words, targets, memory)[2][0].shape[1] == 9
    model.eval_mem_len = 0
    assert model(words, targets, memory)[2][0].shape[1] == 0


def gradients(model: DEQTransformer, grad) -> list[torch.Tensor]:
    model.deq.grad = grad
    model.zero_grad()
    memory = model(*tokens(2, 5, seed=1), None)[2]
    nll, _, _ = model(*tokens(2, 5), tuple(part.clone() for part in memory))
    nll.mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_estimators_against_backpropagation_through_many_steps(norm):
    model = make(norm=norm, scale=0.5)
    exact = gradients(model, BPTT(num_steps=150))
    implicit = gradients(model, Implicit(solver=Broyden(max_steps=120, tol=1e-12)))
    for a, b in zip(implicit, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    upg, npg = gradients(model, UPG(k=4, lam=0.8)), gradients(model, NPG(k=4, lam=0.8))
    for a, b in zip(upg, npg, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert 0.5 < float(cosine(upg, exact)) < 1 - 1e-8


def test_training_under_bfloat16_autocast():
    model = make(dtype=torch.float32, attention_dropout=0.1, solver=Anderson(max_steps=10, tol=None))
    memory = None
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nll, (solution,), memory = model(*tokens(2, 5), memory)
        assert nll.dtype == solution.value.dtype == memory[0].dtype == torch.float32
    nll.mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        model.eval()
        full, _, _ = model(*tokens(2, 5), None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half, _, _ = model(*tokens(2, 5), None)
    assert (half - full).abs().max() < 0.2 * full.abs().max()


@pytest.mark.parametrize("attention_dropout", [0.0, 0.1])
def test_a_compiled_cell_serves_the_shapes_of_a_text(monkeypatch, attention_dropout):
    """A growing memory and short segments, with and without grad: more shapes than torch compiles unasked."""
    ordinary = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: ordinary(self, backend="eager", **options))
    model = make(attention_dropout=attention_dropout, mem_len=8, solver=FixedPoint(max_steps=2, tol=None))
    compile_cell(model)
    expected = make(mem_len=8, solver=FixedPoint(max_steps=2, tol=None))
    for training in (True, False):
        memory, reference = None, None
        for length in (3, 3, 3, 2, 1):
            for m in (model, expected):
                m.train(training)
            with torch.set_grad_enabled(training):
                nll, _, memory = model(*tokens(2, length), memory)
                other, _, reference = expected(*tokens(2, length), reference)
            if not (training and attention_dropout):
                torch.testing.assert_close(nll, other)


def test_relative_shift_and_mask():
    scores = torch.arange(12.0).view(3, 4)
    shifted, hidden = relative_shift(scores), causal_mask(3, 4, window=2, device="cpu", dtype=torch.float32)
    for i in range(3):
        for j in range(4):
            if i + 1 - j >= 0:
                assert shifted[i, j] == scores[i, j + 2 - i]
            assert hidden[i, j] == (0.0 if 0 <= i + 1 - j < 2 else -math.inf)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 10}, "multiple of num_heads=3"),
        ({"d_model": 9}, "even"),
        ({"norm": "both"}, "post, pre"),
        ({"preln_residual": "none"}, "normalised, plain"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"attention_dropout": -0.1}, r"dropout=-0\.1"),
        ({"mem_len": -1}, "mem_len=-1"),
        ({"window": 0}, "window=0"),
        ({"init_std": 0.0}, r"init_std=0\.0"),
        ({"attention_dropout": 1.5}, r"^attention_dropout=1\.5 must be in \[0, 1\)"),
        ({"cutoffs": [10, 50]}, "vocabulary of 40 words"),
    ],
)
def test_impossible_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_shapes_that_do_not_fit():
    model = make(solver=FixedPoint(max_steps=1, tol=None))
    words, targets = tokens(2, 5)
    with pytest.raises(ValueError, match="both be"):
        model(words, targets[:, :4], None)
    memory = model(words, targets, None)[2]
    with pytest.raises(ValueError, match="memory has 2 streams, but tokens have 1"):
        model(words[:1], targets[:1], memory)
    with pytest.raises(ValueError, match=r"two parts of memory must have the same streams and length, got \(2, 5, "):
        model(words, targets, (memory[0], memory[1][:, 1:]))


def test_weights_are_drawn_as_wide_as_asked_for():
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "d_model": 96, "num_heads": 3, "d_inner": 8, "cutoffs": [100, 200], "div_val": 1}
    memory = {"mem_len": 0, "eval_mem_len": 0, "window": 9, "dropout": 0.0, "attention_dropout": 0.0}
    model = DEQTransformer(**sizes, **memory, norm="post", preln_residual="plain", init_std=0.3, deq=DEQ())
    attention, softmax, embedding = model.cell.attention, model.softmax, model.embedding
    drawn = [attention.content_bias, attention.position_bias, softmax.head_projection, softmax.cluster_weight]
    for parameter in (*drawn, *embedding.tables, *embedding.projections, model.injection.weight):
        assert parameter.std().item() == pytest.approx(0.3, rel=0.25), parameter.shape
