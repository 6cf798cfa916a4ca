"""The DEQ Transformer: a language model whose hidden states are the equilibrium of one Transformer-XL block.

B streams of L tokens each, m positions of memory, V words, D model width. The state of a solve is (B, L, D).
Sources: Bai et al., *Deep Equilibrium Models* (2019), and its official code; Geng et al. 2021, Table 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.deq_transformer.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from models.deq_transformer.attention import sinusoids
from models.deq_transformer.cell import CellMasks, Norm, Residual, TransformerCell
from phantom import DEQ, Solution, variational_mask
from phantom.layers import check_dropout
from phantom.validate import check_counts, check_number

Memory = tuple[Tensor, Tensor]  # past states (B, m, D) and their injections (B, m, 3D), without a graph


class Masks(NamedTuple):
    """Dropout masks of one forward pass; None for no dropout.

    Args:
        embedding: (B, 1, D) on the channels of the embedded words, the same at every position.
        positions: (1, D) on the channels of the sinusoids.
        cell: masks inside f; None lets the cell draw them.
        output: (B, L, 1) on whole positions of the equilibrium, as in the official code; these predict from zeros.
    """

    embedding: Tensor | None = None
    positions: Tensor | None = None
    cell: CellMasks | None = CellMasks()
    output: Tensor | None = None


class DEQTransformer(nn.Module):
    """Predict the next word of B parallel streams, segment by segment, with a memory of earlier segments.

    The model embeds the words and maps them to the injection u. For every segment the solver finds z = F(z; u, memory)
    from zeros, and an adaptive softmax, tied to the embedding, reads z. The memory holds past states and injections
    without a graph: gradients stay within the segment.

    Args:
        vocab_size: V, given by the data.
        d_model: D, even.
        num_heads: attention heads, a divisor of D.
        d_inner: inner width of the feed-forward layers.
        cutoffs: first word of every bucket but the first of embedding and softmax.
        div_val: ratio of the widths of neighbouring buckets.
        norm: `post` or `pre` layer normalisation.
        preln_residual: under `norm=pre`, the residual of the feed-forward layers: `normalised` (official) or `plain`.
        mem_len: positions of memory in training.
        eval_mem_len: positions of memory in evaluation mode.
        window: maximum number of positions that a position sees, including itself (official code: 1000).
        dropout: probability of all dropout masks except that of attention.
        attention_dropout: probability of the mask on attention probabilities.
        init_std: initial standard deviation of embedding, projections, injection and attention biases. The official
            code uses 0.01 for D = 700; keep init_std * sqrt(D) at another width, or the injection starts too small.
        deq: solver and gradient estimator.

    Raises:
        ValueError: an argument is out of range; the message says what is allowed.
    """

    kinds = ("language_modelling",)

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        num_heads: int,
        d_inner: int,
        cutoffs: Sequence[int],
        div_val: int,
        norm: Norm,
        preln_residual: Residual,
        mem_len: int,
        eval_mem_len: int,
        window: int,
        dropout: float,
        attention_dropout: float,
        init_std: float,
        deq: DEQ,
    ) -> None:
        super().__init__()
        check_counts(
            least=1, vocab_size=vocab_size, d_model=d_model, num_heads=num_heads, d_inner=d_inner, window=window
        )
        check_counts(least=0, mem_len=mem_len, eval_mem_len=eval_mem_len)
        check_dropout(dropout)
        check_number(
            "attention_dropout", attention_dropout, "[0, 1)", also=": the probability that a weight is dropped"
        )
        check_number("init_std", init_std, "> 0")
        if d_model % 2 or d_model % num_heads:
            raise ValueError(f"d_model={d_model} must be even and a multiple of num_heads={num_heads}")
        self.d_model, self.dropout = d_model, dropout
        self.mem_len, self.eval_mem_len = mem_len, eval_mem_len
        self.embedding = AdaptiveEmbedding(
            vocab_size=vocab_size, d_model=d_model, cutoffs=cutoffs, div_val=div_val, init_std=init_std
        )
        self.injection = nn.Linear(d_model, 3 * d_model)
        nn.init.normal_(self.injection.weight, 0.0, init_std)
        nn.init.zeros_(self.injection.bias)
        self.cell = TransformerCell(
            d_model=d_model,
            num_heads=num_heads,
            d_inner=d_inner,
            norm=norm,
            preln_residual=preln_residual,
            dropout=dropout,
            attention_dropout=attention_dropout,
            window=window,
            init_std=init_std,
        )
        self.softmax = AdaptiveSoftmax(self.embedding, init_std=init_std)
        self.deq = deq

    def forward(
        self, tokens: Tensor, targets: Tensor, memory: Memory | None, *, masks: Masks | None = None
    ) -> tuple[Tensor, tuple[Solution], Memory]:
        """Return (-log p of every target (B, L), the one Solution in a tuple, the memory for the next segment).

        Args:
            tokens: (B, L) int64 word indices.
            targets: (B, L) the words that follow.
            memory: the memory that the previous segment of the same streams returned; None at the beginning.
            masks: dropout masks; None draws them here.

        Raises:
            ValueError: the shapes of tokens, targets and memory disagree.
        """
        if tokens.dim() != 2 or targets.shape != tokens.shape:
            raise ValueError(
                f"tokens and targets must both be (B, L), got {tuple(tokens.shape)} and {tuple(targets.shape)}"
            )
        masks = self._draw(tokens) if masks is None else masks
        history, u_history = self._start(tokens) if memory is None else memory
        if history.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"memory has {history.shape[0]} streams, but tokens have {tokens.shape[0]}: pass the memory of the "
                "same streams, or None at their beginning"
            )
        if u_history.shape[:2] != history.shape[:2]:
            raise ValueError(
                f"the two parts of memory must have the same streams and length, got {tuple(history.shape)} and "
                f"{tuple(u_history.shape)}: pass what the call before returned"
            )
        u = torch.cat([u_history, self.inject(tokens, masks.embedding)], dim=1)
        positions = sinusoids(u.shape[1], self.d_model, device=u.device, dtype=history.dtype)
        f = self.cell.bind(
            u,
            history,
            _drop(positions, masks.positions),
            masks=masks.cell,
        )
        solution = self.deq(f, history.new_zeros(*tokens.shape, self.d_model))
        nll = self.softmax(_drop(solution.value, masks.output), targets, self.embedding)
        states = torch.cat([history, solution.value.detach()], dim=1)
        return nll, (solution,), (self._last(states), self._last(u.detach()))

    def inject(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the injection (B, L, 3D), which f adds to queries, keys and values."""
        return self.injection(_drop(self.embedding(tokens), mask))

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of distinct parameters of each part; the parts add up to all parameters."""
        parts = {
            "embedding_tables": self.embedding.tables,
            "input_projections": self.embedding.projections,
            "injection": self.injection,
            "cell_attention": self.cell.attention,
            "cell_ffn": self.cell.ffn,
            "output": self.softmax,
        }
        return {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}

    @property
    def official_parameter_count(self) -> int:
        """The number of parameters that the official script reports: it counts tied projections of bucket 1 on twice.

        There, input and output projections share storage, and the optimiser updates them twice; here each pair is one
        parameter with one gradient.
        """
        shared = sum(p.numel() for p in list(self.embedding.projections)[1:])
        return sum(self.parameter_counts().values()) + shared

    def _start(self, tokens: Tensor) -> Memory:
        # the state has the parameters' dtype, even if autocast gives the injection a narrower one
        weight = self.injection.weight
        return weight.new_zeros(len(tokens), 0, self.d_model), weight.new_zeros(len(tokens), 0, 3 * self.d_model)

    def _last(self, x: Tensor) -> Tensor:
        keep = min(self.mem_len if self.training else self.eval_mem_len, x.shape[1])
        return x[:, x.shape[1] - keep :].clone()  # a view would keep the whole tensor alive, in checkpoints too

    def _draw(self, tokens: Tensor) -> Masks:
        weight = self.injection.weight
        draw = partial(
            variational_mask, p=self.dropout, training=self.training, device=weight.device, dtype=weight.dtype
        )
        batch, length = tokens.shape
        return Masks(
            embedding=draw((batch, 1, self.d_model)),
            positions=draw((1, self.d_model)),
            cell=None,
            output=draw((batch, length, 1)),
        )


def _drop(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
