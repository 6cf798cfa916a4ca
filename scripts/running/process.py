"""Runs of train.py, each in a process of its own: where one leaves its record, and how several run at a time."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from phantom.engine.artifacts import identity, records
from phantom.engine.artifacts.identity import Data, check_same_data
from phantom.engine.build import build_source
from phantom.engine.config.recipes import canonical
from phantom.engine.errors import CheckpointError, ConfigError
from phantom.engine.plan import Plan, make_plan
from phantom.engine.run import finished_folder
from scripts import logged, studies
from scripts.running.stopping import Stop, Stopped
from train import CONFIGS

# overrides under which a run still is a run of its row: a table shows scale and precision
SAME_ROW = ("experiment", "scale", "precision", "gradient_precision", "deterministic")


class Run(NamedTuple):
    """One run of train.py, or one measure.

    Args:
        name: the name that is printed.
        overrides: its command line.
        folder: the run folder it leaves.
        kept: the file of results/ that its record goes to.
        label: that of its record.
        kind: what makes runs cost alike, see costs.py; None where that is not known.
        gpus: processes under torchrun, one a GPU; None is one process without it.
    """

    name: str
    overrides: list[str]
    folder: Path
    kept: Path
    program: str = "train.py"
    label: str = ""
    kind: tuple[str, ...] | None = None
    gpus: int | None = None

    def line(self) -> str:
        """Return the command that a person would type."""
        start = ["python"] if self.gpus is None else ["torchrun", *_launch(self.gpus)]
        return shlex.join([*start, self.program, *self.overrides])


def _launch(gpus: int) -> list[str]:
    return ["--standalone", f"--nproc-per-node={gpus}", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR2"]


def _train(run: Run, alone: bool, stop: Stop) -> dict[str, Any]:
    return train(run.overrides, run.folder, alone=alone, gpus=run.gpus, stop=stop)


@dataclass(frozen=True)
class Work:
    """Runs that belong together, and what becomes of their records.

    Args:
        keep: takes a run and its record as soon as it is finished.
        begin: is called before the first one starts.
        find: returns a finished run of the same config that another command line left, with its record, or None.
        small: one thread a run is best, and as many run at a time as there are cores; otherwise one, with all threads.
        take: runs one and returns its record; takes the run, whether it is to show what it prints, and when to stop.
        cost: what the runs will cost, where that is known.
    """

    runs: Sequence[Run]
    keep: Callable[[Run, dict[str, Any]], None]
    small: bool = False
    begin: Callable[[], None] = lambda: None
    find: Callable[[Run], tuple[Run, dict[str, Any]] | None] = lambda run: None
    take: Callable[[Run, bool, Stop], dict[str, Any]] = _train
    cost: str = ""


def plan(overrides: Sequence[str]) -> Plan:
    """Return the plan of `train.py <overrides>`.

    Raises:
        ConfigError: the overrides do not compose; names the experiment, which is one of many here.
    """
    try:
        return make_plan(overrides, CONFIGS)
    except ConfigError as error:
        names = [item.partition("=")[2] for item in overrides if item.startswith("experiment=")]
        raise ConfigError(": ".join([*names, str(error)])) from error


def folder_of(made: Plan, overrides: Sequence[str], seed: int) -> Path:
    """Return the folder of a run that has the plan's label, and `overrides` for its command line."""
    root = studies.ROOT / Path(made.config["runs"]).expanduser()
    return identity.run_folder(root, made.label, canonical(overrides, CONFIGS), seed)


def variant_of(overrides: Sequence[str]) -> str:
    """Return what the overrides make of a row, as `@k=3`: empty where it stays the row that a table shows."""
    other = [item for item in overrides if item.split("=")[0] not in SAME_ROW]
    name = identity.run_folder(Path(), "label", other, 0).parent.name
    return "" if name == "default" else f"@{name}"


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def at_a_time(work: Work, jobs: int | None) -> int:
    """Return how many runs of the work run at a time, where `jobs` were asked for; on GPUs one takes all of them."""
    if any(run.gpus is not None for run in work.runs):
        return 1
    return min(jobs or (cores() if work.small else 1), max(1, len(work.runs)))


def execute(work: Work, jobs: int | None, stop: Stop) -> list[Run]:
    """Run everything, `jobs` at a time, keep each record as it comes, and return the runs that are left.

    None is left, unless it was time to stop; the first failure ends it.

    Raises:
        RuntimeError: a run failed; those that were running have finished, their folders are kept.
    """
    work.begin()
    # to look for a run takes its composition, for which there is no time once it is told to stop
    found = [pair for run in work.runs if not stop.told and (pair := work.find(run)) is not None]
    for run, record in found:
        print(f"{run.name}: {run.folder}", flush=True)
        work.keep(run, record)
    runs = [run for run in work.runs if run.name not in {run.name for run, _ in found}]
    jobs = at_a_time(work, jobs)
    alone = jobs == 1 and not work.small
    failed = threading.Event()  # the pool itself would begin the next run before it hears of a failure

    def start(run: Run) -> dict[str, Any] | None:
        if failed.is_set() or stop.told:
            return None
        print(f"{run.line()}\n", end="", flush=True)  # in one piece: threads print at a time
        try:
            return work.take(run, alone, stop)
        except Stopped:
            return None
        except BaseException:
            failed.set()
            raise

    left = []
    if jobs == 1:  # in this thread, which hears Ctrl-C
        for run in runs:
            record = start(run)
            if record is None:
                left.append(run)
            else:
                work.keep(run, record)
        return left
    with ThreadPoolExecutor(jobs) as pool:
        started = {pool.submit(start, run): run for run in runs}
        for future in as_completed(started):
            error = future.exception()
            if error is not None:
                pool.shutdown(cancel_futures=True)
                raise error
            record = future.result()
            if record is None:
                left.append(started[future])
                continue
            try:
                work.keep(started[future], record)
            except BaseException:
                failed.set()
                raise
    return [run for run in runs if run in left]


def typed_by_groups(run: Run) -> tuple[Run, dict[str, Any]] | None:
    """Return a finished run of a row's config that was typed as model=, data= and grad=, and its record as the row's.

    Returns None where there is none, or where the row's own folder has the record.

    A run of other data does not count, which is printed.
    """
    made = make_plan(run.overrides, CONFIGS)
    folder = finished_folder(made, studies.ROOT / Path(made.config["runs"]).expanduser())
    if folder is None or folder == run.folder:
        return None
    record = json.loads((folder / "record.json").read_bytes())
    then = Data(record.get("data_digests", {}), (folder / "config.yaml").read_bytes().decode())
    if then.root != Data({}, made.text).root:  # the data may have moved
        try:
            check_same_data(then, Data(build_source(made).digests(), made.text), folder / "record.json")
        except CheckpointError:
            print(f"{run.name}: {folder} has its config, but other data, and does not count", flush=True)
            return None
    return run._replace(folder=folder), record | {"label": made.label, "experiment": made.choices["experiment"]}


def train(
    overrides: Sequence[str], folder: Path, *, alone: bool = False, gpus: int | None = None, stop: Stop | None = None
) -> dict[str, Any]:
    """Run `train.py <overrides>` and return the record it leaves in `folder`, with the CPU seconds of that process.

    A finished run is not trained again but under resume=never, an interrupted one resumes; the seconds are those of the
    process that finished.

    Args:
        alone: show what the run prints, and leave it all threads; otherwise it has one thread and no progress bar.
        gpus: run it under torchrun, one process a GPU.
        stop: when to end it.

    Raises:
        Stopped: it was told to end before it had a record, under resume=never one of its own.
        RuntimeError: the process failed; the message holds the end of its output.
    """
    path = folder / "record.json"
    before = path.read_bytes() if path.exists() else None
    items = [*overrides, *([] if alone else ["progress=false"])]
    environment = dict(os.environ) if alone else {"OMP_NUM_THREADS": "1", **os.environ}
    captured = {} if alone else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    launcher = [] if gpus is None else ["-m", "torch.distributed.run", *_launch(gpus)]
    line = [sys.executable, *launcher, str(studies.ROOT / "train.py"), *items]
    process = subprocess.Popen(line, cwd=studies.ROOT, env=environment, **captured)
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()))
    reader.start()
    with stop.watching(process) if stop is not None else nullcontext():
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    reader.join()
    new = path.exists() and path.read_bytes() != before
    ended = stop is not None and stop.told
    if process.returncode and ended and not (new or (path.exists() and "resume=never" not in overrides)):
        raise Stopped(shlex.join(["train.py", *items]))
    if process.returncode and not ended:
        shown = "\n" + "".join(output[-15:]) if output else " see above; start again to resume there"
        raise RuntimeError(f"{shlex.join(['train.py', *items])} failed:{shown}")
    record = json.loads(path.read_bytes())
    if new:
        record["cpu_seconds"] = round(usage.ru_utime + usage.ru_stime, 1)
        records.write_json(path, record)
    return record


def curve(folder: Path, split: str, metric: str) -> tuple[list[int], list[float]]:
    """Return (epochs, values) of a metric at every evaluation of a run on one split; both empty where it has none."""
    rows = [row for row in logged.read(folder / "metrics.jsonl")[0] if row["kind"] == "eval" and row["split"] == split]
    return [row["epoch"] for row in rows], [row[metric] for row in rows]


def monitored(folder: Path) -> list[dict[str, Any]]:
    """Return what the monitor of a run measured, a row per measurement."""
    rows = [row for row in logged.read(folder / "metrics.jsonl")[0] if row["kind"] == "monitor"]
    return [{key: value for key, value in row.items() if key != "kind"} for row in rows]
