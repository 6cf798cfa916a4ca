"""Processes that stop together: a map that communicates must be evaluated equally often on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

Group = Any  # a torch.distributed.ProcessGroup, which exists only where torch is built with it, its name, or None


def name_of(group: Group) -> str | None:
    """Return the name of a process group, which unlike the group can be copied and pickled; "world" stays itself.

    Raises:
        TypeError: `group` is no process group.
    """
    if group is None or isinstance(group, str):
        return group
    name = getattr(group, "group_name", None)
    if not isinstance(name, str):
        raise TypeError(f'group must be a torch.distributed.ProcessGroup, "world" or None, got {group!r}')
    return name


def any_rank(flag: bool, group: str | None, device: torch.device) -> bool:
    """Return whether `flag` is true on some rank of `group`; every rank of it must call this.

    Without a group, and where torch.distributed is not set up, it is the flag itself.
    """
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return flag
    named: Any = dist.distributed_c10d  # torch declares nothing of it
    ranks = dist.group.WORLD if group == "world" else named._resolve_process_group(group)
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=ranks)
    return bool(flags)
