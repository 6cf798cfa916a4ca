"""Which run this is: what it trains, as its config says, the folder that follows from it, and the data that it read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from phantom.engine.errors import CheckpointError

# Keys that say where or how to run, not what to train: they change neither a run's folder nor, beyond rounding, its
# results.
CIRCUMSTANCES = (
    *("seed", "device", "speed", "compile", "cuda_graph", "log_every", "checkpoint_every", "keep_checkpoints"),
    *("runs", "resume", "progress", "on_failure", "wandb", "wandb_project"),
    *("data.root", "data.download", "data.cache", "data.workers"),
)
# keys that came later: a run that does not use them is the run that it was before
LATER = ("init", "continue_from", "target")
# keys that may change where a run goes on from another one, see `continue_from`
BUDGET = ("epochs", "steps", "smoke_steps", "schedule", "eval_every", "eval_splits", "scale", "repeats", *LATER)


def run_folder(root: Path | str, label: str, overrides: Sequence[str], seed: int) -> Path:
    """Return the folder of a run: a pure function of the experiment, the overrides and the seed.

    Args:
        root: folder of all runs.
        label: the experiment's name, or model-data-gradient for a run without one.
        overrides: the command line's `key=value` items.
    """
    kept = [item for item in meaningful(overrides) if item.split("=")[0] not in ("experiment", "scale")]
    slug = ",".join(re.sub(r"[^\w=.,+-]+", "-", item) for item in kept) or "default"
    # too long, or with characters that a folder's name may not have
    if len(slug) > 80 or slug not in ("default", ",".join(kept)):
        slug = f"{slug[:64]}-{hashlib.sha256(','.join(kept).encode()).hexdigest()[:10]}"
    return Path(root) / label / slug / f"seed{seed}"


def meaningful(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that change the result of a run, sorted."""
    return sorted(item for item in overrides if item.lstrip("+~").split("=")[0] not in CIRCUMSTANCES)


def config_hash(config: Mapping[str, Any]) -> str:
    """Return a short hash of what was run: the resolved config without the keys that only say where or how."""
    return hashlib.sha256(json.dumps(_what(config), sort_keys=True).encode()).hexdigest()[:16]


def differences(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the root keys in which two configs train differently; those that only say where or how are left out.

    So is the monitor, which measures and disturbs nothing.
    """
    a, b = _what(config), _what(other)
    return sorted(key for key in (a.keys() | b.keys()) - {"monitor"} if a.get(key) != b.get(key))


def _what(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in CIRCUMSTANCES or key == "seed"}
    kept = {key: value for key, value in kept.items() if key not in LATER or value is not None}
    if isinstance(kept.get("data"), dict):
        kept["data"] = {key: value for key, value in kept["data"].items() if f"data.{key}" not in CIRCUMSTANCES}
    return _without(kept, "compile")  # solvers have the key, too


def _without(node: Any, name: str) -> Any:
    if not isinstance(node, dict):
        return node
    return {key: _without(value, name) for key, value in node.items() if key != name}


class Data(NamedTuple):
    """Data as read: a short hash per split (see `Source.digests`), and the run's config as text, which names a root."""

    digests: Mapping[str, str]
    config: str

    @property
    def root(self) -> str:
        data: Any = (yaml.safe_load(self.config) or {}).get("data") or {}
        root = data.get("root")
        return "its default folder" if root is None else str(root)


def check_same_data(then: Data, now: Data, path: Path) -> None:
    """Raise unless the data read now are those that the run of `path` read; splits without a hash are not compared.

    Raises:
        CheckpointError: names both, and the ways out.
    """
    other = [split for split in then.digests if now.digests.get(split, then.digests[split]) != then.digests[split]]
    if not other:
        return
    splits = "; ".join(f"{split} {then.digests[split]} there, {now.digests[split]} here" for split in other)
    raise CheckpointError(
        f"{path} is of other data than these ({splits}): that run read {then.root}, this one reads {now.root}. Name "
        "the data of that run by data.root=<folder>, or keep the runs of these in another folder by runs=<folder>; "
        "resume=never replaces that run"
    )
