"""The rows of a table or a grid, each with its seeds: a record per run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from phantom.engine.artifacts import records
from phantom.engine.errors import ConfigError
from scripts import studies
from scripts.running import measuring
from scripts.running.costs import kind_of
from scripts.running.process import Run, Work, folder_of, monitored, plan, typed_by_groups, variant_of


class Row(NamedTuple):
    """A row: an experiment, what makes it this point of a grid, and what its scale changes besides.

    Args:
        own: in the name of its record.
        scaled: not in the name, which has the scale.
    """

    experiment: str
    own: Sequence[str] = ()
    scaled: Sequence[str] = ()

    def items(self, overrides: Sequence[str]) -> list[str]:
        """Return its command line under `overrides`; of several values of a key the last one counts."""
        every = [f"experiment={self.experiment}", *self.scaled, *self.own, *overrides]
        return list({item.split("=")[0]: item for item in every}.values())


def work(rows: Sequence[Row], overrides: Sequence[str], *, small: bool = False, traces: bool = False) -> Work:
    """Return the runs of some rows, seeds 0 to repeats - 1: the first seed of every row first.

    Whoever has to stop then has something of every row.

    `repeats` is read from the config here; train.py has no use for it.

    Args:
        small: one thread a run is best.
        traces: keep what the monitor measured in the record, as `monitor`.

    Raises:
        ConfigError: the overrides do not compose, or set the seed.
    """
    if any(item.startswith("seed=") for item in overrides):
        raise ConfigError("seed is set by this script, from 0 to repeats - 1; use train.py for another one")
    runs: list[tuple[int, Run]] = []
    for row in rows:
        made = plan(row.items(overrides))
        items = [item for item in row.items(overrides) if not item.startswith("repeats=")]
        typed = [item for item in overrides if not item.startswith("repeats=")]
        kept = studies.results() / f"{made.label}{variant_of([*row.own, *typed])}"
        point = f" ({', '.join(row.own)})" if row.own else ""
        for seed in range(made.config["repeats"]):
            run = Run(
                f"{made.label}{point}, seed {seed}",
                [*items, f"seed={seed}"],
                folder_of(made, items, seed),
                kept / f"seed{seed}.json",
                label=made.label,
                kind=kind_of(made.choices, made.config["scale"]),
            )
            runs.append((seed, run))
    by_seed = [run for _, run in sorted(runs, key=lambda pair: pair[0])]
    return Work(by_seed, _keep_with_traces if traces else _keep, small=small, find=typed_by_groups)


def _keep(run: Run, record: dict[str, Any]) -> None:
    records.write_json(run.kept, record)


def _keep_with_traces(run: Run, record: dict[str, Any]) -> None:
    measuring.write({**record, "monitor": monitored(run.folder)}, run.kept)
