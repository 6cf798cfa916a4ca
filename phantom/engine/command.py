"""The command line of train.py: every mistake is answered by one message before any work starts, then the jobs run."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from phantom.engine.config.configs import Configs
from phantom.engine.config.overrides import expand, to_hydra
from phantom.engine.errors import ConfigError, DataError, UserError, as_config_error, printable
from phantom.engine.machine import launcher, signals, slurm, streams
from phantom.engine.plan import Plan, make_plan
from phantom.engine.sweep import Sweep
from phantom.report import SolveError

Job = Callable[[Plan], Any]

SWEEP = {"-m", "--multirun"}
# flags of Hydra that show something and start no job: one of these, and with the config what goes with it
CFG, OF_CFG = {"-c", "--cfg"}, {"--resolve", "-p", "--package"}
SHOW = CFG | {"-h", "--help", "--hydra-help", "-i", "--info", "--version", "-sc", "--shell-completion"}
HYDRA_KEY = re.compile(r"[+~]*hydra[./]")

PATIENCE = 20.0  # seconds in which another rank may tell of a mistake that all of them find
# errors of the disk or its permissions; not bugs, so they are reported in one line
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
DISK = (
    *(*FULL, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)


def run(job: Job, configs: Configs) -> None:
    """Run `job` on the plan of the command line, or with -m on every plan of its sweep; exit 1 where one failed.

    All plans are made before the first one runs. `--cfg job` prints the config of the plan. Hydra's other flags that
    show something (`--info`, `--help`) go to Hydra, and so do its keys (`hydra/launcher=...`): its launcher makes each
    plan again where it runs the job. A sweep ends with its table; a job that fails does not stop the others, whatever
    the reason.
    """
    streams.prepare()
    try:
        slurm.adopt()
        with as_config_error():
            launcher.check()
    except ConfigError as error:
        refuse(error)
    with signals.end_at_once():
        _run(job, configs)


def _run(job: Job, configs: Configs) -> None:
    arguments = sys.argv[1:]
    flags = {argument for argument in arguments if argument.startswith("-")}
    items = [argument for argument in arguments if argument not in flags]
    sweep, group = None, ""
    try:
        _check_flags(flags)
        if not flags <= SWEEP:
            _show(flags, items, configs)
            return
        if flags:
            _check_alone()
        hydras = [item for item in items if HYDRA_KEY.match(item)]
        own = [item for item in items if item not in hydras]
        plans = [make_plan(overrides, configs) for overrides in (expand(own) if flags else [own])]
        for plan in plans:
            # a finished run may be shown where nothing can be written
            if not (plan.folder / "record.json").exists():
                _make_folder(plan.root)
        if flags:
            _check_apart(plans)
            sweep = Sweep.of(own, plans)
            group = sweep.folder.relative_to(plans[0].root / "sweeps").as_posix()
            plans = [replace(plan, group=group) for plan in plans]
        sys.argv[1:] = [*flags, *hydras, *to_hydra([*own, *_recipe(plans, own)], configs)]
    except (ConfigError, OSError) as error:
        refuse(error)
    if hydras:
        _run_by_hydra(job, configs, sweep, group, [list(plan.overrides) for plan in plans])
    else:
        _run_here(job, plans, sweep)


def _check_flags(flags: set[str]) -> None:
    """Refuse the flags of Hydra that change how it composes and runs: our plans come from elsewhere.

    Raises:
        ConfigError: names the flags, and what there is.
    """
    names = {flag.partition("=")[0] for flag in flags}
    shown = names & SHOW
    if names <= SWEEP or (len(shown) == 1 and names <= shown | (OF_CFG if shown & CFG else set())):
        return
    # flags that are known do not go together
    wrong = names - SWEEP - SHOW - OF_CFG or names
    raise ConfigError(
        f"{' '.join(sorted(wrong))} is not understood here: write settings as key=value, start a sweep by -m, look by "
        "one of --cfg job, --info and --help, and put a leaf of your own into configs/<group>/"
    )


def _check_apart(plans: list[Plan]) -> None:
    """Raise ConfigError where two jobs of a sweep have one folder: the second would find the first one's record."""
    folders: dict[Path, Plan] = {}
    for plan in plans:
        other = folders.setdefault(plan.folder, plan)
        if other is not plan:
            items = {*plan.overrides} ^ {*other.overrides}
            if not items:
                raise ConfigError(
                    f"two jobs of this sweep are one run, {plan.folder}: a value is given twice, leave one of them out"
                )
            keys = ", ".join(sorted({item.partition("=")[0] for item in items}))
            raise ConfigError(
                f"two jobs of this sweep are one run, {plan.folder}: {keys} says where or how it is run, and not what. "
                "Give each value a command line and a folder of its own, with runs=<folder>"
            )


def _check_alone() -> None:
    """Raise ConfigError where a sweep was started by a launcher of several processes."""
    world = launcher.world()
    if world > 1:
        raise ConfigError(
            f"-m starts one run after the other, and torchrun or srun has started it {world} times: start a launcher "
            "for every run instead, as `for seed in 0 1; do torchrun --nproc-per-node 8 train.py seed=$seed; done`, or "
            "let SLURM do it with scripts/slurm/array.sbatch, see docs/scaling.md"
        )


def refuse(error: Exception) -> NoReturn:
    """End with the message of a user's error; of several processes, which all find the same mistake, the first tells.

    A picture that is damaged in the share of one process is found by that one alone: it tells. So does one that is
    still there after `PATIENCE`: the launcher ends all once one has ended, and the first may have been late to start.
    """
    if launcher.rank() > 0 and not isinstance(error, DataError):
        time.sleep(PATIENCE)
    sys.exit(f"error: {message_of(error)}")


def _show(flags: set[str], items: list[str], configs: Configs) -> None:
    """Show what is asked for.

    Hydra does so, but for the config that a run would have: it does not know the recipe of a pair.
    """
    if flags <= {*CFG, "--cfg=job", "--resolve"} and ("job" in items or "--cfg=job" in flags):
        print(make_plan([item for item in items if item != "job"], configs).text, end="")
    else:
        _start_hydra(configs, lambda: None)


def _run_here(job: Job, plans: list[Plan], sweep: Sweep | None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    count, reasons = len(plans), {}
    plans.reverse()
    while plans:  # a plan holds what its job allocates, so none is kept
        number = count - len(plans)
        reasons[number] = _attempt(job, plans.pop(), one_of_many=sweep is not None)
    _end(reasons, sweep)


def _end(reasons: dict[int, str | None], sweep: Sweep | None) -> None:
    """Show the answer of a sweep, and exit with 1 where a job failed; `reasons` has None for a job that did not."""
    failed = any(reason is not None for reason in reasons.values())
    if sweep is not None:
        sweep.reasons.update({number: reason for number, reason in reasons.items() if reason is not None})
        try:
            left_out = sweep.close()["failed"]
        except OSError as error:
            refuse(error)
        # a launcher may have run jobs in processes of its own, whose reasons stay there
        failed |= len(reasons) < len(sweep.jobs) and bool(left_out)
    if failed:
        sys.exit(1)


def _recipe(plans: list[Plan], items: list[str]) -> list[str]:
    """Return the recipe that all jobs of a command line share, for Hydra's own composition of it."""
    names = {plan.recipe for plan in plans}
    typed = any(item.split("=")[0] in ("recipe", "experiment") for item in items)
    return [f"recipe={name}" for name in names if len(names) == 1 and name is not None and not typed]


def _run_by_hydra(job: Job, configs: Configs, sweep: Sweep | None, group: str, typed: list[list[str]]) -> None:
    """Let Hydra start the jobs.

    Args:
        typed: the items of every job as they were typed, which name its folder: Hydra spells some otherwise, such as
            1e-3.
    """
    reasons: dict[int, str | None] = {}

    def start() -> None:
        os.chdir(HydraConfig.get().runtime.cwd)  # hydra.job.chdir leads elsewhere, and a path is meant from here
        number = HydraConfig.get().job.num if sweep is not None else 0
        # made again from the command line, because a recipe follows from the job's own model and data
        reasons[number] = _attempt(
            lambda: job(replace(make_plan(typed[number], configs), group=group)), one_of_many=sweep is not None
        )

    _start_hydra(configs, start)
    _end(reasons, sweep)


def _start_hydra(configs: Configs, start: Callable[[], None]) -> None:
    """Let Hydra read `sys.argv`: it shows what that asks for, or calls `start` in every job."""
    configs.mount()

    @hydra.main(version_base="1.3", config_path=str(configs.folder), config_name="train")
    def main(_: DictConfig) -> None:
        start()

    main()


def _attempt(job: Callable[..., Any], *arguments: Any, one_of_many: bool) -> str | None:
    """Call the job; print a user's error in one line and return it, or None.

    Any other error is raised; of one of many jobs it is printed as Python does, and returned in one line.
    """
    try:
        job(*arguments)
    except Exception as error:
        own = is_user_error(error)
        if not own and not one_of_many:
            raise
        reason = message_of(error) if own else f"{type(error).__name__}: {error}".splitlines()[0]
        if not own:
            traceback.print_exc()
        print(f"error: {reason}", file=sys.stderr, flush=True)
        if launcher.world() > 1:
            # the other processes may be waiting for this one: with it, the launcher ends them
            sys.exit(1)
        return reason
    return None


def is_user_error(error: Exception) -> bool:
    """Return whether the message alone tells the user what to do."""
    return isinstance(error, (UserError, SolveError)) or _of_disk(error) is not None


def message_of(error: Exception) -> str:
    """Return the message for the user: one line, without a traceback."""
    found = _of_disk(error)
    if found is None:
        return printable(str(error))
    return printable(
        f"{found.filename or 'writing failed'}: {found.strerror}. Free some space, correct the permissions, or name "
        "another folder with runs=<folder>; what was saved before is kept"
    )


def _of_disk(error: Exception) -> OSError | None:
    """Return the error of a disk or folder that this one is, or that torch turned into another one while writing."""
    if isinstance(error, OSError):
        return error if error.errno in DISK else None
    cause = error.__context__
    return cause if isinstance(cause, OSError) and cause.errno in FULL else None


def _make_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
