"""Run every benchmark of a suite, one process each, and keep the tables.

    python scripts/benchmark_suite.py cpu                        # results/benchmark/cpu/study.yaml, about an hour
    python scripts/benchmark_suite.py gpu --deadline 600         # skip what would begin after ten minutes
    python scripts/benchmark_suite.py gpu --rehearse             # every row in small, on any machine: does it run?

Tables and numbers go to results/benchmark/<suite>/<name>.{md,json}, all comparisons to its summary.md, which
`--summarise` alone renders again; a rehearsal keeps nothing. torchdeq, the peer, is
an optional dependency (see scripts/benchmark.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from scripts import studies  # noqa: E402
from scripts.bench import summary  # noqa: E402

# what a rehearsal changes; CUDA graphs need a GPU, and compiling takes minutes
SMALL = {
    "batch": "2",
    "solver.max_steps": "2",
    "adjoint_solver.max_steps": "2",
    "compile": "false",
    "cuda_graph": "false",
}
SMALL_SIZES = {"deq_transformer": "4", "mdeq_small": "32", "mdeq_large": "16", "mdeq_tiny": "8", "ignn": "5"}


def command(row: dict[str, Any], flags: Sequence[str], *, rehearse: bool, out: Path) -> list[str]:
    """Return the command line of one row."""
    items = dict(item.split("=", 1) for item in row["arguments"].split())
    flags = list(flags)
    if rehearse:
        items |= SMALL | {"size": next(size for model, size in SMALL_SIZES.items() if items["model"].startswith(model))}
        if items["model"] == "deq_transformer":
            items |= {"model": "deq_transformer_small", "classes": "3000"}
        flags = ["--repeats", "1", "--clock", "cpu", "--threads", "1", "--device", "cpu"]
        flags += ["--peer", "torchdeq"] if _has_torchdeq() else []
    else:
        # relative, as benchmark.py runs in ROOT: the command is kept with the numbers
        flags += ["--title", row["title"], "--out", str(out.relative_to(ROOT) / f"{row['name']}.json")]
    flags += ["--growth", str(row["growth"])] if "growth" in row else []
    pairs = [f"{key}={value}" for key, value in items.items()]
    return [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *pairs, *flags]


def summarise(suite: dict[str, Any], out: Path) -> None:
    """Render summary.md from the results in `out`, in the order of the suite."""
    found = [(row, out / f"{row['name']}.json") for row in suite["rows"]]
    results = [
        (row["title"], row.get("paper", ""), json.loads(path.read_text())) for row, path in found if path.exists()
    ]
    if results:
        (out / "summary.md").write_text(summary.render(suite["title"], results))


def main(arguments: Sequence[str]) -> None:
    """Run the rows in order; exit with an error if one fails, after all others have run."""
    suites = [name.removeprefix("benchmark/") for name in studies.names() if name.startswith("benchmark/")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=suites)
    parser.add_argument("--only", default=None, help="names of rows, comma-separated")
    parser.add_argument("--deadline", type=float, default=None, help="begin no row after so many seconds")
    parser.add_argument("--rehearse", action="store_true", help="every row in small, on the CPU")
    parser.add_argument("--summarise", action="store_true", help="only render summary.md from what is there")
    options = parser.parse_args(arguments)
    study = studies.load(f"benchmark/{options.suite}")
    suite = {"title": study["title"], **study["benchmark"]}
    names = [row["name"] for row in suite["rows"]]
    wanted = names if options.only is None else options.only.split(",")
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        sys.exit(f"error: no row {', '.join(unknown)} in {options.suite}; it has {', '.join(names)}")
    out = ROOT / "results" / "benchmark" / options.suite
    started, failed = time.monotonic(), []
    for row in suite["rows"]:
        if row["name"] not in wanted or options.summarise:
            continue
        if options.deadline is not None and time.monotonic() - started > options.deadline:
            print(f"{row['name']}: left out, the deadline has passed", flush=True)
            continue
        line = command(row, suite["flags"].split(), rehearse=options.rehearse, out=out)
        begun = time.monotonic()
        done = subprocess.run(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        state = "failed" if done.returncode else "done"
        print(f"{row['name']}: {state} in {time.monotonic() - begun:.0f} s", flush=True)
        if done.returncode:
            failed.append(row["name"])
            print(done.stderr[-2000:], file=sys.stderr, flush=True)
    if not options.rehearse:
        summarise(suite, out)
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed; see above")


def _has_torchdeq() -> bool:
    from importlib.util import find_spec

    return find_spec("torchdeq") is not None


if __name__ == "__main__":
    main(sys.argv[1:])
