"""Forward and backward of a training step as one CUDA graph: one launch for thousands of kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phantom import DEQ
from phantom.engine.measure.timing import StepTimer
from phantom.engine.tasks.base import Score, Tally

WARM_UP_STEPS = 3  # of a kind before it is captured: libraries and compiled code initialise in them


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    score: Score
    gradients: list[tuple[nn.Parameter, Tensor]]
    marks: list[Any]


class StepGraphs:
    """Run forward and backward eagerly until their kind is known, then replay them.

    A kind is the shapes of the batch with the solver and the estimator in use: the short last batch of an epoch and the
    pretraining phase are kinds of their own. The first `WARM_UP_STEPS` steps of a kind are ordinary ones. Then it is
    captured, and replayed from there on, with the same kernels on the same numbers. Gradients and solutions of a replay
    live in the graph's memory, until the next one.

    The step must have fixed shapes and never wait for the host: one process, one micro-batch, a batch that is a tuple
    of tensors, and no carry. A solve to a tolerance runs its whole budget while it is captured, see `Solver`.

    Args:
        step: computes the score of a batch, and the gradients of `parameters` from none.
        deqs: the DEQ layers inside; their settings are part of a kind.
    """

    def __init__(
        self, step: Callable[[Any], Score], *, deqs: Sequence[DEQ], parameters: Sequence[nn.Parameter], timer: StepTimer
    ) -> None:
        self._step, self._deqs, self._parameters, self._timer = step, deqs, parameters, timer
        self._stream = torch.cuda.Stream()
        self._seen: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, _Captured] = {}

    def __call__(self, batch: tuple[Tensor, ...]) -> Score:
        """Return the score of `batch`, with the gradients of the parameters set."""
        kind = (tuple((t.shape, t.dtype) for t in batch), tuple((deq.solver, deq.grad) for deq in self._deqs))
        if kind not in self._captured:
            if self._seen[kind] < WARM_UP_STEPS:
                self._seen[kind] += 1
                return self._eager(batch)
            self._captured[kind] = self._capture(batch)
        captured = self._captured[kind]
        for static, given in zip(captured.inputs, batch, strict=True):
            static.copy_(given)
        captured.graph.replay()
        for solution in captured.score.solutions:  # the numbers are new ones, which nobody has looked at
            for stats in (solution.stats, solution.stats.adjoint):
                if stats is not None:
                    stats.acted = False
        for parameter, gradient in captured.gradients:
            parameter.grad = gradient
        self._timer.add_marks(captured.marks)
        loss_sum, count, sums = vars(captured.score.tally).values()
        tally = Tally(loss_sum.clone(), count, {name: value.clone() for name, value in sums.items()})
        return captured.score._replace(tally=tally)

    def _eager(self, batch: tuple[Tensor, ...]) -> Score:
        # on the stream of the capture, so that what libraries and autograd keep per stream is there already
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            score = self._step(batch)
        current.wait_stream(self._stream)
        return score

    def _capture(self, batch: tuple[Tensor, ...]) -> _Captured:
        graph, inputs = torch.cuda.CUDAGraph(), tuple(t.clone() for t in batch)
        before = self._timer.take_marks()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            score = self._step(inputs)
        marks = self._timer.take_marks()
        self._timer.add_marks(before)
        gradients = [(p, p.grad) for p in self._parameters if p.grad is not None]
        return _Captured(graph, inputs, score, gradients, marks)
