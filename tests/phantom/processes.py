"""Start the ranks of a test as processes of their own, and give back what each has saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(module: str, folder: Path, *more: str, world: int = 2, seconds: float = 120) -> list[dict]:
    """Run `python -m module RANK WORLD FOLDER MORE` for every rank; return the contents of FOLDER/RANK.pt.

    They end after `seconds` at most.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder), *more],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def join(rank: int, world: int, folder: Path) -> None:
    """Make this process, which has one thread, a rank of a group on the CPU."""
    import torch._dynamo

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)


def leave() -> None:
    """Leave the group."""
    dist.destroy_process_group()
