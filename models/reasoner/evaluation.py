"""What is counted of an evaluation: answers by supervision step and over several starts.

B puzzles, T supervision steps, R starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 3  # steps over which a start's logits must be calm


class Run(NamedTuple):
    """The supervision steps of all puzzles from one start; see `score` for what becomes of it.

    Args:
        loss: (B,) at the last step.
        exact: (T, B) whether all cells are right.
        right: (T, B) cells that are right.
        logit_change: (T, B) distance of the logits from those of the step before, per cell; infinite at the first step.
        state_change: (T, B) |z - z_before| / |z|.
    """

    loss: Tensor
    exact: Tensor
    right: Tensor
    logit_change: Tensor
    state_change: Tensor


def score(runs: Sequence[Run], cells: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss (B,) and the counts of an evaluation by name.

    Of several starts, the one whose logits changed least over the last three steps gives the answer, step by step
    (EqR, arXiv 2605.21488). `exact@t` is of step t, for powers of two and the last; `exact_any` and `exact_each` are of
    the best start and of the mean start at the last step.

    Args:
        runs: R of them.
        cells: (B,) scored cells.
    """
    loss, exact, right, logit_change, state_change = (torch.stack(part) for part in zip(*runs, strict=True))
    steps = exact.shape[1]

    def chosen(values: Tensor, t: int) -> Tensor:
        start = logit_change[:, max(1, t - WINDOW + 1) : t + 1].mean(dim=1).argmin(dim=0) if t else 0
        return values[start, torch.arange(values.shape[1], device=values.device)]

    last = steps - 1
    sums = {
        "finished": torch.ones_like(cells),
        "exact": chosen(exact[:, last], last),
        "right": chosen(right[:, last], last),
        "cells": cells,
        "state_change": chosen(state_change[:, last], last),
    }
    sums |= {f"exact@{t + 1}": chosen(exact[:, t], t) for t in range(steps) if t == last or (t + 1) & t == 0}
    if len(runs) > 1:
        sums |= {"exact_any": exact[:, last].any(dim=0), "exact_each": exact[:, last].double().mean(dim=0)}
    return chosen(loss, last), {name: value.sum() for name, value in sums.items()}
