"""Attention over relative distances (Transformer-XL), in a fused and an explicit form that agree.

B streams, H heads of width d, q query positions, K key positions (history and present), m = K - q of history.
Source: Dai et al., *Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context* (2019).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sinusoids(length: int, width: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return (length, width): row r holds sin, then cos, of the distance length - 1 - r at width / 2 frequencies.

    The frequencies are 10000^(-2j / width), j = 0, ..., width / 2 - 1.
    """
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float64) / width
    distances = torch.arange(length - 1, -1, -1, device=device, dtype=torch.float64)
    phase = distances[:, None] * 10000.0**-exponents
    return torch.cat([phase.sin(), phase.cos()], dim=1).to(dtype)


def causal_mask(q: int, keys: int, *, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return (q, K): 0 where the distance i + m - j of key j from query i is in [0, window), and -inf elsewhere."""
    i = torch.arange(q, device=device)[:, None]
    j = torch.arange(keys, device=device)
    distance = i + (keys - q) - j
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(q, keys, device=device, dtype=dtype).masked_fill_(hidden, -torch.inf)


def relative_shift(scores: Tensor) -> Tensor:
    """Return (..., q, K) with entry (i, j) = scores[i, j + q - 1 - i], the score of distance i + m - j.

    `scores` has distance K - 1 - r in column r. Entries in the future (distance below 0) hold values of other rows:
    mask them. The result is a new tensor.
    """
    q, keys = scores.shape[-2:]
    return F.pad(scores, (1, 0)).flatten(-2)[..., q:].unflatten(-1, (q, keys))


def row_multiple(x: Tensor) -> int:
    """Return what the numbers in a row should be a multiple of on the device of `x`.

    CUDA's matrix units and fused attention take rows of whole 16 bytes: 8 numbers in bfloat16, 4 in float32. A head of
    width 70 has neither, and torch then attends without a fused kernel.
    """
    return 16 // x.element_size() if x.is_cuda else 1


def padded(x: Tensor, *multiples: int) -> Tensor:
    """Return `x` with zeros behind its last dimensions, up to multiples of these numbers; `x` itself where they are."""
    lacking = [-size % multiple for size, multiple in zip(x.shape[-len(multiples) :], multiples, strict=True)]
    return F.pad(x, [pad for size in reversed(lacking) for pad in (0, size)]) if any(lacking) else x


def fused_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, scale: float) -> Tensor:
    """Return softmax(scale query key^T + bias) value with torch's fused kernel, if the device has one.

    Shapes (B, H, q, d), (B, H, K, d), (B, H, K, d), (B, H, q, K) -> (B, H, q, d). The kernel has no second derivative:
    what differentiates f twice makes torch do without it, `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), scale=scale)


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, scale: float, mask: Tensor
) -> Tensor:
    """Return the value of `fused_attention` step by step, with a dropout mask.

    Args:
        mask: (B, H, q, K) factors on the probabilities, which are not renormalised.
    """
    scores = (query * scale) @ key.mT
    probabilities = torch.softmax(scores + bias, dim=-1) * mask
    return probabilities.to(value.dtype) @ value
