"""Plans of this repository's configs, from command lines."""

from collections.abc import Sequence
from typing import Any

from phantom.engine.build import build_trainer
from phantom.engine.plan import Plan, make_plan
from phantom.engine.run import run
from phantom.engine.training.loop import Trainer
from train import CONFIGS


def plan(items: Sequence[str]) -> Plan:
    """Return the plan of `train.py <items>`."""
    return make_plan(items, CONFIGS)


def composed(items: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the resolved config and the chosen leaves of `train.py <items>`."""
    made = plan(items)
    return made.config, made.choices


def trained(items: Sequence[str]) -> tuple[Trainer, dict[str, Any]]:
    """Train as `train.py <items>` does; return the trainer and the record."""
    made = plan(items)
    trainer = build_trainer(made)
    return trainer, run(trainer, made)
