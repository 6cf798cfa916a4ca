"""Names of the recursive reasoners in two public code bases: trm (TinyRecursiveModels, and EqR) and hrm (HRM)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from models.official.piece import Convert, Piece

_LAYER = re.compile(r"(L|H)_level\.layers\.(\d+)\.(self_attn|mlp_t|mlp)\.(\w+)\.weight")
_PARTS = {
    ("self_attn", "qkv_proj"): "mix.query_key_value",
    ("self_attn", "o_proj"): "mix.output",
    ("mlp_t", "gate_up_proj"): "mix.up",
    ("mlp_t", "down_proj"): "mix.down",
    ("mlp", "gate_up_proj"): "mlp.up",
    ("mlp", "down_proj"): "mlp.down",
}
_OTHERS = {
    "H_init": "start_slow",
    "L_init": "start_fast",
    "embed_tokens.embedding_weight": "embedding.weight",
    "embed_pos.embedding_weight": "positions",
    "lm_head.weight": "readout.weight",
    "q_head.weight": "halting.weight",
    "q_head.bias": "halting.bias",
}


def rename_reasoner(official: str, *, shared: bool) -> tuple[str, ...]:
    """Return our names of an official parameter; a name without a rule comes back as it is.

    Args:
        shared: one network is both the fast and the slow one; its parameters then have two names here.
    """
    name = _inner(official)
    if match := _LAYER.fullmatch(name):
        level, layer, module, part = match.groups()
        roles = ("fast", "slow") if shared else ("fast",) if level == "L" else ("slow",)
        return tuple(f"cell.{role}.blocks.{layer}.{_PARTS.get((module, part), part)}.weight" for role in roles)
    return (_OTHERS.get(name, official),)


def _inner(official: str) -> str:
    # the codes save their loss head, whose `model` it is
    return official.removeprefix("model.").removeprefix("inner.")


def shared_network(state: dict[str, Tensor]) -> Iterator[Piece]:
    """Convert TRM and EqR."""
    return _convert(state, shared=True)


def two_networks(state: dict[str, Tensor]) -> Iterator[Piece]:
    """Convert HRM."""
    return _convert(state, shared=False)


def _convert(state: dict[str, Tensor], *, shared: bool) -> Iterator[Piece]:
    for official, tensor in state.items():
        if _inner(official) == "puzzle_emb.weights":
            if len(tensor) == 1:  # Sudoku and mazes have one identifier; a table of several stays unknown
                yield Piece(official, "prefix", tensor[0])
            else:
                yield Piece(official, official, tensor)
            continue
        for name in rename_reasoner(official, shared=shared):
            yield Piece(official, name, tensor)


REASONER_SOURCES: dict[str, Convert] = {"trm": shared_network, "eqr": shared_network, "hrm": two_networks}
