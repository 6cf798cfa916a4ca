"""Language modelling: negative log-likelihood per token, and perplexity."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from phantom.engine.tasks.base import Score, Tally, Task, outputs_of


class LanguageModelling(Task):
    """Score (tokens (B, L), targets (B, L)) by the log-likelihood of `model(tokens, targets, memory)`; counts tokens.

    The carry is the model's memory of the streams. Perplexity is exp of the mean over all tokens, so segments of
    different lengths weigh as much as they have tokens.
    """

    kind = "language_modelling"
    unit = "tokens"
    carry_rows = True
    metric = "perplexity"
    mode = "min"

    def score(self, model: nn.Module, batch: Any, carry: Any) -> Score:
        tokens, targets = batch
        nll, solutions, memory = outputs_of(model, tokens, targets, carry)
        return Score(Tally(nll.sum(), targets.numel()), solutions, memory)

    def report(self, tally: Tally) -> dict[str, float]:
        loss = float(tally.loss_sum) / tally.count
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
