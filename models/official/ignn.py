"""Names of IGNN in two public code bases: ignn (SwiftieH/IGNN) and torchdeq (locuslab/torchdeq, deq-zoo/ignn)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from models.official.piece import Convert, Piece

_LAYER = re.compile(r"ig(\d+)\.(W|Omega_1|Omega_2|bias)(_orig|_g|_u|_v|)")
_PARTS = {"W": "W", "Omega_1": "omega_1", "Omega_2": "omega_2", "bias": "bias"}
_SPECTRAL = {"_orig": ".weight", "_g": ".g", "_u": ".u", "_v": ".v", "": ""}
_GRAPH_HEAD = {"V_0": "hidden", "V_1": "classifier"}
_CHAINS_HEAD = {"V": "classifier"}


def rename_ignn(official: str, heads: Mapping[str, str]) -> str:
    """Return our name of an official parameter; a name that no rule matches stays unchanged.

    Args:
        heads: our names of the official linear maps.
    """
    if match := _LAYER.fullmatch(official):
        return f"layers.{int(match[1]) - 1}.{_PARTS[match[2]]}{_SPECTRAL[match[3]]}"
    module, dot, rest = official.partition(".")
    return heads.get(module, module) + dot + rest


def graph_model(state: dict[str, Tensor]) -> Iterator[Piece]:
    """Convert the graph-classification model; both code bases use the same names."""
    for official, tensor in state.items():
        yield Piece(official, rename_ignn(official, _GRAPH_HEAD), tensor)


def node_model(state: dict[str, Tensor]) -> Iterator[Piece]:
    """Convert the PPI model: the linear map beside block l is V_{l-1}; beside the last block it is V."""
    last = sum(re.fullmatch(r"ig\d+\.bias", name) is not None for name in state) - 1
    heads = {f"V_{i}": f"skips.{i}" for i in range(last)} | {"V": f"skips.{last}"}
    for official, tensor in state.items():
        yield Piece(official, rename_ignn(official, heads), tensor)


def chains_model(state: dict[str, Tensor]) -> Iterator[Piece]:
    """Convert the Chains model; its frozen X_0 of zeros is our initial guess, not a parameter."""
    for official, tensor in state.items():
        if official != "X_0" or tensor.any():
            yield Piece(official, rename_ignn(official, _CHAINS_HEAD), tensor)


IGNN_SOURCES: dict[str, dict[str, Convert]] = {
    "GraphIGNN": {"ignn": graph_model, "torchdeq": graph_model},
    "NodeIGNN": {"ignn": node_model, "torchdeq": node_model},
    "ChainsIGNN": {"ignn": chains_model},
}
