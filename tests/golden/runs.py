"""Golden runs: the first losses and gradient norms of a short run per model family and estimator, on tiny data.

    python -m tests.golden.runs               # write tests/golden/numbers.json again
    python -m tests.golden.runs difference    # print by how much these numbers differ from it, and write nothing

A change that should not alter numbers leaves the file as it is. A change that alters them writes it again, and its
commit says which numbers changed, and why.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from tests.configs.tiny_data import tiny
from tests.plans import plan
from tests.tiny_run import MODEL, rows
from train import job

FILE = Path(__file__).with_name("numbers.json")
STEPS = 3
KEYS = ("loss", "gradient_norm")
SOLVERS = ("solver=broyden", "solver.max_steps=5", "solver.tol=null")
CHAINS = ("data.chains_per_class=4", "data.train_nodes=10", "data.valid_nodes=10", "data.test_nodes=10")
FAMILIES = {
    "mdeq": ["model=mdeq_tiny", "data=digits", *MODEL, "subset=8", "test_subset=4", "data.batch_size=4", *SOLVERS],
    "deq_transformer": [
        *("model=deq_transformer_small", "data=wikitext103", "model.d_model=8", "model.num_heads=2", *SOLVERS),
        *("model.d_inner=16", "model.cutoffs=[4]", "model.mem_len=4", "model.eval_mem_len=4"),
    ],
    "ignn": ["model=ignn", "data=chains", "data.length=5", *CHAINS, *SOLVERS],
    "reasoner": ["model=reasoner_small", "data=sudoku", "solver=rollout", "solver.max_steps=2"],
}
ESTIMATORS = {
    "upg": ["grad=upg", "k=3", "lam=0.5"],
    "npg": ["grad=npg", "k=3", "lam=0.5"],
    "implicit": ["grad=implicit", "adjoint_solver.max_steps=20"],
    "one_step": ["grad=one_step"],
    "shine": ["grad=shine"],
    "bptt": ["grad=bptt", "grad.num_steps=3"],
}
# a rollout keeps no steps for SHINE; an untrained reasoner expands, and implicit differentiation comes out as one step
ABSENT = ("reasoner/shine", "reasoner/implicit")
RUNS = [name for family in FAMILIES for kind in ESTIMATORS if (name := f"{family}/{kind}") not in ABSENT]


def numbers(name: str, folder: Path) -> list[list[float]]:
    """Return [loss, gradient norm] of every step of a golden run; `folder` is empty, and its own."""
    family, estimator = name.split("/")
    leaf = next(item.removeprefix("data=") for item in FAMILIES[family] if item.startswith("data="))
    files, runs = folder / "files", folder / "runs"
    files.mkdir()
    torch.set_num_threads(1)
    short = ["recipe=null", f"steps={STEPS}", "log_every=1", f"eval_every={STEPS}", "device=cpu", f"runs={runs}"]
    quiet = ["optimizer=sgd", "optimizer.lr=0.001", "wandb=disabled", "progress=false"]
    record = job(plan([*FAMILIES[family], *tiny(leaf, files), *ESTIMATORS[estimator], *short, *quiet]))
    return [[row[key] for key in KEYS] for row in rows(runs / record["folder"]) if row["kind"] == "train"]


def difference(found: list[list[float]], kept: list[list[float]]) -> float:
    """Return the largest relative difference of two lists of numbers of one shape."""
    pairs = [pair for a, b in zip(found, kept, strict=True) for pair in zip(a, b, strict=True)]
    return max(abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0 for a, b in pairs)


def main(words: list[str]) -> None:
    """Write the numbers, or print how far they are from those that are kept."""
    if words not in ([], ["difference"]):
        sys.exit(f"error: {' '.join(words)} is not known; write `difference`, or nothing")
    found = {}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = numbers(name, Path(folder))
    if words:
        kept = json.loads(FILE.read_text())
        for name in RUNS:
            print(f"{difference(found[name], kept[name]):.1e}  {name}")
    else:
        lines = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in RUNS]
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
