"""The recursive reasoner: a puzzle in, its solution out, after supervision steps of a two-speed recursion.

B puzzles, N cells, P prefix tokens, S = P + N positions, D width, V tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from models.reasoner.cell import Noise
from models.reasoner.evaluation import Run, score
from models.reasoner.layers import cut_normal_, linear, rotary_tables
from models.reasoner.supervision import IGNORED, Carry, Supervision, detached, refill
from phantom import DEQ, FixedPoint, Solution
from phantom.state import Map, State
from phantom.validate import check_choice, check_count, check_number

Positions = Literal["none", "learned", "rope", "rope2d"]
Start = Literal["fixed", "random"]
Differentiate = Literal["cycle", "pair"]
HALTING_BIAS = -5.0  # never halts at first
STAY = FixedPoint(max_steps=0, tol=None)


class Step(NamedTuple):
    """One supervision step: logits (B, N, V), halting outputs (B, 2) or None, the state behind them, the solve."""

    logits: Tensor
    halting: Tensor | None
    state: State
    solution: Solution


class Outcome(NamedTuple):
    """The loss of every row (B,), and counts by name: `finished` rows, `exact` ones, `right` cells of all `cells`."""

    loss: Tensor
    sums: dict[str, Tensor]


class Reasoner(nn.Module):
    """HRM, TRM, EqR: an embedded puzzle drives a recursion whose slow state is read out as the solution.

    One supervision step solves z = F(z; x) from the state that the previous one left, as the DEQ's solver does it (the
    published models roll F out for a fixed number of cycles), and its estimator is the gradient. `UPG(k=1, lam=1)`
    after T - 1 cycles is the published gradient of TRM and EqR, `BPTT(num_steps=T)` differentiates all of them.

    Args:
        d_model: D.
        prefix_tokens: P positions in front of the cells; the first holds a learned vector, the others zero. 0: none.
        positions: `none`; `learned`, a table added to the embedding; `rope`, or `rope2d` with rows and columns.
        start: of every puzzle: `fixed`, one vector per state, drawn once and never trained; `random`, every number.
        noise: standard deviation of the noise that every call of the network adds; drawn once per supervision step, so
            that f is one function in it.
        differentiate: what the estimator differentiates: one `cycle` F, or the last `pair` of calls of its two
            networks, from the state before the last fast update (HRM). BPTT differentiates all cycles in any case.
        cell: makes the cell from `width` and `length`: `OneSpeed` or `TwoSpeeds`.
        supervision: number and cost of supervision steps.
        vocab_size: V.
        height, width: of the grid; N = height * width.
        deq: solves one supervision step.

    Raises:
        ValueError: an argument is out of range, or two do not fit each other.

    Source: Wang et al., *Hierarchical reasoning model* (arXiv 2506.21734); Jolicoeur-Martineau, *Less is more:
    recursive reasoning with tiny networks* (arXiv 2510.04871); EqR (arXiv 2605.21488).
    """

    kinds = ("puzzle_solving",)
    cell: Any

    def __init__(
        self,
        *,
        d_model: int,
        prefix_tokens: int,
        positions: Positions,
        start: Start,
        noise: float,
        differentiate: Differentiate,
        cell: Callable[..., nn.Module],
        supervision: Supervision,
        vocab_size: int,
        height: int,
        width: int,
        deq: DEQ,
    ) -> None:
        super().__init__()
        for name, value, least in (("d_model", d_model, 1), ("prefix_tokens", prefix_tokens, 0)):
            check_count(name, value, least=least)
        check_choice("positions", positions, get_args(Positions))
        check_choice("start", start, get_args(Start))
        check_choice("differentiate", differentiate, get_args(Differentiate))
        check_number("noise", noise, ">= 0", also=": a standard deviation")
        self.d_model, self.prefix_tokens, self.start, self.noise = d_model, prefix_tokens, start, noise
        self.differentiate, self.supervision = differentiate, supervision
        self.grid = (height, width)
        self.embedding = nn.Embedding(vocab_size, d_model)
        cut_normal_(self.embedding.weight.data, d_model**-0.5)
        length = prefix_tokens + height * width
        self.prefix = nn.Parameter(torch.zeros(d_model)) if prefix_tokens else None
        self.positions = None
        if positions == "learned":
            self.positions = nn.Parameter(cut_normal_(torch.empty(length, d_model), d_model**-0.5))
        self.cell = cell(width=d_model, length=length)
        if supervision.restarts > 1 and start == "fixed" and noise == 0:
            raise ValueError(
                f"supervision.restarts={supervision.restarts} evaluates one answer as many times: the starts differ by "
                "start='random' or noise > 0 alone"
            )
        if differentiate == "pair" and len(self.cell.states) == 1:
            raise ValueError("differentiate='pair' needs a cell of two states; with one, a cycle is one call")
        if differentiate == "pair" and deq.grad.needs_history:
            raise ValueError("differentiate='pair' ends with calls of no solve, and grad=shine reuses one: use 'cycle'")
        for name in self.cell.states:
            self.register_buffer(f"start_{name}", cut_normal_(torch.empty(d_model), 1.0))
        self.readout = linear(d_model, vocab_size)
        self.halting = None
        if supervision.halting != "fixed":
            self.halting = nn.Linear(d_model, 2)
            nn.init.zeros_(self.halting.weight)
            nn.init.constant_(self.halting.bias, HALTING_BIAS)
        self._set_rotary(positions)
        self.deq = deq

    # ------------------------------------------------------------------------------------- one supervision step

    def embed(self, inputs: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Return x (B, S, D) for tokens `inputs` (B, N), of unit variance.

        Args:
            prefix: (B, D) the first prefix token of every puzzle; None takes the learned one.
        """
        x = self.embedding(inputs)
        if self.prefix is not None:
            prefix = self.prefix.expand(len(x), -1) if prefix is None else prefix
            rest = x.new_zeros(len(x), self.prefix_tokens - 1, self.d_model)
            x = torch.cat([prefix[:, None], rest, x], dim=1)
        if self.positions is not None:
            x = (x + self.positions) / math.sqrt(2)
        return math.sqrt(self.d_model) * x

    def bind(self, x: Tensor, noise: Noise | None = None) -> Map:
        """Return F for the embedded puzzles `x` (B, S, D)."""
        return partial(self.cell, **self._bound(x, noise))

    def step(self, inputs: Tensor, state: State, *, noise: Noise | None = None, prefix: Tensor | None = None) -> Step:
        """Run one supervision step from `state`; see `start_state`."""
        x = self.embed(inputs, prefix)
        f = self.bind(x, noise)
        # a backpropagation through time needs no point to start from: it differentiates the whole
        if self.differentiate == "cycle" or not (torch.is_grad_enabled() and self.deq.grad.needs_equilibrium):
            solution = self.deq(f, state)
        else:
            solution = self._last_pair(f, x, state, noise)
        value = solution.value
        answer = value[0] if isinstance(value, tuple) else value
        halting = None
        if self.halting is not None:
            halting = self.halting(answer[:, 0])
            halting = halting.to(torch.promote_types(halting.dtype, torch.float32))
        return Step(self.readout(answer[:, self.prefix_tokens :]), halting, detached(value), solution)

    def start_state(self, inputs: Tensor, generator: torch.Generator | None = None) -> State:
        """Return a start for every puzzle; with a `generator`, random starts are the same for all of them."""
        batch, length = len(inputs), self.prefix_tokens + inputs.shape[1]
        parts = []
        for name in self.cell.states:
            part = getattr(self, f"start_{name}").expand(batch, length, -1)
            if self.start == "random":
                drawn = part.new_empty(1 if generator is not None else batch, length, self.d_model, device="cpu")
                part = cut_normal_(drawn, 1.0, generator).to(part.device).expand_as(part)
            parts.append(part.contiguous())
        return tuple(parts) if len(parts) > 1 else parts[0]

    def draw_noise(self, state: State, generator: torch.Generator | None = None) -> Noise | None:
        """Return what every call of one supervision step adds to each state; see `start_state` for `generator`."""
        if self.noise == 0:
            return None
        parts = state if isinstance(state, tuple) else (state,)
        shapes = [part.shape if generator is None else (1, *part.shape[1:]) for part in parts]
        drawn = [torch.randn(shape, generator=generator, dtype=parts[0].dtype) for shape in shapes]
        return tuple(self.noise * part.to(parts[0].device) for part in drawn)

    def _last_pair(self, f: Map, x: Tensor, state: State, noise: Noise | None) -> Solution:
        """Differentiate one call of each network, from the state before the last fast update of the next cycle."""
        bound = self._bound(x, noise)
        with torch.no_grad():
            before = self.deq(f, state)
            z = self.cell.advance(before.value, num_fast=self.cell.num_fast - 1, **bound)
        pair = partial(self.cell, num_fast=1, **bound)
        # not self.deq(...): the monitor's hook counts the solve above alone
        solution = self.deq.forward(pair, z, solver=STAY)
        # the solve was the one before; the backward adds its cost to these, and follows their policy
        num_evals = before.stats.num_evals + solution.stats.num_evals
        vars(solution.stats).update(vars(before.stats) | {"num_evals": num_evals})
        return solution

    def _bound(self, x: Tensor, noise: Noise | None) -> dict:
        rotary = None if self.cosines is None else (self.cosines, self.sines)
        noise = noise or (None,) * len(self.cell.states)
        return {"x": x, "rotary": rotary, "noise": noise}

    def _set_rotary(self, positions: Positions) -> None:
        cosines = sines = None
        if positions.startswith("rope"):
            heads = {module.num_heads for module in self.cell.modules() if hasattr(module, "num_heads")}
            if not heads:
                raise ValueError(f"positions={positions!r} turn the queries and keys of attention, a mixer has none")
            size, axes = self.d_model // heads.pop(), 1 if positions == "rope" else 2
            if positions == "rope2d" and self.prefix_tokens:
                raise ValueError(
                    f"positions='rope2d' needs prefix_tokens=0, got {self.prefix_tokens}: no row is theirs"
                )
            if size % (2 * axes):
                raise ValueError(
                    f"positions={positions!r} needs heads of a multiple of {2 * axes} channels, not {size}"
                )
            height, width = self.grid
            index = torch.arange(self.prefix_tokens + height * width)
            places = index[:, None] if axes == 1 else torch.stack([index // width, index % width], dim=1)
            cosines, sines = rotary_tables(places, size)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)

    # ------------------------------------------------------------------------------------ training and evaluation

    def forward(
        self, inputs: Tensor, labels: Tensor, carry: Carry | None = None
    ) -> tuple[Outcome, tuple[Solution], Carry | None]:
        """In training, take one supervision step with every row; in evaluation, all of them with every puzzle.

        Args:
            inputs: (B, N) tokens.
            labels: (B, N) tokens of the solution; -100 where a cell is not scored.
            carry: rows that a training step left; None at the beginning.

        Raises:
            ValueError: shapes that do not fit each other, the grid, or the carry.
        """
        cells = self.grid[0] * self.grid[1]
        if inputs.shape != labels.shape or inputs.shape[1:] != (cells,):
            raise ValueError(
                f"inputs and labels must both be (B, {cells}), got {tuple(inputs.shape)} and {tuple(labels.shape)}"
            )
        if not self.training:
            return self._evaluate(inputs, labels)
        rows = refill(carry, inputs, labels, lambda: self.start_state(inputs))
        step = self.step(rows["inputs"], rows["state"], noise=self.draw_noise(rows["state"]))
        steps = rows["steps"] + 1
        exact, right, scored = compare(step.logits, rows["labels"])
        loss = self.supervision.cell_losses(step.logits, rows["labels"])
        if step.halting is not None:
            target = self._value_of_going_on(rows["inputs"], step.state, steps)
            loss = loss + self.supervision.halting_losses(step.halting, exact, target)
        with torch.no_grad():
            finished = self.supervision.finished(step.halting, steps)
        sums = {"finished": finished, "exact": exact & finished, "right": right * finished, "cells": scored * finished}
        carry = {**rows, "state": step.state, "steps": steps, "finished": finished}
        return Outcome(loss, {name: value.sum() for name, value in sums.items()}), (step.solution,), carry

    @torch.no_grad()
    def _value_of_going_on(self, inputs: Tensor, state: State, steps: Tensor) -> Tensor | None:
        if self.supervision.halting != "halt_or_continue":
            return None
        self.deq.eval()  # a step as evaluation has it: no estimator adds a cycle there, see `eval_solver`
        next_ = self.step(inputs, state, noise=self.draw_noise(state)).halting
        self.deq.train()
        assert next_ is not None, "halting that is not fixed has its outputs"
        last = steps >= self.supervision.steps
        return torch.where(last, next_[:, 0], next_.amax(dim=1)).sigmoid()

    def _evaluate(self, inputs: Tensor, labels: Tensor) -> tuple[Outcome, tuple[Solution], None]:
        """Run all supervision steps from every start; `models.reasoner.evaluation` says what it counts."""
        runs, num_evals = [], 0
        for restart in range(self.supervision.restarts):
            # the same draws for every puzzle, so that no answer depends on the batch it is in
            run, step = self._run(inputs, labels, torch.Generator().manual_seed(restart))
            runs.append(run)
            num_evals += step.solution.stats.num_evals
        step.solution.stats.num_evals = num_evals
        loss, sums = score(runs, (labels != IGNORED).sum(dim=1))
        return Outcome(loss, sums), (step.solution,), None

    def _run(self, inputs: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Run, Step]:
        """Return what one start gives, and its last supervision step with the evaluations of f of all of them."""
        state = self.start_state(inputs, generator)
        before = None
        rows: list[tuple[Tensor, ...]] = []
        num_evals = 0
        for _ in range(self.supervision.steps_of_evaluation):
            step = self.step(inputs, state, noise=self.draw_noise(state, generator))
            exact, right, _ = compare(step.logits, labels)
            moved = step.logits.new_full((len(inputs),), torch.inf)
            if before is not None:
                moved = (step.logits - before.logits).norm(dim=2).mean(dim=1)
            rows.append((exact, right, moved, relative_change(step.state, state)))
            num_evals += step.solution.stats.num_evals
            before, state = step, step.state
        step.solution.stats.num_evals = num_evals
        return Run(self.supervision.cell_losses(step.logits, labels), *map(torch.stack, zip(*rows, strict=True))), step

    @property
    def official_parameter_count(self) -> int:
        """The count of the official codes, where the prefix is no parameter and has an optimiser of its own."""
        return sum(p.numel() for p in self.parameters()) - (0 if self.prefix is None else self.prefix.numel())


def relative_change(new: State, old: State) -> Tensor:
    """Return |new - old| / |new| per puzzle (B,), over all parts of the state."""
    pairs = zip(new, old, strict=True) if isinstance(new, tuple) else [(new, old)]
    squares = [((a - b).square().flatten(1).sum(dim=1), a.square().flatten(1).sum(dim=1)) for a, b in pairs]
    change, size = (torch.stack(part).sum(dim=0) for part in zip(*squares, strict=True))
    return (change / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt()


def compare(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return, per row (B,): whether all scored cells are right, how many are, and how many are scored."""
    scored = labels != IGNORED
    right = (logits.argmax(dim=2) == labels) & scored
    return (right | ~scored).all(dim=1), right.sum(dim=1), scored.sum(dim=1)
