"""One process or many: joining the process group, and leaving it; `launcher` has the rendezvous.

`torchrun --nproc-per-node 4 train.py ...` sets the environment read here; a plain `python train.py` runs one process.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from phantom.deq import deqs_of
from phantom.engine.machine import launcher, slurm
from phantom.engine.machine.allocator import keep_freed_memory
from phantom.engine.machine.batch_norm import SumBatchNorm, synchronise

DEVICES = ("auto", "cpu", "cuda")


def start(device: str) -> tuple[torch.device, int, int]:
    """Join the process group when launched by torchrun or by srun; return (this process's device, rank, world size).

    On a CPU it also sets two options of the whole process: freed memory stays with the process, and denormal numbers
    count as zero.

    Args:
        device: one of `DEVICES`; "auto" is a GPU when there is one.

    Raises:
        ValueError: device=cuda without a GPU, or an environment that fits no launch.
        TimeoutError: names the ranks that have not come.
    """
    slurm.adopt()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU here: use device=cpu, or check the driver and the build")
    world = launcher.world()
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local)
        place = torch.device("cuda", local)
    else:
        place = torch.device("cpu")
        keep_freed_memory()
        # Adam leaves weights of 1e-40 where a gradient has vanished, and a few of them triple the time of a product
        torch.set_flush_denormal(True)
    if world > 1 and not dist.is_initialized():
        launcher.check()
        # DDP loads it. Loaded while there is a group, it keeps the group alive (seen with torch 2.14): the threads of
        # gloo outlive `stop`, and now and then abort a process that has finished
        importlib.import_module("torch._dynamo")
        launcher.leave_with()
        rank = launcher.rank()
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=launcher.fresh_store(rank, world),
            rank=rank,
            world_size=world,
            timeout=launcher.TIMEOUT,
            device_id=place if device == "cuda" else None,
        )
    return place, (dist.get_rank() if world > 1 else 0), world


def wrap(model: nn.Module, device: torch.device, world: int, *, sync_batchnorm: bool) -> nn.Module:
    """Return `model` under DistributedDataParallel when there are several processes."""
    if world == 1:
        return model
    if sync_batchnorm:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:
            synchronise(model)
        stop_together(model)
    return nn.parallel.DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def stop_together(model: nn.Module) -> None:
    """Let the solves of all ranks stop together where the module `cell`, which computes f, has a norm over ranks."""
    cell, norms = getattr(model, "cell", None), (nn.SyncBatchNorm, SumBatchNorm)
    if isinstance(cell, nn.Module) and any(isinstance(part, norms) for part in cell.modules()):
        for deq in deqs_of(model):
            deq.group = "world"


@contextmanager
def stopping_apart(model: nn.Module) -> Iterator[None]:
    """Let ranks stop by themselves: in evaluation no norm communicates, and ranks have unlike numbers of batches."""
    groups = [(deq, deq.group) for deq in deqs_of(model)]
    try:
        for deq, _ in groups:
            deq.group = None
        yield
    finally:
        for deq, group in groups:
            deq.group = group


def gather(value: Any) -> list[Any]:
    """Return the picklable `value` of every rank, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give every rank the first one's buffers, such as batch statistics, which each rank gathers from its own images.

    The wrapper does this before every forward pass in training; without it here, ranks would evaluate other models.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def barrier() -> None:
    """Wait for all processes (a no-op for one)."""
    if dist.is_initialized():
        dist.barrier()


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
