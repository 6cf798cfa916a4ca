"""Run variants side by side: trace each once, then time them interleaved, with their floors and peers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from phantom.deq import deqs_of
from phantom.engine.measure.timing import StepTimer
from scripts.bench import variants as v
from scripts.bench.instruments import Tracer
from scripts.bench.peer_torchdeq import TorchDEQ, has_counterpart
from scripts.bench.standins import Floor, Traced, Work, replace_deq

PHASES = ("solve", "attach", "backward", "optimizer", "rest")
# what a step spends outside of its other phases
REST = {"step": "rest"}


@dataclass
class Row:
    """One variant under measurement, and the rows it is compared with.

    Args:
        role: `ours`, `floor` or `torchdeq`.
        times: seconds by phase, one entry per timed round.
    """

    setting: v.Setting
    variant: v.Variant
    role: str
    facts: dict[str, Any] = field(default_factory=dict)
    times: list[dict[str, float]] = field(default_factory=list)
    floor: Row | None = None
    peer: Row | None = None

    def total(self, i: int) -> float:
        return sum(self.times[i].values())


def build_rows(settings: Sequence[v.Setting], device: torch.device, timer: StepTimer, *, peer: bool) -> list[Row]:
    """Return a row per setting, each followed by its floor and, where torchdeq has a counterpart, by its peer."""
    rows: list[Row] = []
    peers: dict[str, Row] = {}
    for setting in settings:
        row = Row(setting, v.make(setting, device), "ours")
        rows.append(row)
        begun = time.perf_counter()
        score = row.variant.step(StepTimer(device))  # compiles, too
        first = time.perf_counter() - begun
        work = v.work_of(row.variant, score)
        row.facts = facts_of(row.variant, score, work)
        compiled = setting.plan.config["compile"]
        row.facts |= {"compile_seconds": first} | eager_work(setting, device) if compiled else trace(row.variant)
        for deq in deqs_of(row.variant.model):
            deq.clock = timer.phase
        model = replace_deq(row.variant.model, lambda deq, work=work: Floor(work, timer.phase, deq.gradient_precision))
        floor = replace(row.variant, label=f"floor of {setting.label}", model=model, take=None)
        if setting.plan.config["cuda_graph"]:
            row.variant.replay(timer)
            floor.replay(timer)
        row.floor = Row(setting, floor, "floor")
        rows.append(row.floor)
        if peer and has_counterpart(row.variant.grad):
            other = v.for_peer(setting)
            key = repr((other.plan.config, other.batch, other.size, other.classes, other.hoist))
            if key not in peers:
                peers[key] = _peer_row(other, device, timer)
                rows.append(peers[key])
            row.peer = peers[key]
    return rows


def _peer_row(setting: v.Setting, device: torch.device, timer: StepTimer) -> Row:
    variant = v.make(setting, device)
    hidden = ("precision=", "gradient_precision=", "compile=", "speed=", "model.channels")
    names = [word for word in setting.label.split() if not word.startswith(hidden)]
    variant.label = " ".join(["torchdeq", *names])
    variant.model = replace_deq(variant.model, TorchDEQ)
    row = Row(setting, variant, "torchdeq", facts=trace(variant))
    for module in variant.model.modules():
        if isinstance(module, TorchDEQ):
            module.clock = timer.phase
    return row


def facts_of(variant: v.Variant, score: Any, work: Sequence[Work]) -> dict[str, Any]:
    """Return the counts of a finished step and the sizes of what stays allocated between steps."""
    state = [t for s in variant.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    parameters = list(variant.model.parameters())
    return {
        "evals": sum(w.evals for w in work),
        "graph_evals": sum(w.graph_evals for w in work),
        "vjps": sum(w.vjps for w in work),
        "items": score.tally.count,
        "residual": statistics.median(torch.cat([s.stats.residual for s in score.solutions]).tolist()),
        "bytes": {
            "parameters": _bytes(parameters),
            "gradients": _bytes(parameters),
            "optimizer": _bytes(state),
        },
    }


def trace(variant: v.Variant) -> dict[str, Any]:
    """Return what one step does: operators, host synchronisations and evaluations of f by phase, peak memory by part,
    FLOPs by number format, and bytes that are read and written.

    Solver history is what the solve phase holds outside of f at its peak, temporaries included; activations are what
    the attach phase holds.
    """
    tracer, _ = traced(variant.model, variant.step)
    inside = {"solve": ("solve", "solve_f"), "rest": ("step",)}
    return {
        "ops": {phase: sum(tracer.ops[p] for p in inside.get(phase, (phase,))) for phase in PHASES},
        # those inside f are the cell's own
        "syncs": {phase: sum(tracer.syncs[p] for p in inside.get(phase, (phase,))) for phase in PHASES},
        "traced_evals": sum(tracer.evals.values()),
        "peak_bytes": {
            "solver": tracer.peak["solve"],
            "solve_f": tracer.peak["solve_f"],
            "activations": tracer.peak["attach"],
            "backward": tracer.peak["backward"],
            "total": tracer.peak_total,
        },
        **_work(tracer, variant),
    }


def eager_work(setting: v.Setting, device: torch.device) -> dict[str, Any]:
    """Return FLOPs and bytes of a step of the setting that is not compiled: a tracer sees no compiled operator."""
    variant = v.make(v.eager(setting), device)
    return _work(traced(variant.model, variant.step)[0], variant)


def _work(tracer: Tracer, variant: v.Variant) -> dict[str, Any]:
    return {"flops": dict(tracer.flops), "moved_bytes": tracer.moved, "precision": variant.plan.config["precision"]}


def traced(model: nn.Module, step: Callable[[Tracer], Any]) -> tuple[Tracer, Any]:
    """Return (tracer, result) of a step, with what solves in the model marked for the tracer."""
    tracer = Tracer()
    holders = [m for m in model.modules() for child in m.children() if hasattr(child, "clock")]
    names = [(m, n) for m in set(holders) for n, child in m.named_children() if hasattr(child, "clock")]
    kept = []
    for module, name in names:
        inner = getattr(module, name)
        kept.append((module, name, inner, inner.clock))
        inner.clock = tracer.phase
        setattr(module, name, Traced(inner, tracer))
    try:
        with tracer:
            found = step(tracer)
    finally:
        for module, name, inner, clock in kept:
            inner.clock = clock
            setattr(module, name, inner)
    return tracer, found


def run(rows: Sequence[Row], timer: StepTimer, *, repeats: int, warmup: int, say: Callable[[str], None]) -> None:
    """Time all rows in turn, `repeats` rounds after `warmup`; row times of one round belong together."""
    cuda = rows[0].variant.device.type == "cuda"
    for i in range(-warmup, repeats):
        for row in rows:
            timer.take()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            row.variant.step(timer)
            seconds = {REST.get(name, name): value for name, value in timer.take().items()}
            if i >= 0:
                row.times.append(seconds)
            if cuda:
                row.facts["max_memory_allocated"] = torch.cuda.max_memory_allocated()
        say(f"round {i + 1} of {repeats}" if i >= 0 else "warm-up")


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
