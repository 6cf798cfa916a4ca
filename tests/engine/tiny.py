"""A training run small enough to follow: random vectors, a classifier around one tanh equilibrium, float64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phantom import DEQ, UPG, FixedPoint, Solution
from phantom.engine.artifacts.tracking import Tracker
from phantom.engine.source import Shard, Source, Spec
from phantom.engine.speed import Speed
from phantom.engine.tasks.base import Score, Tally, Task
from phantom.engine.tasks.images import ImageClassification
from phantom.engine.training.budget import Budget
from phantom.engine.training.loop import Trainer
from phantom.engine.training.rules import Rules
from phantom.engine.training.schedule import Cosine
from tests.phantom.problems import DTYPE, TanhMap, randn

CLASSES = 3
SOLVER = FixedPoint(max_steps=60, tol=1e-12)
GRAD = UPG(k=5, lam=0.5)
CPU = torch.device("cpu")
DISABLED = Tracker(mode="disabled", project="", name="", folder=Path(), config={})
CLOCKED = {"seconds", "measured"}  # of a checkpoint: what depends on the clock and on memory
TIMES = ("time/", "items_per_second", "peak_memory")


class Vectors(Source):
    """`count` labelled vectors (N, 3) to train on, as many to test on, in an order that depends on the epoch alone."""

    kind = "image_classification"
    splits = ("train", "valid", "test")

    def __init__(self, *, count: int = 12, batch_size: int = 4, eval_batch_size: int = 5) -> None:
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.inputs = {split: randn(count, 3, seed=i) for i, split in enumerate(self.splits)}
        self.spec = Spec(kind=self.kind, inputs={}, sizes=dict.fromkeys(self.splits, count))

    def labels(self, split: str) -> Tensor:
        return self.inputs[split].argmax(dim=1)

    def steps(self, epoch: int) -> int:
        return -(-self.spec.sizes["train"] // self.batch_size)

    def train(self, *, epoch: int, start: int, shard: Shard) -> Iterator[list[Any]]:
        inputs, labels = self.inputs["train"], self.labels("train")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        for step in range(start, self.steps(epoch)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            index = [batch[part.start : part.stop] for part in shard.parts(len(batch))]
            yield [(inputs[i], labels[i]) for i in index]

    def evaluate(self, split: str, *, shard: Shard) -> Iterator[Any]:
        inputs, labels = self.inputs[split], self.labels(split)
        for batch in torch.arange(len(labels)).split(self.eval_batch_size):
            share = batch.tensor_split(shard.world)[shard.rank]
            if len(share):
                yield inputs[share], labels[share]


class Killed(BaseException):
    """The end of a process, as far as a test in one process can have it."""


class Killing(Vectors):
    """Vectors that end the run before global training step `step`, or in the middle of evaluation number `evaluation`.

    Evaluations of every split count, from 0.
    """

    def __init__(self, *, step: int | None = None, evaluation: int | None = None, batch_size: int = 4) -> None:
        super().__init__(count=3 * batch_size, batch_size=batch_size)
        self.step, self.evaluation, self.evaluations = step, evaluation, 0

    def train(self, *, epoch: int, start: int, shard: Shard) -> Iterator[list[Any]]:
        for i, batches in enumerate(super().train(epoch=epoch, start=start, shard=shard), start):
            if epoch * self.steps(epoch) + i == self.step:
                raise Killed
            yield batches

    def evaluate(self, split: str, *, shard: Shard) -> Iterator[Any]:
        batches = super().evaluate(split, shard=shard)
        yield next(batches)
        self.evaluations += 1
        if self.evaluations - 1 == self.evaluation:
            raise Killed
        yield from batches


class Classifier(nn.Module):
    """Encoder, equilibrium, head; with dropout and batch statistics before the equilibrium when asked."""

    def __init__(self, *, dropout: float = 0.0, batch_norm: bool = False, dim: int = 5) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, dim, dtype=DTYPE)
        self.norm = nn.BatchNorm1d(dim, dtype=DTYPE) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.cell = TanhMap(dim, radius=0.5, seed=3)
        self.deq = DEQ(solver=SOLVER, grad=GRAD, confirm=False)  # as the engine's own
        self.head = nn.Linear(dim, CLASSES, dtype=DTYPE)
        with torch.no_grad():
            for i, layer in enumerate((self.encoder, self.head)):
                layer.weight.copy_(randn(*layer.weight.shape, seed=10 + i))
                layer.bias.copy_(randn(*layer.bias.shape, seed=20 + i))

    def forward(self, x: Tensor, z0: Tensor | None = None) -> tuple[Tensor, tuple[Solution, ...]]:
        injection = self.dropout(self.norm(self.encoder(x)))
        start = torch.zeros_like(injection) if z0 is None else z0.expand_as(injection)
        solution = self.deq(self.cell.bind(injection), start)
        return self.head(solution.value), (solution,)


class WarmStart(Task):
    """Classification whose carry is the mean equilibrium of the batch before, where the next solve starts."""

    metric = "loss"
    mode = "min"

    def score(self, model: nn.Module, batch: Any, carry: Any) -> Score:
        inputs, labels = batch
        logits, solutions = model(inputs, carry)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        return Score(Tally(loss, len(labels)), solutions, solutions[0].z_star.mean(dim=0, keepdim=True))

    def report(self, tally: Tally) -> dict[str, float]:
        return {"loss": float(tally.loss_sum) / tally.count}


def budget(**changes: Any) -> Budget:
    """Return two epochs, evaluated at their ends, with a row for every step, but for `changes`."""
    usual = {"epochs": 2, "steps": None, "eval_every": None, "log_every": 1, "checkpoint_every": None}
    usual["keep_checkpoints"] = 2
    return Budget(**(usual | {"eval_splits": ("valid", "test")} | changes))


def trainer(folder: Path, **changes: Any) -> Trainer:
    """Return a trainer of the classifier on vectors, with the fields named in `changes` replaced."""
    torch.manual_seed(0)
    model = changes.setdefault("unwrapped", Classifier())
    usual = {
        "model": model,
        "task": ImageClassification(),
        "source": Vectors(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "schedule": Cosine(floor=0.01),
        "rules": Rules(solver=SOLVER, grad=GRAD, seed=0),
        "budget": budget(),
        "clipping": None,
        "monitor": None,
        "ema_decay": None,
        "shard": Shard(),
        "device": CPU,
        "precision": "fp32",
        "speed": Speed(compile=False, cuda_graph=False, kernels=False, padded=False, reason="a test"),
        "progress": False,
        "folder": folder,
        "config": "seed: 0\n",
        "differences": lambda text: [],
        "make_tracker": lambda fresh: DISABLED,
    }
    return Trainer(**(usual | changes))


def same(a: Any, b: Any) -> bool:
    """Return whether two nested structures hold the same numbers, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without what depends on the clock and on memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in lines]
