"""A folder of its own for a round, and the real processes that it starts there. Linux alone: it reads /proc."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from phantom.engine.artifacts import checkpoint
from scripts import logged

ROOT = Path(__file__).resolve().parents[2]
MODEL = (
    *("model.channels=[4,8]", "model.head_channels=[2,2]", "model.final_channels=6", "model.num_groups=2"),
    *("model.expansion=2", "model.dropout=0.2", "solver.max_steps=3", "solver.tol=null", "optimizer=adam"),
    *("progress=false", "device=cpu"),
)
DIGITS = (
    *("subset=24", "test_subset=20", "data.batch_size=8", "data.eval_batch_size=7"),
    *("steps=60", "epochs=20", "eval_every=15", "log_every=4", "checkpoint_every=5", "ema=0.9"),
)
SECONDS = 120  # for any one thing to happen, on a busy machine


class BrokenPromiseError(Exception):
    """What a round found to be otherwise than promised."""


def hold(promise: bool, otherwise: str) -> None:
    """Raise BrokenPromiseError unless a promise holds.

    Args:
        otherwise: what was found.
    """
    if not promise:
        raise BrokenPromiseError(otherwise)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class Job:
    """A running train.py, under torchrun where it has several ranks."""

    def __init__(self, command: Sequence[str], *, runs: Path, log: Path, environment: dict[str, str]) -> None:
        self.runs, self.log = runs, log
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text("utf-8", errors="replace")

    def until_rows(self, count: int) -> None:
        """Wait until metrics.jsonl has so many rows."""
        self.until(lambda: sum(path.read_bytes().count(b"\n") for path in self.runs.rglob("metrics.jsonl")) >= count)

    def until(self, happened: Any) -> None:
        """Wait for something while the job runs."""
        end = time.monotonic() + SECONDS
        while not happened():
            if self.process.poll() is not None or time.monotonic() > end:
                raise BrokenPromiseError(
                    f"the run was over, or {SECONDS} s were, before it could be broken:\n{self.text}"
                )
            time.sleep(0.005)

    def children(self) -> list[int]:
        """Return the processes that this one has started, and that live."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, parent = path.joinpath("stat").read_text("utf-8").rsplit(")", 1)[1].split()[:2]
                if int(parent) == self.process.pid and state != "Z":
                    found.append(int(path.name))
        return found

    def ranks(self) -> dict[int, int]:
        """Return the process of every rank that torchrun has started."""
        found = {}
        for child in self.children():
            with contextlib.suppress(OSError):
                pairs = Path(f"/proc/{child}/environ").read_bytes().decode(errors="replace").split("\0")
                found |= {int(pair[5:]): child for pair in pairs if pair.startswith("RANK=")}
        return found

    def wait(self, seconds: float = SECONDS) -> int:
        """Wait for the end and return the exit status; 128 + n where signal n ended it."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise BrokenPromiseError(f"the run was not over after {seconds:g} s:\n{self.text}") from None
        return status if status >= 0 else 128 - status

    def hold_refused(self, *sentences: str) -> None:
        """Raise BrokenPromiseError unless it ends with status 1 and says all of this, without a traceback."""
        status = self.wait()
        said = all(sentence in self.text for sentence in sentences) and "Traceback" not in self.text
        hold(status == 1 and said, f"status {status}:\n{self.text}")

    def kill(self) -> None:
        """End what is left of it."""
        for process in (*self.ranks().values(), self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()


class Room:
    """The folder of one round; jobs that are still alive when it closes are ended."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="drill-"))
        self.runs = self.folder / "runs"
        self.jobs: list[Job] = []
        self.items: tuple[str, ...] = ()  # for all jobs of the room

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *error: object) -> None:
        for job in self.jobs:
            job.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(
        self,
        *items: str,
        ranks: int = 1,
        launcher: Sequence[str] = (),
        before: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        data: Sequence[str] = DIGITS,
    ) -> Job:
        """Start train.py on the room's runs.

        Args:
            items: further overrides.
            launcher: further options of torchrun.
            before: the words before the command, such as those of a shell that limits it.
            environment: further variables.
            data: the overrides that choose the data and the length of the run.
        """
        named = [] if any(item.startswith("wandb=") for item in items) else ["wandb=disabled"]
        overrides = [*MODEL, *data, *named, *self.items, *items, f"runs={self.runs}"]
        program = [*_launch(ranks, launcher), str(ROOT / "train.py")]
        return self._job([*before, *program, *overrides], environment or {})

    def evaluate(self, *items: str, ranks: int = 1) -> Job:
        """Run evaluate.py to its end, whatever that is."""
        job = self._job([*_launch(ranks), str(ROOT / "evaluate.py"), *items], {})
        job.wait()
        return job

    def _job(self, command: Sequence[str], environment: dict[str, str]) -> Job:
        own = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "RANK", "WORLD"))}
        job = Job(
            command,
            runs=self.runs,
            log=self.folder / f"log{len(self.jobs)}",
            environment={**own, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **environment},
        )
        self.jobs.append(job)
        return job

    def finish(self, *items: str, **options: Any) -> Job:
        """Run train.py to its end, which must be a good one."""
        job = self.start(*items, **options)
        status = job.wait()
        if status != 0:
            raise BrokenPromiseError(f"the same command, once more, exits {status}:\n{job.text}")
        return job

    def kill(self, *items: str, rows: int, **options: Any) -> Path:
        """Start train.py, kill it once metrics.jsonl has so many rows, and return its folder."""
        job = self.start(*items, **options)
        job.until_rows(rows)
        job.kill()
        return self.run

    @property
    def run(self) -> Path:
        """The one run folder."""
        (found,) = (path.parent for path in self.runs.rglob("config.yaml"))
        return found


def _launch(ranks: int, options: Sequence[str] = ()) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options]
    return [sys.executable, *(torchrun if ranks > 1 else ())]


_WHOLE: dict[int, Room] = {}


def whole(ranks: int) -> Path:
    """Return the folder of an unbroken run, which every round of this process shares."""
    if ranks not in _WHOLE:
        with contextlib.ExitStack() as stack:
            room = stack.enter_context(Room())
            room.finish(ranks=ranks)
            stack.pop_all()  # its folder stays until `forget`
        _WHOLE[ranks] = room
    return _WHOLE[ranks].run


def forget() -> None:
    """Remove the unbroken runs."""
    while _WHOLE:
        _WHOLE.popitem()[1].__exit__()


def differences(folder: Path, other: Path, *, names: Sequence[str] = ("steps", "final", "best")) -> list[str]:
    """Return in what a finished run differs from another one: weights, states, rows and record, bit for bit.

    Where they began does not count.

    Args:
        names: the parts of the record that count.
    """
    states = [checkpoint.load(each / "last.pt") for each in (folder, other)]
    keys = states[0].keys() - {"config", "seconds", "measured", "origin"}
    found = [f"last.pt: {key}" for key in sorted(keys) if not same(*(state[key] for state in states))]
    if _rows(folder) != _rows(other):
        found.append("metrics.jsonl")
    records = [json.loads((each / "record.json").read_bytes()) for each in (folder, other)]
    return found + [f"record.json: {key}" for key in names if records[0][key] != records[1][key]]


def hold_same(folder: Path, ranks: int = 1) -> None:
    """Raise BrokenPromiseError unless a run has ended as the unbroken one of so many ranks."""
    found = differences(folder, whole(ranks), names=("steps", "final", "best", "config_hash"))
    hold(not found, f"the run differs from the unbroken one in {', '.join(found)}")


def same(a: Any, b: Any) -> bool:
    """Return whether two nested structures hold the same numbers, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def _rows(folder: Path) -> list[dict[str, Any]]:
    timed = ("time/", "items_per_second", "peak_memory")
    rows = logged.read(folder / "metrics.jsonl")[0]
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]
