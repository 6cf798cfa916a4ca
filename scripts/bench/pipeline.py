"""The input pipeline: how many pictures a second one core reads, decodes, cuts and normalises.

No worker process takes part, so that the CPU time of this process is all of the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from phantom.engine.build import build_source
from phantom.engine.config.overrides import expand
from phantom.engine.errors import ConfigError
from phantom.engine.plan import make_plan
from phantom.engine.source import Shard, Source
from scripts.bench import ratios
from train import CONFIGS

PICTURES = 512  # that a round takes, or all there are
KIND = "image_classification"


@dataclass
class Pass:
    """Pictures of one split as training or evaluation takes them.

    Args:
        batches: returns the batches of a round, given its number.
        seconds: per picture, one entry per timed round.
    """

    label: str
    batches: Callable[[int], Iterable[Any]]
    seconds: list[float] = field(default_factory=list)


def take(
    overrides: Sequence[str], *, clock: str, repeats: int, warmup: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return the `rows` of training and evaluation for every data set of the overrides, all timed in turn.

    Raises:
        ConfigError: an unknown key, data that are not there, or data that are no pictures.
    """
    now = time.process_time if clock == "cpu" else time.perf_counter
    passes = [each for items in expand(list(overrides)) for each in _passes(items)]
    for i in range(-warmup, repeats):
        for each in passes:
            begun, count = now(), 0
            for images, _ in each.batches(i + warmup):
                count += len(images)
                if count >= PICTURES:
                    break
            if i >= 0:
                each.seconds.append((now() - begun) / count)
        say(f"round {i + 1} of {repeats}" if i >= 0 else "warm-up")
    timed = [(each.label, ratios.median_with_interval(each.seconds)) for each in passes]
    rows = [{"label": label, "seconds": found, "items_per_second": 1 / found["median"]} for label, found in timed]
    return {"kind": "pipeline", "rows": rows, "ratios": []}


def _passes(items: Sequence[str]) -> Iterator[Pass]:
    plan = make_plan(items, CONFIGS)
    if plan.task.kind != KIND:
        raise ConfigError(
            f"pipeline reads pictures, and these data are of the kind {plan.task.kind}: name data=imagenet"
        )
    if "workers" in plan.config["data"]:
        plan = make_plan([*(item for item in items if not item.startswith("data.workers=")), "data.workers=0"], CONFIGS)
    source: Source = build_source(plan)
    name = " ".join(items)
    yield Pass(f"train {name}", lambda epoch: _joined(source.train(epoch=epoch, start=0, shard=Shard())))
    yield Pass(f"test {name}", lambda _: source.evaluate("test", shard=Shard()))


def _joined(steps: Iterable[Sequence[Any]]) -> Iterator[Any]:
    for micro_batches in steps:
        yield from micro_batches
