"""The adaptive embedding and softmax against sums over words written out, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.deq_transformer.adaptive import AdaptiveEmbedding, AdaptiveSoftmax

V, D, CUTOFFS = 30, 16, (6, 14)


def make(cutoffs=CUTOFFS, vocab_size=V) -> tuple[AdaptiveEmbedding, AdaptiveSoftmax]:
    torch.manual_seed(0)
    embedding = AdaptiveEmbedding(vocab_size=vocab_size, d_model=D, cutoffs=cutoffs, div_val=2, init_std=0.01).double()
    softmax = AdaptiveSoftmax(embedding, init_std=0.01).double()
    with torch.no_grad():
        for parameter in [*embedding.parameters(), *softmax.parameters()]:
            parameter.normal_(0, 0.5)
    return embedding, softmax


def bucket_of(word: int) -> tuple[int, int]:
    """Return (bucket, row in its table)."""
    edges = (0, *CUTOFFS, V)
    bucket = sum(word >= edge for edge in edges[1:-1])
    return bucket, word - edges[bucket]


def log_probability(h: torch.Tensor, word: int, embedding, softmax) -> torch.Tensor:
    tables, projections = list(embedding.tables), list(embedding.projections)
    head = (h @ softmax.head_projection) @ torch.cat([tables[0], softmax.cluster_weight]).T
    head = torch.log_softmax(head + torch.cat([softmax.biases[0], softmax.cluster_bias]), dim=0)
    bucket, row = bucket_of(word)
    if bucket == 0:
        return head[row]
    tail = torch.log_softmax((h @ projections[bucket]) @ tables[bucket].T + softmax.biases[bucket], dim=0)
    return head[-bucket] + tail[row]


def test_embedding_is_the_scaled_projected_row():
    embedding, _ = make()
    words = torch.arange(V).view(5, 6)
    result = embedding(words)
    for word in range(V):
        bucket, row = bucket_of(word)
        expected = math.sqrt(D) * embedding.projections[bucket] @ embedding.tables[bucket][row]
        torch.testing.assert_close(result[word // 6, word % 6], expected, rtol=1e-12, atol=1e-14)
    assert [tuple(table.shape) for table in embedding.tables] == [(6, 16), (8, 8), (16, 4)]
    assert [tuple(projection.shape) for projection in embedding.projections] == [(16, 16), (16, 8), (16, 4)]


@pytest.mark.parametrize("cutoffs", [(), CUTOFFS])
@pytest.mark.parametrize("word", [-1, V])
def test_a_word_outside_the_vocabulary_is_no_zero_row(cutoffs, word):
    embedding, _ = make(cutoffs=cutoffs, vocab_size=V)
    with pytest.raises(IndexError, match="out of range"):
        embedding(torch.tensor([[0, word, V - 1]]))


def test_softmax_is_a_distribution_with_the_cluster_columns_reversed():
    embedding, softmax = make()
    h = torch.randn(D, dtype=torch.float64)
    words = torch.randperm(V)
    nll = softmax(h.expand(V, D), words, embedding)
    assert torch.exp(-nll).sum().item() == pytest.approx(1.0, abs=1e-12)
    for word, value in zip(words.tolist(), nll, strict=True):
        torch.testing.assert_close(-value, log_probability(h, word, embedding, softmax), rtol=1e-12, atol=0)


def test_losses_come_back_in_order_and_in_shape():
    embedding, softmax = make()
    hidden, targets = torch.randn(3, 4, D, dtype=torch.float64), torch.randint(V, (3, 4))
    nll = softmax(hidden, targets, embedding)
    assert nll.shape == (3, 4)
    for b in range(3):
        for t in range(4):
            expected = -log_probability(hidden[b, t], int(targets[b, t]), embedding, softmax)
            torch.testing.assert_close(nll[b, t], expected, rtol=1e-12, atol=0)


def test_gradients_of_the_tied_weights_against_finite_differences():
    embedding, softmax = make()
    tokens, targets = torch.tensor([0, 7, 20, 29]), torch.tensor([8, 2, 29, 14])
    parameters = [*embedding.parameters(), *softmax.parameters()]
    names = [f"e.{n}" for n, _ in embedding.named_parameters()] + [f"s.{n}" for n, _ in softmax.named_parameters()]

    def loss(*values):
        both = dict(zip(names, values, strict=True))
        e = torch.func.functional_call(embedding, {n[2:]: v for n, v in both.items() if n[0] == "e"}, (tokens,))
        tied = AdaptiveTied(embedding, both)
        return torch.func.functional_call(
            softmax, {n[2:]: v for n, v in both.items() if n[0] == "s"}, (e, targets, tied)
        ).sum()

    assert torch.autograd.gradcheck(loss, tuple(parameters), fast_mode=True)


class AdaptiveTied:
    """The weights of an embedding as given values, for `functional_call`."""

    def __init__(self, embedding, values):
        self.edges, self.buckets = embedding.edges, embedding.buckets
        self.tables = [values[f"e.tables.{i}"] for i in range(3)]
        self.projections = [values[f"e.projections.{i}"] for i in range(3)]


def test_every_parameter_has_a_gradient_whatever_buckets_are_touched():
    embedding, softmax = make()
    softmax(embedding(torch.tensor([1, 2])), torch.tensor([3, 0]), embedding).sum().backward()
    parameters = [*embedding.named_parameters(), *softmax.named_parameters()]
    assert [name for name, parameter in parameters if parameter.grad is None] == []
    assert embedding.tables[2].grad.abs().sum() == 0


def test_one_bucket_is_a_plain_softmax():
    embedding, softmax = make(cutoffs=(), vocab_size=9)
    hidden, targets = torch.randn(5, D, dtype=torch.float64), torch.randint(9, (5,))
    logits = hidden @ softmax.head_projection @ embedding.tables[0].T + softmax.biases[0]
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(softmax(hidden, targets, embedding), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutoffs": [6, 30]}, r"cutoffs=\[6, 30\] .* 30 words.*1 to 29"),
        ({"cutoffs": [6, 6]}, "increasing"),
        ({"cutoffs": [0]}, "from 1"),
        ({"cutoffs": [6.0]}, "integers"),
        ({"div_val": 0}, "div_val=0"),
        ({"div_val": 20}, "no width for bucket 2"),
    ],
)
def test_impossible_buckets(options, message):
    arguments = {"vocab_size": V, "d_model": D, "cutoffs": list(CUTOFFS), "div_val": 2, "init_std": 0.01} | options
    with pytest.raises(ValueError, match=message):
        AdaptiveEmbedding(**arguments)
