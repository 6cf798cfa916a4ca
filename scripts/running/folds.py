"""The folds of an experiment, and one record of them all with mean and population std.

The record gives the test metric of every fold by five protocols:

    best_epoch         the best test epoch of each fold: the paper's number, optimistic
    last_epoch         the last epoch
    best_mean_epoch    the one epoch whose mean over the folds is best
    other_folds_epoch  for each fold, the epoch whose mean over the other folds is best: its test graphs choose nothing
    validated_epoch    for each fold, the best epoch on its validation graphs, where there are any
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from data.graphs.folds import NUM_FOLDS
from phantom.engine.artifacts import records
from phantom.engine.errors import ConfigError
from scripts import studies
from scripts.running.costs import kind_of
from scripts.running.process import Run, Work, curve, folder_of, plan, typed_by_groups, variant_of
from scripts.running.seeds import Row

PER_FOLD = ("seed", "config_hash", "commit", "dirty", "cpu_seconds", "peak_memory", "started", "finished")


def work(row: Row, overrides: Sequence[str], folds: Sequence[int] = tuple(range(NUM_FOLDS))) -> Work:
    """Return the runs of a row's folds, data.fold=<i> and seed=<the experiment's + i>.

    The record is written once all ten are there; some of them alone leave their run folders, and their mean is printed.

    Raises:
        ConfigError: the overrides do not compose, or set what differs between the folds; the experiment has no folds.
    """
    for key, instead in (("data.fold", "folds=3 trains fold 3 alone"), ("seed", "use train.py for another one")):
        if any(item.startswith(f"{key}=") for item in overrides):
            raise ConfigError(f"{key} is set by this script; {instead}")
    if any(item.startswith("repeats=") for item in overrides):
        raise ConfigError("repeats counts the seeds of a row; a row of folds has one run per fold")
    items = row.items(overrides)
    made = plan(items)
    if "fold" not in made.config["data"]:
        raise ConfigError(f"{made.label} has no folds; use train.py")
    if "test" not in made.config["eval_splits"] or made.budget.target is not None:
        raise ConfigError(
            f"the protocols of folds compare epochs on test: eval_splits={made.config['eval_splits']} must have it, as "
            f"eval_splits=[valid,test], and target={made.budget.target} must be null"
        )
    kept = studies.results() / f"{made.label}{variant_of(overrides)}.json"
    kind = kind_of(made.choices, made.config["scale"])
    runs = []
    for fold in folds:
        seed = made.config["seed"] + fold
        line = [*items, f"data.fold={fold}", f"seed={seed}"]
        name, where = f"{made.label}, fold {fold}", folder_of(made, line, seed)
        runs.append(Run(name, line, where, kept, label=made.label, kind=kind))
    found = _Folds(runs, folds)
    return Work(runs, found.keep, small=True, begin=found.begin, find=typed_by_groups)


class _Folds:
    """The records of the folds so far."""

    def __init__(self, runs: Sequence[Run], folds: Sequence[int]) -> None:
        self._fold = dict(zip([run.name for run in runs], folds, strict=True))
        self._found: dict[int, dict[str, Any]] = {}

    def begin(self) -> None:
        self._started = time.perf_counter()

    def keep(self, run: Run, record: dict[str, Any]) -> None:
        """Add the record of one fold; after the last one print the protocols, and write the record of all ten."""
        curves = {split: curve(run.folder, split, record["metric"])[1] for split in record["final"]}
        self._found[self._fold[run.name]] = record | {"curves": curves}
        last, best = (record[which]["test"][record["metric"]] for which in ("final", "best"))
        print(f"{run.name}: best {best:.2f}, last {last:.2f}", flush=True)
        if len(self._found) < len(self._fold):
            return
        folds = sorted(self._found)
        summary = summarise([self._found[fold] for fold in folds], folds)
        summary["wall_seconds"] = round(time.perf_counter() - self._started, 1)
        for name, result in summary["protocols"].items():
            print(f"{name:18} {result['mean']:.2f} ± {result['std']:.2f} ({len(folds)} folds)", flush=True)
        if len(folds) == NUM_FOLDS:
            records.write_json(run.kept, summary)


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
        "choices": runs[0].get("choices"),
        "overrides": [item for item in runs[0]["overrides"] if not item.startswith("data.fold=")],
        "folds": [
            {"fold": fold, **{name: run.get(name) for name in PER_FOLD}} for fold, run in zip(folds, runs, strict=True)
        ],
        "protocols": protocols,
        "cpu_seconds": mean_and_range(seconds) if seconds else None,
        **{name: runs[0][name] for name in ("device", "versions")},
        "commit": ", ".join(sorted({run["commit"] or "none" for run in runs})),
        "dirty": any(run["dirty"] for run in runs),
        "started": min(run["started"] for run in runs),
        "finished": max(run["finished"] for run in runs),
    }


def mean_and_range(values: Sequence[float]) -> dict[str, float]:
    """Return mean, smallest, greatest and number of some values."""
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values), "n": len(values)}


def best(values: Sequence[float]) -> int:
    """Return the index of the greatest value, the first of several; sums that differ by rounding alone are equal."""
    top = max(values)
    return next(i for i, value in enumerate(values) if value >= top - 1e-9 * max(1.0, abs(top)))
