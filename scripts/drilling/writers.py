"""Rounds of processes: one writer a folder, ranks that die, launchers that die."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time

from scripts.drilling.room import Room, hold, hold_same
from scripts.drilling.rounds import drill

RESTARTS = ("--max-restarts", "2")


@drill("kill-9")
def kill(room: Room) -> None:
    """kill -9, and the same command: bit for bit the unbroken run."""
    room.kill(rows=11)
    room.finish()
    hold_same(room.run)


@drill("second-writer")
def second_writer(room: Room) -> None:
    """A second run on a folder in use is refused, with host and process of the first, which goes on."""
    first = room.start()
    first.until_rows(3)
    first.process.send_signal(signal.SIGSTOP)  # as if it took long
    second = room.start()
    status = second.wait()
    first.process.send_signal(signal.SIGCONT)
    hold(status == 1 and "Traceback" not in second.text, second.text)
    holder = f"process {first.process.pid} on {socket.gethostname()}"
    hold(holder in second.text and "a run has one writer" in second.text, second.text)
    status = first.wait()
    hold(status == 0, f"the first run exits {status}:\n{first.text}")
    hold_same(room.run)


@drill("stale-lock")
def stale_lock(room: Room) -> None:
    """The lock of a killed run locks nothing: the next one starts at once."""
    room.kill(rows=3)
    hold((room.run / "run.lock").exists(), "the killed run left no lock")
    again = room.finish()
    hold("waiting" not in again.text, again.text)


@drill("launcher-killed")
def launcher_killed(room: Room) -> None:
    """Where torchrun is killed, its ranks save and end by themselves; the same command goes on bit for bit."""
    job = room.start(ranks=2)
    job.until_rows(7)
    ranks = job.ranks()
    job.process.kill()
    job.process.wait()
    end = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{process}") for process in ranks.values()):
        if time.monotonic() > end:
            for process in ranks.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            hold(False, f"the ranks live on after a minute:\n{job.text}")
        time.sleep(0.1)
    hold("the launcher" in job.text and "stopped after step" in job.text, job.text)
    room.finish(ranks=2)
    hold_same(room.run, ranks=2)


def _rank_killed(room: Room, *items: str, number: int = 1) -> None:
    job = room.start(*items, ranks=2, launcher=RESTARTS)
    job.until_rows(11)
    os.kill(job.ranks()[number], signal.SIGKILL)
    status = job.wait()
    hold(status == 0, f"torchrun exits {status}:\n{job.text}")
    hold_same(room.run, ranks=2)


@drill("rank-killed")
def rank_killed(room: Room) -> None:
    """torchrun --max-restarts=2 with one rank killed goes on by itself, bit for bit."""
    _rank_killed(room)


@drill("first-rank-killed")
def first_rank_killed(room: Room) -> None:
    """The same with the first rank, which writes and holds the lock."""
    _rank_killed(room, number=0)


@drill("rank-killed-never")
def rank_killed_never(room: Room) -> None:
    """With resume=never a restart goes on from what this launch has saved, and from nothing older."""
    room.finish("optimizer.lr=0.5", ranks=2)
    room.run.rename(room.folder / "older")
    _rank_killed(room, "resume=never")
    rows = (room.run / "metrics.jsonl").read_text("utf-8").splitlines()
    hold(len(rows) == len(set(rows)), "rows are there twice")


@drill("late-rank")
def late_rank(room: Room) -> None:
    """A rank that reaches no step for a minute is named, with its step; the run is not ended, and goes on."""
    job = room.start(ranks=2)
    job.until_rows(5)
    late = job.ranks()[1]
    os.kill(late, signal.SIGSTOP)
    try:
        job.until(lambda: "rank 1 has not gone on from step" in job.text)
    finally:
        os.kill(late, signal.SIGCONT)
    status = job.wait()
    hold(status == 0, f"torchrun exits {status}:\n{job.text}")
    hold_same(room.run, ranks=2)
