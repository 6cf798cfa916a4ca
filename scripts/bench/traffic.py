"""What an operator computes and moves: its FLOPs, and the bytes that it reads and writes by a stated rule.

FLOPs are those of convolutions, matrix products and attention, a multiply-add counted as two, by the formulas of
torch.utils.flop_counter; other operators count none.

Bytes: an operator reads every tensor that it takes once and writes every tensor that it returns or changes once. Views
and allocations move nothing; `copy_`, `fill_`, `zero_` and `out=` do not read what they overwrite, nor `zeros_like` and
its kind what they take the shape of; a gather reads as many bytes as it returns; an axis along which a tensor is
broadcast counts once. Caches are not looked at.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ALLOCATES = {"aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.new_empty_strided"}
OVERWRITES = {"aten.copy_", "aten.fill_", "aten.zero_", "aten._foreach_copy_", "aten._foreach_zero_"}
GATHERS = {"aten.embedding", "aten.gather", "aten.index", "aten.index_select"}


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> tuple[torch.dtype, int] | None:
    """Return (number format of the result, FLOPs) of a call, None where it has none that count."""
    formula = flop_registry.get(func.overloadpacket)
    results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    if formula is None or not results:
        return None
    return results[0].dtype, int(formula(*args, **kwargs, out_val=out))


def bytes_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return the bytes that a call reads and writes."""
    name = str(func.overloadpacket)
    if func.is_view or name in ALLOCATES:
        return 0
    result, moved = _size(out), 0
    for_its_shape = name.endswith("_like") or name.startswith("aten.new_")
    for i, argument in enumerate(func._schema.arguments):
        size = _size(args[i] if i < len(args) else kwargs.get(argument.name))
        changes = argument.alias_info is not None and argument.alias_info.is_write
        overwrites = changes and (argument.is_out or name in OVERWRITES)
        reads = 0 if overwrites or for_its_shape else min(size, result) if name in GATHERS and i == 0 else size
        moved += reads + (size if changes else 0)
    fresh = all(returned.alias_info is None for returned in func._schema.returns)
    return moved + (result if fresh else 0)


def _size(tree: Any) -> int:
    return sum(_bytes(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor; an axis along which it is broadcast counts once."""
    lengths = (
        length if stride else min(length, 1) for length, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return math.prod(lengths) * tensor.element_size()
