"""Which data a run is of: what a checkpoint or a record keeps of it, against what is read now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from phantom.engine.errors import CheckpointError


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
