"""Deep supervision: one loss and one optimiser step per supervision step, and states that are kept between them.

B rows, S cells, V tokens. A row is a puzzle on its way: its tokens, its state, the number of its supervision steps and
whether it is finished. A finished row takes the puzzle of the same index of the next batch and a new start; the others
keep their puzzle, and what the batch has at their index is passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phantom.state import State
from phantom.validate import check_choice, check_count, check_number

Halting = Literal["fixed", "halt", "halt_or_continue"]
Loss = Literal["softmax", "stablemax"]
IGNORED = -100
HALTING_WEIGHT = 0.5
Carry = dict[str, Any]  # state, steps (B,), finished (B,), inputs (B, S), labels (B, S)


class Supervision(nn.Module):
    """How many supervision steps a puzzle gets, and what each of them costs; it has no parameters.

    loss of a row = mean over its cells of -log p(label) + 0.5 BCE(halt, answer is right)

    with another 0.5 BCE for the second output of `halt_or_continue`, whose target is the value of going on:
    sigmoid(max(halt', continue')) of one more step, sigmoid(halt') at the last.

    Args:
        steps: supervision steps of a puzzle at most.
        halting: `fixed` uses all steps; `halt` finishes a row where the halting output is positive (TRM, EqR);
            `halt_or_continue` where it exceeds the other one (HRM), for a second forward pass in every step.
        exploration: probability, per row and step, of a least number of steps drawn from {2, ..., steps}.
        loss: of a cell; stablemax is s(v) / sum s with s(v) = v + 1 for v >= 0, else 1 / (1 - v), in float64.
        eval_steps: supervision steps in evaluation, where nothing halts; None takes `steps`.
        restarts: start states per puzzle in evaluation; the one whose logits moved least at the end gives the answer.

    Source: Wang et al., *Hierarchical reasoning model* (2025); Jolicoeur-Martineau, *Less is more: recursive reasoning
    with tiny networks* (2025).
    """

    def __init__(
        self,
        *,
        steps: int,
        halting: Halting,
        exploration: float = 0.1,
        loss: Loss = "stablemax",
        eval_steps: int | None = None,
        restarts: int = 1,
    ) -> None:
        super().__init__()
        check_count("supervision.steps", steps, least=1)
        check_choice("supervision.halting", halting, get_args(Halting))
        check_choice("supervision.loss", loss, get_args(Loss))
        check_count("supervision.restarts", restarts, least=1)
        check_count("supervision.eval_steps", eval_steps, least=1, optional=True)
        check_number("supervision.exploration", exploration, "[0, 1]", also=": a probability")
        self.steps, self.halting, self.exploration, self.loss = steps, halting, exploration, loss
        self.eval_steps, self.restarts = eval_steps, restarts

    @property
    def steps_of_evaluation(self) -> int:
        return self.eval_steps or self.steps

    def cell_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss (B,) of `logits` (B, S, V): its mean over the cells of a row that are not ignored."""
        log_probabilities = log_stablemax(logits) if self.loss == "stablemax" else log_softmax(logits)
        scored = labels != IGNORED
        picked = log_probabilities.gather(2, labels.where(scored, 0)[:, :, None])[:, :, 0]
        return -(picked * scored).sum(dim=1) / scored.sum(dim=1).clamp_min(1)

    def halting_losses(self, halting: Tensor, correct: Tensor, target: Tensor | None) -> Tensor:
        """Return the loss (B,) of the halting outputs (B, 2), weighted.

        Args:
            correct: (B,) whether the answer is right.
            target: (B,) value of going on, for the second output; None leaves that one alone.
        """
        outputs, targets = halting[:, :1], correct[:, None].to(halting.dtype)
        if target is not None:
            outputs, targets = halting, torch.cat([targets, target[:, None].to(halting.dtype)], dim=1)
        return HALTING_WEIGHT * F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(dim=1)

    def finished(self, halting: Tensor | None, steps: Tensor) -> Tensor:
        """Return which rows (B,) end at their step number `steps` (B,), counted from 1."""
        last = steps >= self.steps
        if halting is None or self.steps == 1:
            return last
        wants = halting[:, 0] > (halting[:, 1] if self.halting == "halt_or_continue" else 0)
        explores = torch.rand_like(halting[:, 0]) < self.exploration
        least = torch.randint_like(steps, 2, self.steps + 1) * explores
        return last | (wants & (steps >= least))


def log_softmax(logits: Tensor) -> Tensor:
    """Return the log-softmax over the last axis, in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def log_stablemax(logits: Tensor) -> Tensor:
    """Return log(s(v) / sum s) over the last axis in float64, with s(v) = v + 1 for v >= 0, else 1 / (1 - v)."""
    logits = logits.double()
    # clamped, because the gradient of the branch not taken would be 0 * inf = NaN at v = 1
    scores = torch.where(logits >= 0, logits + 1, 1 / (1 - logits.clamp_max(0)))
    return scores.log() - scores.sum(dim=-1, keepdim=True).log()


def refill(carry: Carry | None, inputs: Tensor, labels: Tensor, start: Callable[[], State]) -> Carry:
    """Return the rows to work on: finished ones take the batch's puzzle and a new start, the others stay.

    Raises:
        ValueError: the batch has another shape than the rows that are kept.
    """
    if carry is None:
        steps = torch.zeros(len(inputs), dtype=torch.long, device=inputs.device)
        return {"inputs": inputs, "labels": labels, "state": start(), "steps": steps}
    if carry["inputs"].shape != inputs.shape:
        raise ValueError(
            f"the carry keeps rows of shape {tuple(carry['inputs'].shape)}, the batch is {tuple(inputs.shape)}: "
            "unfinished rows need batches of one size; pass None to begin with new ones"
        )
    new = carry["finished"]
    fresh = {"inputs": inputs, "labels": labels, "state": start(), "steps": torch.zeros_like(carry["steps"])}
    return {name: choose(new, value, carry[name]) for name, value in fresh.items()}


def choose(rows: Tensor, new: State, old: State) -> State:
    """Return `new` where `rows` (B,) is true, else `old`."""
    if isinstance(new, tuple):
        return tuple(choose(rows, a, b) for a, b in zip(new, old, strict=True))
    return torch.where(rows.view(-1, *[1] * (new.dim() - 1)), new, old)


def detached(state: State) -> State:
    """Return the state without its graph."""
    return tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()
