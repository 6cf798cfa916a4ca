"""Train all ten folds of an experiment, some at a time, and write one record with their mean and population std.

    python scripts/folds.py experiment=table4/cox2_implicit                      # as many folds at a time as cores
    python scripts/folds.py experiment=table4/proteins_upg_k5_lam0.5 jobs=4 data.root=/data/PROTEINS
    python scripts/folds.py experiment=table4/cox2_implicit data.folds=stratified data.eval_adjacency=same \
        data.validation=0.1 eval_splits=[valid,test]                             # an honest protocol

jobs=<n> and only=<fold,fold,...> are this script's own; everything else goes to train.py, once per fold, with
data.fold=<i> and seed=<seed + i>. Finished folds are not trained again, interrupted ones resume. Once all ten are
there, one record of them is written to results/<experiment>.json; with further overrides, it carries them in its name.
It gives the test metric of every fold by five protocols:

    best_epoch         the best test epoch of each fold: the paper's number, optimistic
    last_epoch         the last epoch
    best_mean_epoch    the one epoch whose mean over the folds is best
    other_folds_epoch  for each fold, the epoch whose mean over the other folds is best: its test graphs choose nothing
    validated_epoch    for each fold, the best epoch on its validation graphs, where there are any
"""

from __future__ import annotations

import concurrent.futures
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data.graphs.folds import NUM_FOLDS  # noqa: E402
from phantom.engine.artifacts import records  # noqa: E402
from scripts import training  # noqa: E402

PER_FOLD = ("seed", "config_hash", "commit", "dirty", "cpu_seconds", "peak_memory", "started", "finished")


def main(arguments: Sequence[str]) -> None:
    """Run the folds of one experiment: overrides of train.py, and jobs=, only=."""
    own = dict(item.split("=", 1) for item in arguments if item.split("=")[0] in ("jobs", "only"))
    job = [item for item in arguments if item.split("=")[0] not in ("jobs", "only")]
    if any(item.startswith("data.fold=") for item in job):
        sys.exit("error: data.fold is set by this script; only=3 trains fold 3 alone")
    config, label, folder = training.plan(job)
    if "fold" not in config["data"]:
        sys.exit(f"error: {label} has no folds; use train.py")
    folds = [int(fold) for fold in own["only"].split(",")] if "only" in own else list(range(NUM_FOLDS))
    if not set(folds) <= set(range(NUM_FOLDS)):
        sys.exit(f"error: only={own['only']} must list folds from 0 to {NUM_FOLDS - 1}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = max(1, min(int(own.get("jobs", cores)), len(folds)))
    seed = config["seed"]
    overrides = [item for item in job if not item.startswith("seed=")]
    extra = folder.parent.name
    target = ROOT / "results" / (f"{label}.json" if extra == "default" else f"{label}@{extra}.json")

    def train(fold: int) -> dict[str, Any]:
        items = [*overrides, f"data.fold={fold}", f"seed={seed + fold}"]
        folder = ROOT / records.run_folder(Path(config["runs"]), label, items, seed + fold)
        record = training.train(items, folder)
        best = record["best"]["test"][record["metric"]]
        print(f"fold {fold}: best {best:.2f}, last {record['final']['test'][record['metric']]:.2f}", flush=True)
        splits = {split: training.curve(folder, split, record["metric"])[1] for split in record["final"]}
        return record | {"curves": splits}

    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(train, fold) for fold in folds]
        for run in concurrent.futures.as_completed(runs):
            if run.exception() is not None:
                pool.shutdown(cancel_futures=True)
                sys.exit(f"error: {run.exception()}")
    finished = [run.result() for run in runs]
    summary = summarise(finished, folds)
    summary["wall_seconds"] = round(time.perf_counter() - started, 1)
    for name, result in summary["protocols"].items():
        print(f"{name:18} {result['mean']:.2f} ± {result['std']:.2f} ({len(folds)} folds)")
    if len(folds) == NUM_FOLDS:
        records.write_json(target, summary)


def summarise(runs: Sequence[dict[str, Any]], folds: Sequence[int]) -> dict[str, Any]:
    """Return the record of all folds: what was run, and mean, population std and values by every protocol.

    Raises:
        ValueError: the folds were evaluated a different number of times, so that epochs cannot be compared.
    """
    tests = [run["curves"]["test"] for run in runs]
    if len({len(test) for test in tests}) > 1:
        raise ValueError(f"folds have {[len(test) for test in tests]} evaluations: train them with the same budget")
    means = [statistics.fmean(values) for values in zip(*tests, strict=True)]
    chosen = {
        "best_epoch": [best(test) for test in tests],
        "last_epoch": [len(means) - 1] * len(tests),
        "best_mean_epoch": [best(means)] * len(tests),
    }
    if len(tests) > 1:
        chosen["other_folds_epoch"] = [
            best([mean * len(tests) - own for mean, own in zip(means, test, strict=True)]) for test in tests
        ]
    if all("valid" in run["curves"] for run in runs):
        chosen["validated_epoch"] = [best(run["curves"]["valid"]) for run in runs]
    protocols = {}
    for name, epochs in chosen.items():
        values = [test[epoch] for test, epoch in zip(tests, epochs, strict=True)]
        protocols[name] = {
            "mean": statistics.fmean(values),
            "std": statistics.pstdev(values),
            "values": values,
            "evaluations": epochs,
        }
    shared = ("label", "experiment", "scale", "kind", "metric", "num_parameters", "parameter_groups", "steps")
    seconds = [run["cpu_seconds"] for run in runs if "cpu_seconds" in run]
    return {
        **{name: runs[0][name] for name in shared},
        "overrides": [item for item in runs[0]["overrides"] if not item.startswith("data.fold=")],
        "folds": [
            {"fold": fold, **{name: run.get(name) for name in PER_FOLD}} for fold, run in zip(folds, runs, strict=True)
        ],
        "protocols": protocols,
        "cpu_seconds": spread(seconds) if seconds else None,
        **{name: runs[0][name] for name in ("device", "versions")},
        "commit": ", ".join(sorted({run["commit"] or "none" for run in runs})),
        "dirty": any(run["dirty"] for run in runs),
        "started": min(run["started"] for run in runs),
        "finished": max(run["finished"] for run in runs),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean, smallest, greatest and number of some values."""
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values), "n": len(values)}


def best(values: Sequence[float]) -> int:
    """Return the index of the greatest value, the first of several; sums that differ by rounding alone are equal."""
    top = max(values)
    return next(i for i, value in enumerate(values) if value >= top - 1e-9 * max(1.0, abs(top)))


if __name__ == "__main__":
    main(sys.argv[1:])
