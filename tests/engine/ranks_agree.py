"""One rank of `test_ranks_agree.py`: python -m tests.engine.ranks_agree RANK WORLD FOLDER. All runs are in float64."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phantom.engine.build import build_trainer
from phantom.engine.source import Source
from phantom.engine.training.loop import Trainer
from tests.configs.tiny_data import tiny
from tests.engine.tiny import Killed
from tests.phantom.processes import join, leave
from tests.plans import plan
from tests.tiny_run import MODEL

STEPS = 20
# budgets without a tolerance: the iterates of a problem then do not depend on the others of its batch
BUDGETS = ("solver.tol=null", "solver.max_steps=5")
ADJOINT = ("grad=implicit", "adjoint_solver.tol=null", "adjoint_solver.max_steps=6")
ESTIMATORS = {
    "upg": ("grad=upg", "k=3", "lam=0.5"),
    "npg": ("grad=npg", "k=3", "lam=0.5"),
    "implicit": ADJOINT,
    "one_step": ("grad=one_step",),
    "shine": ("grad=shine", "solver=broyden"),
    "bptt": ("grad=bptt",),
}
COMMON = (
    *(f"steps={STEPS}", "epochs=50", "eval_every=10", "log_every=1", "checkpoint_every=11", "wandb=disabled"),
    *("progress=false", "device=cpu", "schedule=constant"),
    # plain descent: Adam makes steps of the rounding in a gradient of zero, as of a bias in front of a batch norm
    "optimizer=sgd",
)

# no rank count divides the sizes; last batches are short
FAMILIES = {
    "mdeq": (*MODEL, "subset=34", "test_subset=23", "data.batch_size=10", "data.eval_batch_size=7"),
    "transformer": (
        *(
            "model=deq_transformer_small",
            "data=wikitext103",
            "model.d_model=8",
            "model.num_heads=2",
            "model.d_inner=12",
        ),
        *("model.cutoffs=[4]", "model.div_val=1", "model.dropout=0", "model.mem_len=6", "model.eval_mem_len=6"),
        *("data.streams=5", "data.eval_streams=3"),
    ),
    "ignn": (
        *("model=ignn", "data=ppi_synthetic", "data.scale=0.005", "data.batch_size=5", "data.eval_batch_size=2"),
        *("model.node_labelling.widths=[8,6]", "solver=fixed_point"),
    ),
    "reasoner": (
        *("experiment=reasoners/sudoku4_upg", "model.d_model=8", "model.supervision.steps=3", "data.num_train=60"),
        *("model.supervision.halting=fixed", "data.num_test=21", "data.batch_size=9", "data.eval_batch_size=10"),
        *("data.passes=2", "optimizer.weight_decay=0"),
    ),
}


class Doubled(Source):
    """The batches of another source in float64; the run ends, as if killed, before the training step `stop`."""

    kind = "any"

    def __init__(self, source: Source, stop: int | None = None) -> None:
        self.source, self.spec, self.splits, self.left = source, source.spec, source.splits, stop

    def steps(self, epoch: int) -> int:
        return self.source.steps(epoch)

    def train(self, **options: Any) -> Iterator[list[Any]]:
        for batches in self.source.train(**options):
            if self.left is not None:
                if self.left == 0:
                    raise Killed
                self.left -= 1
            yield doubled(batches)

    def evaluate(self, split: str, **options: Any) -> Iterator[Any]:
        yield from map(doubled, self.source.evaluate(split, **options))


def doubled(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, (list, tuple)):
        make = getattr(type(batch), "_make", type(batch))
        return make(doubled(item) for item in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{field.name: doubled(getattr(batch, field.name)) for field in fields(batch)})
    return batch


def trainer(family: str, estimator: str, folder: Path, *more: str) -> Trainer:
    """Return a float64 trainer of the family, alone or in the group of processes that is there."""
    data = folder / f"text{os.environ.get('RANK', '0')}-{os.environ.get('WORLD_SIZE', '1')}"
    items = [*FAMILIES[family]]
    if family == "transformer":
        data.mkdir(parents=True, exist_ok=True)
        items += [item for item in tiny("wikitext103", data) if "streams" not in item]
    budgets = () if family == "reasoner" else BUDGETS
    estimators = () if (family, estimator) == ("reasoner", "upg") else ESTIMATORS[estimator]
    torch.set_default_dtype(torch.float64)
    try:
        made = plan([*items, *COMMON, *budgets, *estimators, *more, f"runs={folder}"])
        result = build_trainer(made)
    finally:
        torch.set_default_dtype(torch.float32)
    result.unwrapped.double()
    result.source = Doubled(result.source)
    return result


def outcome(
    family: str, estimator: str, folder: Path, *more: str, resume: bool = False, stop: int | None = None
) -> dict[str, Any]:
    """Train, and return the weights at the start and at the end, the metrics and the rows.

    Args:
        resume: go on from the checkpoint that is there.
        stop: end as if killed before this step.
    """
    run = trainer(family, estimator, folder, *more)
    run.source = Doubled(run.source.source, stop)
    start = copy.deepcopy(run.unwrapped.state_dict())
    torch.set_default_dtype(torch.float64)
    try:
        run.fit(resume=resume)
    except Killed:
        assert run.step == stop
    finally:
        torch.set_default_dtype(torch.float32)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return {
        "start": start,
        "end": run.unwrapped.state_dict(),
        "final": run.final,
        "step": run.step,
        "rows": [json.loads(line) for line in lines],
    }


def _cases() -> dict[str, tuple[str, ...]]:
    found = {f"{family}-{grad}": (family, grad) for family in FAMILIES for grad in ("upg", "npg", "implicit")}
    found = {name: case for name, case in found.items() if name not in ("reasoner-npg", "reasoner-implicit")}
    found |= {f"mdeq-{grad}": ("mdeq", grad) for grad in ("one_step", "shine", "bptt")}
    found |= {f"{name}-accumulated": (name, "upg", "accumulate=2") for name in ("mdeq", "reasoner")}
    found["mdeq-accumulated"] += ("subset=30",)  # a short batch of four is one micro-batch for three ranks
    # a union of graphs is one problem: a Broyden step of a graph depends on the others, a plain step does not
    found["ignn-implicit"] += ("adjoint_solver=fixed_point",)
    # at 0.05 the recursion of a reasoner multiplies every rounding by 1e9 in 20 steps
    rates = {name: 0.005 if name.startswith("reasoner") else 0.05 for name in found}
    return {name: (*case, "sync_batchnorm=true", f"optimizer.lr={rates[name]}") for name, case in found.items()}


# family, estimator and further overrides
CASES = _cases()


def main(rank: int, world: int, folder: Path, names: list[str], *, resume: bool) -> None:
    """Train the named cases in a group of `world` processes, or go on with them."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    join(rank, world, folder)
    found = {name: outcome(*CASES[name][:2], folder / name, *CASES[name][2:], resume=resume) for name in names}
    torch.save(found, folder / f"{rank}.pt")
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[5:], resume=sys.argv[4] == "resume")
