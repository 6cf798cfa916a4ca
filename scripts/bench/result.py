"""One benchmark: its variants are built, timed in turn, and compared."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from phantom.engine.artifacts import records
from phantom.engine.artifacts.provenance import environment
from phantom.engine.machine.allocator import keep_freed_memory
from phantom.engine.measure.timing import StepTimer
from scripts.bench import measure, pipeline, ratios, small, variants
from scripts.bench.growth import measure_growth


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure.

    Args:
        clock: wall (on a GPU, its events), or cpu: the CPU time of this process.
        repeats: timed rounds.
        warmup: rounds before them.
        peer: whether to time torchdeq, too.
        growth: then count what this number of steps leaves in memory; None for not.
    """

    clock: Literal["wall", "cpu"]
    device: str
    repeats: int
    warmup: int
    peer: bool
    growth: int | None
    title: str


def take(overrides: Sequence[str], options: Options, *, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the result of a benchmark: `about`, `rows` and `ratios`.

    Args:
        overrides: those of train.py and of the benchmark, see scripts/bench/variants.py.
        command: what was typed; it is kept with the numbers.

    Raises:
        ConfigError: an unknown key or an impossible value.
        PeerError: torchdeq is not installed, or has nothing that corresponds.
    """
    device = torch.device(options.device)
    if device.type == "cpu":
        keep_freed_memory()  # as train.py does
    timer = StepTimer(device, clock=options.clock)
    rows = measure.build_rows(variants.settings(overrides), device, timer, peer=options.peer)
    measure.run(rows, timer, repeats=options.repeats, warmup=options.warmup, say=say)
    if options.growth is not None:
        measure_growth(rows, options.growth, device)
    return {
        "about": _about(options, device, command),
        "rows": [ratios.row_numbers(row) for row in rows],
        "ratios": ratios.ratios(rows),
    }


def take_small(options: Options, *, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the result of the benchmark of small states, which has no model: see scripts/bench/small.py."""
    taken = small.take(clock=options.clock, repeats=options.repeats, warmup=options.warmup, peer=options.peer, say=say)
    return {"about": _about(options, torch.device("cpu"), command), **taken}


def take_pipeline(
    overrides: Sequence[str], options: Options, *, command: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return the result of the benchmark of input pipelines, which has no model: see scripts/bench/pipeline.py.

    Raises:
        ConfigError: an unknown key, data that are not there, or data that are no pictures.
    """
    keep_freed_memory()  # as train.py does
    taken = pipeline.take(overrides, clock=options.clock, repeats=options.repeats, warmup=options.warmup, say=say)
    return {"about": _about(options, torch.device("cpu"), command), **taken}


def _about(options: Options, device: torch.device, command: str) -> dict[str, Any]:
    return {
        "title": options.title,
        "command": command,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **environment(device),
        "clock": "cpu time of the process" if options.clock == "cpu" else f"wall ({device.type})",
        "repeats": options.repeats,
        "date": datetime.date.today().isoformat(),
    }


def write(result: dict[str, Any], path: Path) -> None:
    """Write the numbers of a benchmark."""
    records.write_json(path, result, indent=1)


def machine(device: torch.device) -> str:
    """Return the name of the device that does the work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
