"""Name the rank that the others wait for: a message, and never the end of a run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

from phantom.engine.machine import launcher

PATIENCE = 60.0  # seconds
PERIOD = 5.0
log = logging.getLogger(__name__)


class Lateness:
    """Find the ranks that are late, from what each says of itself: the step that it has begun, and a beat that counts.

    All ranks begin a step within moments of each other. While all are at the same step, as during an evaluation or a
    compilation, nobody is late, however long it takes; a rank whose beat stands still is stopped, or cut off.
    """

    def __init__(self, *, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._seen: dict[int, tuple[tuple[int, int], float]] = {}
        self._ahead: dict[int, float] = {}
        self._told: set[tuple[int, int]] = set()

    def update(self, now: float, states: Mapping[int, tuple[int, int]]) -> list[str]:
        """Return a sentence for every rank that has become late.

        Args:
            now: seconds of any clock.
            states: (step, beat) of every rank.
        """
        furthest = max(step for step, _ in states.values())
        sentences = []
        for rank, (step, beat) in states.items():
            if self._seen.get(rank, ((-1, -1), 0.0))[0] != (step, beat):
                self._seen[rank] = (step, beat), now
            if step < furthest:
                self._ahead.setdefault(rank, now)
            else:
                self._ahead.pop(rank, None)
            silent = now - self._seen[rank][1]
            waited = now - self._ahead.get(rank, now)
            if max(silent, waited) < self._patience or (rank, step) in self._told:
                continue
            self._told.add((rank, step))
            reason = "its process says nothing: it is stopped, or its machine cannot be reached"
            if silent < self._patience:
                reason = "its process lives: it may wait for data, or for a disk"
            where = f"has not gone on from step {step} for {max(silent, waited):.0f} s"
            sentences.append(f"rank {rank} {where}, and the others wait for it; {reason}")
        return sentences


class LateRanks:
    """Let every rank say where it is, and the first one tell who is late; the second one watches the first.

    step: the last step that this rank has begun; the loop sets it.
    """

    def __init__(self) -> None:
        self.step = 0
        self._over = threading.Event()

    def start(self, rank: int, world: int) -> None:
        """Begin to watch, where torchrun's store connects several ranks."""
        if world > 1 and launcher.is_there():
            threading.Thread(target=self._watch, args=(rank, world), name="lateness", daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def _watch(self, rank: int, world: int) -> None:
        store = launcher.store().clone()  # a call of the main thread may hold the other one for minutes
        watched = {0: range(1, world), 1: range(1)}.get(rank, ())
        lateness, beat = Lateness(), 0
        while True:
            try:
                beat += 1
                store.set(f"state/{rank}", f"{self.step} {beat}")
                found = {other: f"state/{other}" for other in watched if store.check([f"state/{other}"])}
                states = {other: _parse(store.get(key)) for other, key in found.items()}
            except RuntimeError:  # the launcher, whose store it is, has gone
                return
            for sentence in lateness.update(time.monotonic(), {rank: (self.step, beat), **states}) if states else ():
                log.warning("%s", sentence)
            if self._over.wait(PERIOD):
                return


def _parse(state: bytes) -> tuple[int, int]:
    step, beat = state.decode().split()
    return int(step), int(beat)
