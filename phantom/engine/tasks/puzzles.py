"""Puzzle solving with deep supervision: exact match and accuracy per cell."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from phantom.engine.tasks.base import Score, Tally, Task, outputs_of


class PuzzleSolving(Task):
    """Score (inputs (B, N), labels (B, N)) by `model(inputs, labels, carry)`; counts puzzles.

    The model returns an outcome with `loss` (B,) and counts by name, `finished`, `exact`, `right` and `cells` among
    them. In training a call is one supervision step and the carry keeps the puzzles on their way; rates are over those
    that finish in the call. In evaluation a call takes all supervision steps: further counts, such as `exact@4` of
    step 4, become rates over all puzzles.
    """

    kind = "puzzle_solving"
    unit = "puzzles"
    carry_rows = True
    metric = "exact_match"
    mode = "max"

    def score(self, model: nn.Module, batch: Any, carry: Any) -> Score:
        inputs, labels = batch
        outcome, solutions, carry = outputs_of(model, inputs, labels, carry)
        return Score(Tally(outcome.loss.sum(), len(inputs), outcome.sums), solutions, carry)

    def report(self, tally: Tally) -> dict[str, float]:
        sums = {name: float(value) for name, value in tally.sums.items()}
        finished, cells = sums.pop("finished"), sums.pop("cells")
        rates = {
            "loss": float(tally.loss_sum) / tally.count,
            "exact_match": _percent(sums.pop("exact"), finished),
            "cell_accuracy": _percent(sums.pop("right"), cells),
            "finished": finished / tally.count,
        }
        changes = {name: sums.pop(name) / finished for name in ("state_change",) if name in sums}
        return rates | changes | {name.replace("exact", "exact_match"): _percent(sums[name], finished) for name in sums}


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else math.nan
