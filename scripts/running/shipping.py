"""From a finished run to weights that ship, which give the run's own number again before they are written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from phantom.engine.artifacts import records, shipped
from phantom.engine.config.configs import Configs
from phantom.engine.errors import ConfigError
from phantom.engine.rebuild import evaluate_rebuilt, rebuild_run
from scripts.reporting import cards

CLOSE = 1e-6  # relative: another number of threads rounds otherwise


def pack(run: Path, target: Path, *, which: str, configs: Configs, trust: str | None = None) -> dict[str, Any]:
    """Write the weights of a run's checkpoint to the folder `target`, with their card; return their record.

    Args:
        which: the checkpoint, `last` or `best`.
        trust: packages of the user's own, separated by commas; the saved config may build what they define, too.

    Raises:
        ConfigError: the run is not finished, its number does not come out again, or there are weights in `target`.
        CheckpointError, DataError: the checkpoint or the data of the run cannot be read.
    """
    if (target / "record.json").exists():
        raise ConfigError(f"name={target.name} is taken: choose another one, or remove {target}")
    rebuilt = rebuild_run(run, which=which, overrides=(), configs=configs, trust=trust)
    found = records.read(run)
    if found is None:
        raise ConfigError(f"run={run} has no whole record.json: the run is not finished; start it again")
    record, _ = found
    measured = evaluate_rebuilt(rebuilt, None)
    split, metric = measured["split"], record["metric"]
    own = record[cards.CHOSEN[which]][split][metric]
    if own is None:
        raise ConfigError(f"run={run} checkpoint={which}: {metric} on {split} was not finite, and is no number to ship")
    if measured[metric] is None or not math.isclose(measured[metric], own, rel_tol=CLOSE):
        raise ConfigError(
            f"run={run} checkpoint={which}: {metric} on {split} is {measured[metric]} here and {own} in the record, "
            f"which was trained on {record['device']}: pack it on a machine of that kind, with the code of its commit"
        )
    whole = shipped.write(
        target,
        rebuilt.model.state_dict(),
        config=rebuilt.plan.config,
        record=record,
        about={"checkpoint": which, "step": measured["step"], "split": split, "inputs": rebuilt.source.spec.inputs},
    )
    cards.write(target, whole)
    return whole
