"""A vote of all ranks that costs no step any time."""

from __future__ import annotations

import torch
from torch import Tensor


class Vote:
    """Whether any rank has voted yes, which all ranks learn at the same step.

    The votes are summed with other numbers that the ranks exchange anyway. On a GPU the sum is read one step late: the
    host waits for the step before, and not for the one that it has just queued.

    own: this rank's vote, 1 for yes.
    """

    def __init__(self, device: torch.device) -> None:
        self.own = 0
        self._on_gpu = device.type == "cuda"
        self._counted: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def count(self, votes: Tensor) -> None:
        """Take the sum () of the votes of a step, from the device."""
        if not self._on_gpu:
            self._counted = [(votes, None)]
            return
        copy = torch.empty_like(votes, device="cpu", pin_memory=True)
        copy.copy_(votes, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._counted = [*self._counted[-1:], (copy, event)]

    @property
    def passed(self) -> bool:
        """Whether a rank had voted yes; on a GPU, by the step before the last one."""
        if len(self._counted) < 1 + self._on_gpu:
            return False
        votes, event = self._counted[0]
        if event is not None:
            event.synchronize()
        return bool(votes > 0)
