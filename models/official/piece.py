"""The tensors that a converter of official checkpoints yields, and their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor


class Piece(NamedTuple):
    """One tensor of an official state dict, under our name.

    Args:
        official: name in the official state dict, for error messages.
        name: our name; a name that the model does not have is reported as unknown.
        tensor: the value in our shape.
    """

    official: str
    name: str
    tensor: Tensor


# Yields one Piece per official tensor; leaves out only tensors known to carry no information.
Convert = Callable[[dict[str, Tensor]], Iterator[Piece]]


def rename(official: str, rules: Mapping[str, str]) -> str:
    """Return our name of an official one; a name that no rule matches stays unchanged.

    Args:
        rules: pattern -> ours, which may refer to the pattern's groups. The first pattern that matches the beginning of
            `official` applies, and what follows the match is kept.
    """
    for pattern, ours in rules.items():
        if match := re.match(pattern, official):
            return match.expand(ours) + official[match.end() :]
    return official
