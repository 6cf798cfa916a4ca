"""A checkpoint of some ranks, resumed by another number of them: who goes on with which rows and random numbers.

Every batch is cut into micro-batches, and these into shares, by `Shard.parts`: what the ranks carried is joined in the
order of the rows of the batch, and cut again. A rank that was there before keeps its random state; those that are new
begin one of their own, and those that are gone take theirs along. Without random numbers in training the run therefore
goes on as with any number of ranks, to rounding; with dropout it is another draw of the same run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from phantom.engine.artifacts import checkpoint
from phantom.engine.errors import CheckpointError
from phantom.engine.machine import distributed
from phantom.engine.source import Shard

log = logging.getLogger(__name__)


def newest_of_all(folder: Path, rank: int) -> Path | None:
    """Return the checkpoint that all ranks go on from, which the first one chooses; None where there is none.

    Raises:
        CheckpointError: see `checkpoint.newest`; or this rank does not see the file.
    """
    name = distributed.gather(checkpoint.newest(folder) if rank == 0 else None)[0]
    if name is not None and not (folder / name).exists():
        raise CheckpointError(
            f"rank {rank} finds no {folder / name}, which the first rank has: runs=<folder> must be on a file system "
            "that all machines share"
        )
    return None if name is None else folder / name


def carries_to_resume(ranks: Sequence[dict[str, Any]], shard: Shard, *, by_rows: bool, path: Path) -> list[Any]:
    """Return what this rank goes on with: its own carries, or its rows of those of another number of ranks.

    Args:
        ranks: the entries of the checkpoint `path`, one for each rank that wrote it.
        by_rows: see `Task.carry_rows`.

    Raises:
        CheckpointError: what was carried belongs to no rows, or to those of another batch.
    """
    carries, there, here = [own["carries"] for own in ranks], len(ranks), shard.world
    if there == here:
        return carries[shard.rank]
    try:
        if not by_rows and any(carry is not None for own in carries for carry in own):
            raise ValueError("the task does not say that a carry has the rows of the batch, see Task.carry_rows")
        found = carries_of(carries, shard)
    except ValueError as error:
        raise CheckpointError(
            f"the checkpoint {path} was written by {there} process(es), and this run has {here}, which cannot share "
            f"what those carried from batch to batch ({error}): resume with {there}, or start from the beginning with "
            "resume=never"
        ) from error
    if shard.rank == 0:
        log.info("%s was written by %d process(es): %d go on with the same batches", path, there, here)
    return found


def carries_of(ranks: Sequence[Sequence[Any]], shard: Shard) -> list[Any]:
    """Return what this rank carries, one entry per micro-batch.

    Args:
        ranks: per rank of the checkpoint, the carry of every micro-batch: nested tensors whose dimension 0 are the rows
            of its share, or None.

    Raises:
        ValueError: the carries do not hold the shares of one batch.
    """
    if all(carry is None for own in ranks for carry in own):
        return [None] * shard.micro
    pieces: dict[int, list[Any]] = {}  # by the first row
    total = sum(_rows(carry) for own in ranks for carry in own)
    for rank, own in enumerate(ranks):
        parts = Shard(rank, len(ranks), shard.micro).parts(total)
        if [len(part) for part in parts] != [_rows(carry) for carry in own[: len(parts)]]:
            raise ValueError("the carries are not the shares of one batch")
        pieces |= {part.start: pytree.tree_leaves(carry) for part, carry in zip(parts, own, strict=False)}
    structure = pytree.tree_structure(next(carry for own in ranks for carry in own if carry is not None))
    leaves = [torch.cat(leaf) for leaf in zip(*(pieces[start] for start in sorted(pieces)), strict=True)]
    cut = [
        pytree.tree_unflatten([leaf[part.start : part.stop] for leaf in leaves], structure)
        for part in shard.parts(total)
    ]
    return [*cut, *[None] * (shard.micro - len(cut))]


def _rows(carry: Any) -> int:
    counts = {len(leaf) for leaf in pytree.tree_leaves(carry) if leaf is not None}
    if len(counts) > 1:
        raise ValueError(f"the tensors of a carry have {sorted(counts)} rows")
    return counts.pop() if counts else 0
