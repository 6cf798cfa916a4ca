"""The benchmarks of a suite, one process each."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from scripts import studies

# what a rehearsal changes; CUDA graphs need a GPU, and compiling takes minutes
SMALL = {
    "batch": "2",
    "solver.max_steps": "2",
    "adjoint_solver.max_steps": "2",
    "compile": "false",
    "cuda_graph": "false",
}
SMALL_SIZES = {"deq_transformer": "4", "mdeq_small": "32", "mdeq_large": "16", "mdeq_tiny": "8", "ignn": "5"}


def run(study: dict[str, Any], wanted: Sequence[str], *, deadline: float | None, rehearse: bool) -> list[str]:
    """Run the wanted rows in order and return the names of those that failed.

    Args:
        deadline: seconds after which no further row begins.
        rehearse: run every row in small on the CPU, and keep nothing.
    """
    started, failed = time.monotonic(), []
    for row in [row for row in study["benchmark"]["rows"] if row["name"] in wanted]:
        if deadline is not None and time.monotonic() - started > deadline:
            print(f"{row['name']}: left out, the deadline has passed", flush=True)
            continue
        # as a module: the child needs nothing installed to import this repository
        line = [sys.executable, "-m", "scripts.benchmark", *items(study, row, rehearse=rehearse)]
        begun = time.monotonic()
        done = subprocess.run(line, cwd=studies.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        state = "failed" if done.returncode else "done"
        print(f"{row['name']}: {state} in {time.monotonic() - begun:.0f} s", flush=True)
        if done.returncode:
            failed.append(row["name"])
            print(done.stderr[-2000:], file=sys.stderr, flush=True)
    return failed


def items(study: dict[str, Any], row: dict[str, Any], *, rehearse: bool) -> list[str]:
    """Return what follows `python scripts/benchmark.py` for one row."""
    words = [word for word in shlex.split(row["arguments"]) if "=" not in word]
    found = _pairs(row["arguments"])
    if rehearse and words:
        found |= {"repeats": "1", "warmup": "0", "clock": "cpu", "threads": "1", "device": "cpu"}
        found |= {"peer": "torchdeq"} if find_spec("torchdeq") else {}
    elif rehearse:
        found |= SMALL | {"size": next(size for model, size in SMALL_SIZES.items() if found["model"].startswith(model))}
        if found["model"] == "deq_transformer":
            found |= {"model": "deq_transformer_small", "classes": "3000"}
        found |= {"repeats": "1", "clock": "cpu", "threads": "1", "device": "cpu"}
        if "speed" in found and not find_spec("triton"):
            found["speed"] = "off,padded"  # torch brings Triton with CUDA alone
        found |= {"growth": "2"} if "growth" in row else {}
        found |= {"peer": "torchdeq"} if find_spec("torchdeq") else {}
    else:
        # relative, as the process runs in the repository: the command is kept with the numbers
        out = (study["folder"] / f"{row['name']}.json").relative_to(studies.ROOT)
        found |= _pairs(study["benchmark"]["settings"]) | {"title": row["title"], "out": out.as_posix()}
        found |= {"growth": str(row["growth"])} if "growth" in row else {}
    return [*words, *(f"{key}={value}" for key, value in found.items())]


def _pairs(text: str) -> dict[str, str]:
    return dict(item.split("=", 1) for item in shlex.split(text) if "=" in item)
