"""A Transformer cell that computes nothing ahead of a solve but its effective weights and masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.deq_transformer.attention import causal_mask, explicit_attention, fused_attention, relative_shift
from models.deq_transformer.cell import CellMasks, TransformerCell


class UnhoistedCell(nn.Module):
    """Take the place of a `TransformerCell`: the same F, the same numbers, but without its savings.

    Every evaluation of f projects history and segment to queries, keys and values, projects the positions, and makes
    the causal mask, as public implementations of the DEQ Transformer do.
    """

    def __init__(self, cell: TransformerCell) -> None:
        super().__init__()
        self.cell = cell

    def bind(
        self,
        u: Tensor,
        history: Tensor,
        positions: Tensor,
        *,
        masks: CellMasks | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """Return f(z), with the arguments of `TransformerCell.bind`."""
        cell, attention, ffn = self.cell, self.cell.attention, self.cell.ffn
        m = history.shape[1]
        masks = cell._draw(u, u.shape[1] - m) if masks is None else masks
        qkv, position, out = attention.qkv(), attention.position(), attention.out()
        bound_ffn = ffn.bind(masks)
        attention_of = fused_attention if masks.attention is None else partial(explicit_attention, mask=masks.attention)

        def attend(z: Tensor) -> Tensor:
            x = torch.cat([history, z], dim=1)
            x = cell._normalise(x) if cell.norm == "pre" else x
            query, key, value = attention._heads(F.linear(x, qkv) + u, 3)
            query = query[:, :, m:]
            r = F.linear(positions, position).unflatten(-1, (attention.num_heads, -1))
            scale = r.shape[-1] ** -0.5
            r = (r * scale).permute(1, 2, 0)
            by_distance = (query + attention.position_bias[:, None]) @ r
            hidden = causal_mask(z.shape[1], len(positions), window=attention.window, device=z.device, dtype=z.dtype)
            bias = relative_shift(by_distance).add_(hidden)
            attended = attention_of(query + attention.content_bias[:, None], key, value, bias, scale=scale)
            output = F.linear(attended.transpose(1, 2).flatten(2), out, attention.out_bias)
            return output if masks.out is None else output.mul_(masks.out)

        def f(z: Tensor) -> Tensor:
            a = z + attend(z)
            if cell.norm == "post":
                a = cell._normalise(a)
                return cell._normalise(a + ffn(a, bound_ffn))
            n = cell._normalise(a)
            return (n if cell.preln_residual == "normalised" else a) + ffn(n, bound_ffn)

        return f
