"""Rounds of signals: a run saves, says so, ends with 128 + n, and goes on to the same numbers."""

from __future__ import annotations

import os
import signal
import time

from phantom.engine.machine.signals import ECHO
from scripts.drilling.room import Job, Room, hold, hold_same
from scripts.drilling.rounds import drill
from scripts.drilling.trees import IMAGES, plant

HEAR_USR2 = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR2")


def _goes_on(room: Room, ranks: int = 1) -> None:
    room.finish(ranks=ranks)
    hold_same(room.run, ranks)


def _said(job: Job, sentence: str) -> None:
    hold(sentence in job.text and "Traceback" not in job.text.split("torch.distributed")[0], job.text)


def _one_process(room: Room, number: int) -> None:
    job = room.start()
    job.until_rows(7)
    job.process.send_signal(number)
    status = job.wait()
    hold(status == 128 + number, f"exit status {status}:\n{job.text}")
    _said(job, f"{signal.Signals(number).name}: stopped after step")
    _goes_on(room)


@drill("sigterm")
def sigterm(room: Room) -> None:
    """SIGTERM: saved, said, 143, and bit for bit the unbroken run afterwards."""
    _one_process(room, signal.SIGTERM)


@drill("sigint")
def sigint(room: Room) -> None:
    """Ctrl-C: the same, with 130."""
    _one_process(room, signal.SIGINT)


@drill("sigusr2")
def sigusr2(room: Room) -> None:
    """SIGUSR2: the same, with 140."""
    _one_process(room, signal.SIGUSR2)


@drill("sighup")
def sighup(room: Room) -> None:
    """SIGHUP, of a terminal that is closed: the same, with 129."""
    _one_process(room, signal.SIGHUP)


@drill("signal-twice")
def twice(room: Room) -> None:
    """A second signal ends the run at once, also where no step ends: its own status, 130; what was saved goes on."""
    job = room.start(ranks=2)
    job.until_rows(7)
    ranks = job.ranks()
    # the first rank waits for the sums of the second one, so that its step cannot end
    os.kill(ranks[1], signal.SIGSTOP)
    try:
        os.kill(ranks[0], signal.SIGTERM)
        # under a launcher a second signal within ECHO counts as the first one, passed on once more
        time.sleep(2 * ECHO)
        hold("stopped after step" not in job.text, job.text)
        os.kill(ranks[0], signal.SIGINT)
        job.until(lambda: "SIGINT, the second signal: the run ends at once" in job.text)
    finally:
        os.kill(ranks[1], signal.SIGCONT)
    job.wait()
    hold("stopped after step" not in job.text, job.text)
    hold(f"exitcode: {128 + signal.SIGINT}" in job.text.replace("exitcode  :", "exitcode:"), job.text)
    _goes_on(room, ranks=2)


@drill("signal-at-start")
def at_start(room: Room) -> None:
    """A signal before the first step is a sentence and 143."""
    job = room.start()
    job.until(lambda: "run folder:" in job.text)
    job.process.send_signal(signal.SIGTERM)
    status = job.wait()
    hold(status == 128 + signal.SIGTERM, f"exit status {status}:\n{job.text}")
    _said(job, "SIGTERM: ")
    _goes_on(room)


@drill("signal-in-evaluation")
def in_evaluation(room: Room) -> None:
    """A signal in a long evaluation saves within seconds, and the evaluation is made up for."""
    long = ("subset=8", "test_subset=1500", "data.batch_size=4", "data.eval_batch_size=1", "steps=2", "epochs=1")
    job = room.start("solver.max_steps=20", data=long)
    job.until_rows(1)
    job.process.send_signal(signal.SIGTERM)
    status = job.wait(30)
    hold(status == 128 + signal.SIGTERM, f"exit status {status}:\n{job.text}")
    _said(job, "SIGTERM: stopped after step 2 of 2")
    room.finish("solver.max_steps=20", data=long)
    hold((room.run / "record.json").exists(), "there is no record")


def _two_ranks(room: Room, number: int, one: bool) -> Job:
    job = room.start(ranks=2, launcher=HEAR_USR2)
    job.until_rows(7)
    if one:
        os.kill(job.ranks()[1], number)
    else:
        job.process.send_signal(number)
    job.wait()
    hold(f"{signal.Signals(number).name}: stopped after step" in job.text, job.text)
    _goes_on(room, ranks=2)
    return job


@drill("torchrun-sigterm")
def torchrun_sigterm(room: Room) -> None:
    """SIGTERM to torchrun: all ranks stop at one step and save; the same command goes on bit for bit."""
    _two_ranks(room, signal.SIGTERM, one=False)


@drill("torchrun-sigusr2")
def torchrun_sigusr2(room: Room) -> None:
    """SIGUSR2 to torchrun with --signals-to-handle: the same."""
    _two_ranks(room, signal.SIGUSR2, one=False)


@drill("one-rank-sigusr2")
def one_rank(room: Room) -> None:
    """SIGUSR2 to one rank of two: both stop at one step, and end with 140."""
    job = _two_ranks(room, signal.SIGUSR2, one=True)
    hold("exitcode: 140" in job.text.replace("exitcode  :", "exitcode:"), job.text)


@drill("whole-group-sigterm")
def whole_group(room: Room) -> None:
    """SIGTERM to every process of the job, data workers too, as a scheduler sends it: saved, 143, goes on."""
    plant(room)
    more = ("data.workers=2", "steps=12", "epochs=12")
    job = room.start(*more, data=IMAGES)
    job.until_rows(3)
    os.killpg(job.process.pid, signal.SIGTERM)
    status = job.wait()
    hold(status == 128 + signal.SIGTERM, f"exit status {status}:\n{job.text}")
    _said(job, "SIGTERM: stopped after step")
    room.finish(*more, data=IMAGES)
