"""The list of rounds, and what a round asks of the world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scripts.drilling.room import Room


@dataclass(frozen=True)
class Round:
    """One round: `play` breaks something in a room of its own, and raises BrokenPromiseError where a promise is broken.

    promise: what a user is told, in one sentence.
    """

    name: str
    promise: str
    play: Callable[[Room], None]


ROUNDS: dict[str, Round] = {}


def drill(name: str) -> Callable[[Callable[[Room], None]], Callable[[Room], None]]:
    """List a function as the round `name`; its docstring is the promise."""

    def listed(play: Callable[[Room], None]) -> Callable[[Room], None]:
        if name in ROUNDS:
            raise ValueError(f"there are two rounds named {name}")
        ROUNDS[name] = Round(name, (play.__doc__ or "").strip(), play)
        return play

    return listed
