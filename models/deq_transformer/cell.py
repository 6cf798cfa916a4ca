"""The equilibrium cell of the DEQ Transformer: one Transformer-XL block, weight-normalised, with input injection.

B streams, q positions of the segment, m of history, K = m + q; D model width, H heads of width d, I inner width.
Sources: Bai et al., *Deep Equilibrium Models* (2019); Bai et al., *Stabilizing Equilibrium Models by Jacobian
Regularization* (2021), with the details of their official code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.deq_transformer.attention import (
    causal_mask,
    explicit_attention,
    fused_attention,
    padded,
    relative_shift,
    row_multiple,
)
from phantom import WeightNorm, variational_mask
from phantom.layers import cast_for_autocast
from phantom.validate import check_choice

Norm = Literal["post", "pre"]
Residual = Literal["normalised", "plain"]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class CellMasks(NamedTuple):
    """Dropout masks of one solve; None for no dropout.

    Args:
        attention: (B, H, q, K) on the attention probabilities.
        out: (B, 1, D) on the output projection of attention.
        inner: (B, 1, I) after the ReLU.
        ffn: (B, 1, D) on the output of the feed-forward layers.
    """

    attention: Tensor | None = None
    out: Tensor | None = None
    inner: Tensor | None = None
    ffn: Tensor | None = None


class BoundAttention(NamedTuple):
    """The tensors that attention keeps fixed during a solve; D and d are padded to `multiple` by zeros, in `u`, too.

    Args:
        multiple: see `row_multiple`.
        qkv: (3Hd, D) effective weight: H heads of width d each.
        out: (D, Hd) effective weight, and `out_bias` (D,).
        content_bias, position_bias: (H, 1, d).
        u: (B, q, 3Hd) injection of the segment.
        key, value: (B, H, m, d) keys and values of the history.
        positions: (H, d, K) projected distances over the square root of the head's own width.
        hidden: (q, K) the causal mask, 0 or -inf.
        attend: fused or explicit attention.
        mask: (B, 1, D) dropout mask on the output.
    """

    multiple: int
    qkv: Tensor
    out: Tensor
    out_bias: Tensor
    content_bias: Tensor
    position_bias: Tensor
    u: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor
    hidden: Tensor
    attend: Attend
    mask: Tensor | None


class Attention(nn.Module):
    """Relative multi-head attention of a segment over history and itself.

    [q k v] = x Wqkv^T + u and r = Wr pos. The score of query i and key j at distance t is
    ((q_i + b_content) k_j + (q_i + b_position) r_t) / sqrt(d). Wqkv, Wr and Wo are weight-normalised.
    """

    def __init__(self, *, d_model: int, num_heads: int, window: int, init_std: float) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        head_dim = d_model // num_heads
        # the official code keeps torch's default initialisation of weight-normalised matrices
        self.qkv = WeightNorm(nn.Linear(d_model, 3 * d_model, bias=False).weight)
        self.position = WeightNorm(nn.Linear(d_model, d_model, bias=False).weight)
        self.out = WeightNorm(nn.Linear(d_model, d_model, bias=False).weight)
        self.out_bias = nn.Parameter(torch.zeros(d_model))
        self.content_bias = nn.Parameter(torch.empty(num_heads, head_dim).normal_(0, init_std))
        self.position_bias = nn.Parameter(torch.empty(num_heads, head_dim).normal_(0, init_std))

    def bind(self, u: Tensor, history: Tensor, positions: Tensor, *, masks: CellMasks) -> BoundAttention:
        """Compute the fixed tensors of one solve from u (B, K, 3D), history (B, m, D) and positions (K, D)."""
        heads, (length, keys) = (self.num_heads, -1), (history.shape[1], u.shape[1])
        qkv = cast_for_autocast(self.qkv())
        multiple = row_multiple(qkv)
        # a number of zeros in every head changes no product: that of query and key, and that with the output's weight
        qkv = padded(qkv.unflatten(0, (3, *heads)), multiple, multiple).flatten(0, 2)
        u = padded(u.unflatten(-1, (3, *heads)), multiple).flatten(-3)
        width = qkv.shape[0] // 3
        past = F.linear(padded(history, multiple), qkv[width:]) + u[:, :length, width:]
        key, value = self._heads(past, 2)
        r = F.linear(positions, cast_for_autocast(self.position())).unflatten(-1, heads)
        scale = r.shape[-1] ** -0.5
        attend = fused_attention if masks.attention is None else partial(explicit_attention, mask=masks.attention)
        return BoundAttention(
            multiple=multiple,
            qkv=qkv,
            out=padded(cast_for_autocast(self.out()).unflatten(1, heads), multiple, 1, multiple).flatten(1),
            out_bias=padded(self.out_bias, multiple),
            content_bias=padded(self.content_bias, multiple)[:, None].to(qkv.dtype),
            position_bias=padded(self.position_bias, multiple)[:, None].to(qkv.dtype),
            u=u[:, length:].contiguous(),
            key=key.contiguous(),
            value=value.contiguous(),
            positions=padded(r * scale, multiple).permute(1, 2, 0).contiguous(),
            hidden=causal_mask(keys - length, keys, window=self.window, device=r.device, dtype=r.dtype),
            attend=partial(attend, scale=scale),
            mask=None if masks.out is None else padded(masks.out, multiple),
        )

    def forward(self, x: Tensor, bound: BoundAttention) -> Tensor:
        """Return the output (B, q, D) for `x` (B, q, D)."""
        query, key, value = self._heads(F.linear(padded(x, bound.multiple), bound.qkv) + bound.u, 3)
        key, value = torch.cat([bound.key, key], dim=2), torch.cat([bound.value, value], dim=2)
        by_distance = torch.matmul(query + bound.position_bias, bound.positions)
        bias = relative_shift(by_distance).add_(bound.hidden)
        attended = bound.attend(query + bound.content_bias, key, value, bias)
        output = F.linear(attended.transpose(1, 2).flatten(2), bound.out, bound.out_bias)
        return _own_columns(output if bound.mask is None else output.mul_(bound.mask), x)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Return `parts` tensors (B, H, L, d) from (B, L, parts D)."""
        return x.unflatten(-1, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _own_columns(output: Tensor, x: Tensor) -> Tensor:
    """Return the columns of `output` that are not padding, as many as `x` has."""
    return output if output.shape[-1] == x.shape[-1] else output[..., : x.shape[-1]]


class BoundFeedForward(NamedTuple):
    """Effective weights (I, D), (D, I), their biases and masks, fixed during a solve, I and D padded to `multiple`."""

    multiple: int
    inner: Tensor
    inner_bias: Tensor
    outer: Tensor
    outer_bias: Tensor
    inner_mask: Tensor | None
    mask: Tensor | None


class FeedForward(nn.Module):
    """W2 relu(W1 x + b1) + b2, both matrices weight-normalised."""

    def __init__(self, *, d_model: int, d_inner: int) -> None:
        super().__init__()
        self.inner = WeightNorm(nn.Linear(d_model, d_inner, bias=False).weight)
        self.inner_bias = nn.Parameter(torch.zeros(d_inner))
        self.outer = WeightNorm(nn.Linear(d_inner, d_model, bias=False).weight)
        self.outer_bias = nn.Parameter(torch.zeros(d_model))

    def bind(self, masks: CellMasks) -> BoundFeedForward:
        """Compute the effective weights of one solve."""
        inner, outer = cast_for_autocast(self.inner()), cast_for_autocast(self.outer())
        multiple = row_multiple(inner)
        return BoundFeedForward(
            multiple=multiple,
            inner=padded(inner, multiple, multiple),
            inner_bias=padded(self.inner_bias, multiple),
            outer=padded(outer, multiple, multiple),
            outer_bias=padded(self.outer_bias, multiple),
            inner_mask=None if masks.inner is None else padded(masks.inner, multiple),
            mask=None if masks.ffn is None else padded(masks.ffn, multiple),
        )

    def forward(self, x: Tensor, bound: BoundFeedForward) -> Tensor:
        """Return the output (B, q, D) for `x` (B, q, D)."""
        inner = F.linear(padded(x, bound.multiple), bound.inner, bound.inner_bias)
        # a mask is never negative, so it commutes with the ReLU: both run in place, and autograd saves one such tensor
        inner = (inner if bound.inner_mask is None else inner.mul_(bound.inner_mask)).relu_()
        output = F.linear(inner, bound.outer, bound.outer_bias)
        return _own_columns(output if bound.mask is None else output.mul_(bound.mask), x)


class TransformerCell(nn.Module):
    """F(z; u, history): attention and feed-forward with residuals; layer norms have no parameters.

    `post`: a = LN(z + attention(z)), F = LN(a + FFN(a)). `pre`: a = z + attention(LN(z)) with the history normalised
    too, n = LN(a), F = n + FFN(n) (`normalised`, as in the official code) or a + FFN(n) (`plain`).

    Args:
        d_model: D.
        num_heads: H, a divisor of D.
        d_inner: I.
        norm: position of the layer norms, `post` or `pre`.
        preln_residual: residual of the feed-forward layers under `norm=pre`, `normalised` or `plain`.
        dropout: probability of the channel masks after Wo, ReLU and W2.
        attention_dropout: probability of the mask on attention probabilities.
        window: a query sees keys at distances below this.
        init_std: the two attention biases are drawn from N(0, init_std^2).
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        d_inner: int,
        norm: Norm,
        preln_residual: Residual,
        dropout: float,
        attention_dropout: float,
        window: int,
        init_std: float,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, get_args(Norm))
        check_choice("preln_residual", preln_residual, get_args(Residual))
        self.d_model, self.num_heads, self.d_inner = d_model, num_heads, d_inner
        self.norm, self.preln_residual = norm, preln_residual
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.attention = Attention(d_model=d_model, num_heads=num_heads, window=window, init_std=init_std)
        self.ffn = FeedForward(d_model=d_model, d_inner=d_inner)

    def bind(
        self,
        u: Tensor,
        history: Tensor,
        positions: Tensor,
        *,
        masks: CellMasks | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """Return f(z) = F(z; u, history) on (B, q, D) states; compute everything that does not depend on z once.

        Args:
            u: (B, K, 3D) injections of history and segment.
            history: (B, m, D) past states.
            positions: (K, D) distance K - 1 - r in row r.
            masks: dropout masks of the solve; None draws them here.
        """
        masks = self._draw(u, u.shape[1] - history.shape[1]) if masks is None else masks
        history = self._normalise(history) if self.norm == "pre" else history
        attention = self.attention.bind(u, history, positions, masks=masks)
        return partial(self, attention=attention, ffn=self.ffn.bind(masks))

    def forward(self, z: Tensor, attention: BoundAttention, ffn: BoundFeedForward) -> Tensor:
        """Apply F once. Everything that varies is an argument, so `cell.compile()` makes one graph."""
        if self.norm == "post":
            a = self._normalise(z + self.attention(z, attention))
            return self._normalise(a + self.ffn(a, ffn))
        a = z + self.attention(self._normalise(z), attention)
        n = self._normalise(a)
        return (n if self.preln_residual == "normalised" else a) + self.ffn(n, ffn)

    def _normalise(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.d_model,))

    def _draw(self, u: Tensor, q: int) -> CellMasks:
        batch, keys = u.shape[:2]
        dtype = self.ffn.outer_bias.dtype  # autocast may give u a narrower dtype
        draw = partial(variational_mask, training=self.training, device=u.device, dtype=dtype)
        return CellMasks(
            attention=draw((batch, self.num_heads, q, keys), p=self.attention_dropout),
            out=draw((batch, 1, self.d_model), p=self.dropout),
            inner=draw((batch, 1, self.d_inner), p=self.dropout),
            ffn=draw((batch, 1, self.d_model), p=self.dropout),
        )
