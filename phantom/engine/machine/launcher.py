"""What a rank knows of the launcher that started it: torchrun, or anything else that speaks its environment."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore, Store, rendezvous  # pyright: ignore[reportPrivateImportUsage]

TIMEOUT = timedelta(minutes=10)
GRACE = 60.0  # seconds that a rank without launcher has to save and leave


def check() -> None:
    """Raise ValueError where the environment's numbers of ranks fit no launch."""
    allowed = {"WORLD_SIZE": range(1, 2**31)}
    if world() > 1:
        allowed["RANK"] = range(world())
        allowed["MASTER_PORT"] = range(1, 2**16)
    for name, numbers in allowed.items():
        value = os.environ.get(name)
        if value is None and name == "RANK":
            raise ValueError(
                f"the environment has WORLD_SIZE={world()} and no RANK: let torchrun or srun start the ranks, or unset "
                "it for one process"
            )
        if value is not None and not (value.isdecimal() and int(value) in numbers):
            raise ValueError(
                f"the environment's {name}={value!r} must be an integer from {numbers[0]} to {numbers[-1]}, as a "
                "launcher sets it: unset it for one process"
            )


def world() -> int:
    """Return how many ranks the environment speaks of."""
    value = os.environ.get("WORLD_SIZE", "1")
    return int(value) if value.isdecimal() else 1


def rank() -> int:
    """Return which of them this one is: the first, 0, prints and writes. One process is it, whatever an old $RANK says.

    A trainer has its rank in its `Shard`, which is this one.
    """
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdecimal() and world() > 1 else 0


def is_there() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def leave_with() -> None:
    """Interrupt this process when its launcher dies: nobody would end it, and it would hold its run folder for ever."""
    if not is_there():
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            # half as long as signals count as one: the end of a session takes the launcher, and tells this process, too
            time.sleep(0.5)
        print(f"the launcher, process {parent}, is gone: this rank saves and ends", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


@functools.cache
def store() -> Store:
    """Return the store of keys that all ranks of this launch share, as MASTER_ADDR and MASTER_PORT name it.

    torchrun keeps one store over all its restarts.
    """
    return next(rendezvous("env://", timeout=TIMEOUT))[0]


def fresh_store(rank: int, world: int) -> Store:
    """Return the shared store under a prefix of its own: what a dead attempt left there is not read.

    Without it, ranks that torchrun starts again read the addresses of dead ones, and wait for those. The number of the
    restart will not do as a prefix: torchrun counts it per machine. So every rank shows a new ticket, and rank 0
    answers tickets, with the prefix, until every other rank has confirmed it: a ticket of a dead rank is answered, too,
    and never confirmed.

    Raises:
        TimeoutError: names the ranks that have not come.
    """
    shared, own = store(), uuid.uuid4().hex
    if rank > 0:
        shared.set(f"ticket/{rank}", own)
        prefix = shared.get(f"answer/{own}").decode()
        shared.set(f"confirmed/{prefix}/{rank}", "")
        return PrefixStore(prefix, shared)
    missing, end = set(range(1, world)), time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise TimeoutError(
                f"ranks {sorted(missing)} of {world} have not come within {TIMEOUT}: see what they print"
            )
        for other in missing:
            if shared.check([f"ticket/{other}"]):
                shared.set(f"answer/{shared.get(f'ticket/{other}').decode()}", own)
        time.sleep(0.01)
        missing = {other for other in missing if not shared.check([f"confirmed/{own}/{other}"])}
    return PrefixStore(own, shared)


def has_begun(folder: Path) -> bool:
    """Return whether this launch has begun its run in `folder` before: torchrun has restarted its processes since."""
    return is_there() and store().check([f"begun/{folder}"])


def note_begun(folder: Path) -> None:
    """Note for `has_begun`, on one rank, that what another launch left in `folder` is dealt with."""
    if is_there():
        store().set(f"begun/{folder}", "")
