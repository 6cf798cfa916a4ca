"""One training run from a built trainer to its record."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from phantom.engine.artifacts import records
from phantom.engine.artifacts.progress import UNITS, summary_table
from phantom.engine.machine import distributed
from phantom.engine.training.loop import Trainer

log = logging.getLogger(__name__)


def run(trainer: Trainer, facts: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    """Train, write record.json and print the closing table; return the record."""
    main = trainer.shard.rank == 0
    folder = trainer.folder
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in ("last.pt", "best.pt", "metrics.jsonl", "record.json"):
                (folder / name).unlink(missing_ok=True)
        log.info("run folder: %s", folder)
    distributed.barrier()
    finished = _finished_record(folder, facts["config_hash"])
    if finished is not None:
        log.info("this run is finished; resume=never trains it anew")
        if main:
            print(summary_table(finished), flush=True)
        return finished
    if main:
        (folder / "config.yaml").write_text(trainer.config)
    started = records.now()
    trainer.fit(resume=resume)
    record = {
        **facts,
        **records.environment(trainer.device),
        "started": started,
        "finished": records.now(),
        "wall_seconds": round(trainer.seconds, 1),
        "steps": trainer.step,
        "final": trainer.final,
        "best": trainer.best,
        "train": trainer.train_report,
        "times": trainer.timer.summary(),
        "items_per_second": trainer.timer.throughput(),
        "unit": UNITS.get(facts["kind"], "items"),
        "peak_memory": records.peak_memory(trainer.device),
    }
    if main:
        records.write_json(folder / "record.json", record)
        trainer.finish(record)
        print(summary_table(record), flush=True)
    distributed.barrier()
    return record


def _finished_record(folder: Path, config_hash: str) -> dict[str, Any] | None:
    path = folder / "record.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record if record.get("config_hash") == config_hash else None
