"""The tensors that a converter of official checkpoints yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
