"""Time training steps: by phase, against their floor, against each other, and against torchdeq.

    python scripts/benchmark.py model=mdeq_tiny batch=32 grad=upg,implicit k=5 peer=torchdeq
    python scripts/benchmark.py model=mdeq_tiny batch=32 grad=upg,implicit k=1,5,9 solver.max_steps=22 \\
        adjoint_solver.max_steps=24 precision=fp32,bf16 compile=false,true \\
        clock=cpu threads=1 repeats=9 out=results/benchmark/mdeq_tiny.json
    python scripts/benchmark.py model=deq_transformer_small batch=8 size=64 classes=5000 grad=upg,implicit
    python scripts/benchmark.py model=ignn batch=128 size=40 classes=2 solver=fixed_point grad=upg,npg

Overrides are those of train.py (without data), and `batch`, `size` (pixels of a side, tokens of a segment, nodes of a
graph), `classes` (or words of the vocabulary) and `hoist` (false: a Transformer cell that computes nothing once per
solve); commas sweep. Batches are random, the memory of a language model is full. Budgets are fixed (`solver.tol=null`)
unless given. `compile` and `speed` concern the cell alone here; solvers have `solver.compile` and `solver.kernels`. All
variants run in turn, round after round, in one process; ratios are paired by round. `clock=cpu
threads=1` suits a machine that others use, too.

    clock=wall|cpu   on a GPU, wall reads events
    threads=<n>      threads of torch (default: torch's own)
    device=cpu|cuda  (default: cuda where there is one)
    repeats=9        timed rounds
    warmup=1         rounds before them
    peer=torchdeq    compare with this library, an optional dependency
    growth=<n>       then count what <n> steps leave in memory
    title=<text>     of the page
    out=<file.json>  keep the numbers, and their page beside them as .md

Or what a solve of a state of 8 x 64 costs per evaluation of f, without any model, against a bare loop and torchdeq:

    python scripts/benchmark.py small device=cpu clock=cpu threads=1 repeats=15 peer=torchdeq

Or how many pictures a second one core reads, decodes, cuts and normalises, in training and in evaluation:

    python scripts/benchmark.py pipeline data=imagenet data.root=/data/imagenet device=cpu clock=cpu threads=1

Or every benchmark of a suite, one process each, into results/benchmark/<suite>/:

    python scripts/benchmark.py suite cpu                 # results/benchmark/cpu/study.yaml, about an hour
    python scripts/benchmark.py suite gpu deadline=600    # skip what would begin after ten minutes
    python scripts/benchmark.py suite gpu rehearse        # every row in small, on any machine: does it run?

    rows=<name,...>  these rows alone
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

try:
    import torch

    from phantom.engine.errors import UserError
    from phantom.engine.machine import streams
    from scripts import arguments, studies
    from scripts.bench import result as benchmark
    from scripts.bench.peer_torchdeq import PeerError
    from scripts.reporting import benchmarks, pages
    from scripts.running import suite
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: `bash scripts/setup.sh` and .venv/bin/python, or pip install -e . -r requirements.txt")

OWN = ("clock", "threads", "device", "repeats", "warmup", "peer", "growth", "title", "out")
WORDS = ("small", "pipeline")


def main(items: Sequence[str]) -> dict[str, Any] | None:
    """Time one benchmark and return its result, or run a suite."""
    streams.prepare()
    if items and items[0] == "suite":
        return run_suite(items[1:])
    own, words, overrides = arguments.split(items, doc=__doc__, own=OWN, words=WORDS)
    options, threads, out = read(own), arguments.count(own, "threads", None), arguments.output(own)
    command = "python scripts/benchmark.py " + shlex.join(items)
    if len(words) > 1:
        arguments.fail(f"{' and '.join(words)} are two benchmarks: name one")
    if words == ["pipeline"] and options.peer:
        arguments.fail("pipeline times the loading of data, which torchdeq does not have: leave peer= out")
    if words and (options.device != "cpu" or options.growth is not None or (overrides and words == ["small"])):
        arguments.fail(
            f"{words[0]} takes clock, threads, device=cpu, repeats, warmup, title and out alone, small takes peer, "
            "too, and pipeline the data; see --help"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        if words == ["pipeline"]:
            result = benchmark.take_pipeline(overrides, options, command=command, say=_say)
        elif words:
            result = benchmark.take_small(options, command=command, say=_say)
        else:
            result = benchmark.take(overrides, options, command=command, say=_say)
    except (UserError, PeerError) as error:
        arguments.fail(str(error))
    print(benchmarks.render(result))
    if out is not None:
        benchmark.write(result, out)
        pages.write_benchmark(out)
    return result


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def read(own: dict[str, str]) -> benchmark.Options:
    """Return how to measure."""
    device = arguments.choice(own, "device", ("cpu", "cuda"), "cuda" if torch.cuda.is_available() else "cpu")
    clock = arguments.choice(own, "clock", ("wall", "cpu"), "wall")
    if device == "cuda" and not torch.cuda.is_available():
        arguments.fail("device=cuda needs a GPU that torch can use; choose device=cpu")
    if device == "cuda" and clock == "cpu":
        arguments.fail("clock=cpu does not see the work of a GPU; choose clock=wall, which reads its events")
    return benchmark.Options(
        clock=clock,
        device=device,
        repeats=arguments.count(own, "repeats", 9),
        warmup=arguments.count(own, "warmup", 1, least=0),
        peer=arguments.choice(own, "peer", ("torchdeq",), None) is not None,
        growth=arguments.count(own, "growth", None),
        title=own.get("title", "Training step"),
    )


def run_suite(items: Sequence[str]) -> None:
    """Run the rows of a suite in order; exit with an error if one fails, after all others have run."""
    known = [name for name in studies.names() if "benchmark" in studies.load(name)]
    suites = [name.removeprefix("benchmark/") for name in known]
    own, words, overrides = arguments.split(items, doc=__doc__, own=("rows", "deadline"), words=[*suites, "rehearse"])
    named = [word for word in words if word in suites]
    if overrides:
        arguments.fail(f"{overrides[0]} is not for a suite: its rows name the variants; leave it out")
    if len(named) != 1:
        arguments.fail(f"name one suite, {' or '.join(suites)}")
    study = studies.load(known[suites.index(named[0])])
    wanted = arguments.some(own, "rows", [row["name"] for row in study["benchmark"]["rows"]], named[0])
    rehearse, deadline = "rehearse" in words, arguments.count(own, "deadline", None)
    failed = suite.run(study, wanted, deadline=deadline, rehearse=rehearse)
    if not rehearse:
        pages.write(study)
    if failed:
        arguments.fail(f"{', '.join(failed)} failed; see above")


if __name__ == "__main__":
    main(sys.argv[1:])
