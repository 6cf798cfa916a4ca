"""Time training steps: by phase, against their floor, against each other, and against torchdeq.

    python scripts/benchmark.py model=mdeq_tiny batch=32 grad=upg,implicit k=5 --peer torchdeq
    python scripts/benchmark.py model=mdeq_tiny batch=32 grad=upg,implicit k=1,5,9 solver.max_steps=22 \\
        adjoint_solver.max_steps=24 precision=fp32,bf16 compile=false,true \\
        --clock cpu --threads 1 --repeats 9 --out results/benchmark/mdeq_tiny.json

    python scripts/benchmark.py model=deq_transformer_small batch=8 size=64 classes=5000 grad=upg,implicit
    python scripts/benchmark.py model=ignn batch=128 size=40 classes=2 solver=fixed_point grad=upg,npg

Overrides are those of train.py (without data), and `batch`, `size` (pixels of a side, tokens of a segment, nodes of a
graph), `classes` (or words of the vocabulary) and `hoist` (false: a Transformer cell that computes nothing once per
solve); commas sweep. Batches are random, the memory of a language model is full. Budgets are fixed (`solver.tol=null`)
unless given. All variants run in turn, round after round, in one process; ratios are paired by round. `--clock cpu
--threads 1` suits a machine that others use, too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from phantom.engine.artifacts.records import environment  # noqa: E402
from phantom.engine.errors import ConfigError  # noqa: E402
from phantom.engine.machine.allocator import keep_freed_memory  # noqa: E402
from phantom.engine.measure.timing import StepTimer  # noqa: E402
from scripts.bench import measure, report, variants  # noqa: E402
from scripts.bench.growth import measure_growth  # noqa: E402
from scripts.bench.peer_torchdeq import PeerError  # noqa: E402


def main(arguments: list[str]) -> dict[str, Any]:
    """Run the benchmark, print its tables, and write them where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value, as for train.py")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="on a GPU, wall reads events")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (default: torch's own)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument("--peer", choices=("torchdeq",), default=None, help="compare with this library")
    parser.add_argument("--growth", type=int, default=None, help="then count what so many steps leave in memory")
    parser.add_argument("--title", default="Training step")
    parser.add_argument("--out", type=Path, default=None, help="a .json; the table is written beside it as .md")
    options = parser.parse_intermixed_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cpu":
        keep_freed_memory()  # as train.py does
    timer = StepTimer(device, clock=options.clock)
    try:
        settings = variants.settings(options.overrides)
        rows = measure.build_rows(settings, device, timer, peer=options.peer is not None)
    except (ConfigError, PeerError) as error:
        sys.exit(f"error: {error}")
    measure.run(
        rows, timer, repeats=options.repeats, warmup=options.warmup, say=lambda text: print(text, file=sys.stderr)
    )
    if options.growth is not None:
        measure_growth(rows, options.growth, device)
    result = {
        "about": {
            "title": options.title,
            "command": "python scripts/benchmark.py " + shlex.join(arguments),
            "machine": machine(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **environment(device),
            "clock": "cpu time of the process" if options.clock == "cpu" else f"wall ({device.type})",
            "repeats": options.repeats,
            "date": datetime.date.today().isoformat(),
        },
        "rows": [report.row_numbers(row) for row in rows],
        "ratios": report.ratios(rows),
    }
    text = report.render(result)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)
    return result


def machine(device: torch.device) -> str:
    """Return the name of the device that does the work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main(sys.argv[1:])
