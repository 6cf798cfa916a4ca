"""One training run from a built trainer to its record."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phantom.engine.artifacts import identity, lock, provenance, records
from phantom.engine.artifacts.identity import Data, check_same_data
from phantom.engine.artifacts.records import Record
from phantom.engine.continuation import copy_continued
from phantom.engine.display import summary_table
from phantom.engine.errors import ConfigError
from phantom.engine.machine import distributed, launcher
from phantom.engine.machine.signals import Interrupted
from phantom.engine.model import official_parameter_count, parameter_counts
from phantom.engine.plan import Plan
from phantom.engine.training.loop import Trainer

# what resume=never removes
_LEAVES = ("last*.pt", "last.damaged", "best.pt", "metrics.jsonl", "record.json")
# what the record of a finished run needs so that it can be shown
_SHOWN = ("label", "folder", "num_parameters", "metric", "train", "times", "items_per_second")
log = logging.getLogger(__name__)


def run(trainer: Trainer, plan: Plan) -> dict[str, Any]:
    """Train, write record.json and print the closing table; return the record.

    A run whose folder holds the record of the same config is finished, and not trained again under resume=auto. Under
    resume=never the folder is emptied first; where torchrun starts its processes again, it is not, and they resume.

    Raises:
        CheckpointError: the folder holds a run of other data, or a checkpoint that cannot be resumed.
        LockedError: another process writes to the folder.
        Interrupted: a signal asked for the end; see `Trainer.fit`.
    """
    main, folder = trainer.shard.rank == 0, trainer.folder
    if main:
        log.info("%s", _recipe_line(plan))
        log.info("run folder: %s", folder)
        folder.mkdir(parents=True, exist_ok=True)
    anew = plan.config["resume"] == "never" and not launcher.has_begun(folder)
    finished = _find_finished(trainer, plan, anew=anew)
    if finished is not None:
        return finished
    with lock.hold(folder) if main else nullcontext():
        finished = _find_finished(trainer, plan, anew=anew)  # by who held the lock until now
        if finished is not None:
            return finished
        try:
            return _train(trainer, plan, anew=anew)
        except Interrupted:
            distributed.stop()
            raise


def _find_finished(trainer: Trainer, plan: Plan, *, anew: bool) -> dict[str, Any] | None:
    """Return the record of this run if it is finished, on all ranks, and show it."""
    main = trainer.shard.rank == 0
    finished = distributed.gather(_finished_record(plan, plan.folder) if main and not anew else None)[0]
    if finished is not None:
        config = (plan.folder / "config.yaml").read_bytes().decode()
        check_same_data(Data(finished.get("data_digests", {}), config), trainer.data, plan.folder / "record.json")
        if main:
            log.info("this run is finished; resume=never trains it again from the start")
            print(summary_table(finished), flush=True)
    return finished


def _train(trainer: Trainer, plan: Plan, *, anew: bool) -> dict[str, Any]:
    main, folder = trainer.shard.rank == 0, trainer.folder
    if main:
        for path in [path for name in (_LEAVES if anew else ()) for path in folder.glob(name)]:
            path.unlink()
        # where torchrun has started the processes again, the folder stands further on already
        if trainer.origin is not None and "continue_from" in trainer.origin and not any(folder.glob("last*.pt")):
            copy_continued(plan)
        launcher.note_begun(folder)
    started = provenance.now()
    # a run that continues another one has that one's checkpoint in its own folder by now
    trainer.fit(resume=not anew or plan.config["continue_from"] is not None)
    record = asdict(_record(trainer, plan, started))
    if main:
        records.write_json(folder / "record.json", record)
        trainer.finish(record)
        print(summary_table(record), flush=True)
    distributed.barrier()
    return record


def _recipe_line(plan: Plan) -> str:
    model, data, experiment = (plan.choices.get(group) for group in ("model", "data", "experiment"))
    start = f"experiment={experiment}" if experiment else f"model={model} data={data}"
    if plan.recipe is None:
        return f"recipe: none; {start} starts from the general defaults of train.yaml"
    return f"recipe: {plan.recipe}; {start} starts from it, recipe=null from the general defaults"


def finished_folder(plan: Plan, root: Path | None = None) -> Path | None:
    """Return the folder of a finished run of the plan's config, however its command line named it.

    `model=mdeq_small data=imagenet k=5 lam=0.6` is a run of the row `experiment=table3/imagenet_upg`, because both
    resolve to one config. The plan's own folder comes first; under resume=never no run counts.

    Args:
        root: the folder of all runs; None is the plan's own.
    """
    if plan.config["resume"] == "never":
        return None
    root = root or plan.root
    own = root / plan.folder.relative_to(plan.root)
    others = sorted(path.parent for path in root.rglob("record.json"))
    return next((folder for folder in (own, *others) if _finished_record(plan, folder) is not None), None)


def _finished_record(plan: Plan, folder: Path) -> dict[str, Any] | None:
    found = records.read(folder)
    if found is None:
        return None
    record, config = found
    try:
        other = record["seed"] != plan.config["seed"] or plan.differences(config)
        if missing := [key for key in _SHOWN if key not in record]:
            raise ConfigError(f"it has no {', '.join(missing)}")
    except ConfigError as error:
        log.warning("the record in %s is damaged and does not count (%s)", folder, error)
        return None
    return None if other else record


def _record(trainer: Trainer, plan: Plan, started: str) -> Record:
    config, spec, model = plan.config, trainer.source.spec, trainer.unwrapped
    return Record(
        label=plan.label,
        experiment=plan.choices.get("experiment"),
        recipe=plan.recipe,
        choices=plan.choices,
        overrides=identity.meaningful(plan.overrides),
        scale=config["scale"],
        seed=config["seed"],
        config_hash=identity.config_hash(config),
        kind=trainer.task.kind,
        metric=trainer.task.metric,
        baseline=spec.baseline,
        data_digests=dict(trainer.data.digests),
        data_notes=spec.notes,
        origin=trainer.origin,
        num_parameters=sum(p.numel() for p in model.parameters()),
        parameter_groups=parameter_counts(model),
        official_parameter_count=official_parameter_count(model),
        world_size=trainer.shard.world,
        precision=config["precision"],
        gradient_precision=config["gradient_precision"],
        compile=trainer.speed.compile,
        cuda_graph=trainer.speed.cuda_graph,
        folder=str(plan.folder.relative_to(plan.root)),
        **(provenance.environment(trainer.device) | trainer.measured),
        started=started,
        finished=provenance.now(),
        wall_seconds=round(trainer.stopwatch.total, 1),
        training_seconds=round(trainer.stopwatch.training, 3),
        steps=trainer.step,
        target=trainer.budget.target,
        reached=trainer.reached,
        final=trainer.final,
        best=trainer.best,
        train=trainer.train_report,
        unit=trainer.task.unit,
    )
