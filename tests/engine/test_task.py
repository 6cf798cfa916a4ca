"""Sums are divided once: metrics do not depend on how examples were cut into batches."""

import json
import math
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from phantom.engine.config import compatibility
from phantom.engine.errors import ConfigError
from phantom.engine.tasks.base import Tally
from phantom.engine.tasks.images import ImageClassification
from phantom.engine.training.evaluation import batch_to, evaluate
from tests.engine import tiny
from tests.phantom.problems import DTYPE, randn

OPTIONS = {"shard": tiny.Shard(), "device": tiny.CPU, "precision": "fp32"}


def tally(loss: float, count: int, **sums: float) -> Tally:
    values = {name: torch.tensor(value, dtype=DTYPE) for name, value in sums.items()}
    return Tally(torch.tensor(loss, dtype=DTYPE), count, values)


def test_tallies_add():
    total = tally(1.5, 3, correct=2.0) + tally(0.25, 1, correct=1.0)
    assert (float(total.loss_sum), total.count, float(total.sums["correct"])) == (1.75, 4, 3.0)
    alone = total.all_reduce()  # a single process
    assert alone is total


def test_tallies_of_different_tasks_do_not():
    with pytest.raises(ValueError, match=r"different tasks cannot add: \['correct'\] and \['hits'\]"):
        tally(1.0, 1, correct=1.0) + tally(1.0, 1, hits=1.0)


def test_detached_sums_are_exact_over_many_batches():
    """In float32 a sum of 2^24 loses every further 1."""
    half = Tally(torch.tensor(2.0**24, requires_grad=True), 1, {"n": torch.tensor(2**24)}).detach()
    one = Tally(torch.tensor(1.0), 1, {"n": torch.tensor(1)}).detach()
    total = half + one
    assert float(total.loss_sum) == float(total.sums["n"]) == 2**24 + 1
    assert not total.loss_sum.requires_grad


class Logits(nn.Module):
    """Hand the given logits through, without a solve."""

    def forward(self, x):
        return x, ()


def test_classification_against_a_plain_computation():
    logits, labels = randn(7, 4, seed=1), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    losses, hits = [], 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        losses.append(math.log(sum(math.exp(value) for value in row)) - row[label])
        hits += row.index(max(row)) == label
    task = ImageClassification()
    metrics = task.report(task.score(Logits(), (logits, labels), None).tally)
    assert metrics == {"loss": pytest.approx(sum(losses) / 7), "accuracy": pytest.approx(100 * hits / 7)}
    assert 0 < hits < 7


def test_the_loss_of_low_precision_logits_is_computed_in_float32():
    logits, labels = (10 * randn(64, 10, seed=2)).bfloat16(), torch.arange(64) % 10
    score = ImageClassification().score(Logits(), (logits, labels), None)
    exact = nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
    assert score.tally.loss_sum.dtype == torch.float32
    torch.testing.assert_close(score.tally.loss_sum.double(), exact, rtol=1e-6, atol=0)


def whole_split(model: nn.Module, source: tiny.Vectors, split: str) -> dict[str, float]:
    with torch.no_grad():
        logits, _ = model.eval()(source.inputs[split])
    labels = source.labels(split)
    return {
        "loss": float(nn.functional.cross_entropy(logits, labels)),
        "accuracy": 100 * float((logits.argmax(dim=1) == labels).double().mean()),
    }


@pytest.mark.parametrize("size", [1, 5, 6, 11, 100])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluation_does_not_depend_on_the_batch_size(size, split):
    source = tiny.Vectors(count=11, eval_batch_size=size)
    model = tiny.Classifier(dropout=0.5, batch_norm=True)
    found = evaluate(model, ImageClassification(), source, split, **OPTIONS)
    whole = whole_split(model, source, split)
    assert {name: found[name] for name in whole} == pytest.approx(whole, rel=1e-12)
    one = evaluate(model, ImageClassification(), tiny.Vectors(count=11, eval_batch_size=11), split, **OPTIONS)
    for name in ("residual", "num_steps", "converged", "diverged"):
        assert found[name] == pytest.approx(one[name], rel=1e-9, abs=1e-15), name


@pytest.mark.parametrize("training", [False, True])
def test_evaluation_leaves_the_model_as_it_was(training):
    model = tiny.Classifier(dropout=0.5, batch_norm=True).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    evaluate(model, ImageClassification(), tiny.Vectors(), "test", **OPTIONS)
    assert model.training is model.norm.training is training
    assert tiny.same(dict(model.state_dict()), before) and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_is_restored_after_a_failure():
    class Failing(ImageClassification):
        def score(self, model, batch, carry):
            assert not model.training and not torch.is_grad_enabled()
            raise RuntimeError("out of memory")

    model = tiny.Classifier().train()
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(model, Failing(), tiny.Vectors(), "test", **OPTIONS)
    assert model.training


class AttrDict(dict):
    pass


class Rows(list):
    pass


def test_the_carry_goes_from_batch_to_batch_and_starts_empty():
    seen = []

    class Watched(tiny.WarmStart):
        def score(self, model, batch, carry):
            score = super().score(model, batch, carry)
            seen.append((carry, score.carry))
            return score

    for _ in range(2):
        evaluate(tiny.Classifier(), Watched(), tiny.Vectors(), "test", **OPTIONS)
    given, returned = zip(*seen, strict=True)
    assert given[0] is None and given[3] is None and len(seen) == 6
    assert given[1] is returned[0] and given[2] is returned[1]


@pytest.mark.parametrize("batches", [(), [(torch.zeros(0, 3, dtype=DTYPE), torch.zeros(0, dtype=torch.int64))]])
def test_a_split_without_a_batch_is_an_error(batches):
    """An empty tensor that is cut into batches is one batch, of nothing."""

    class Empty(tiny.Vectors):
        def evaluate(self, split, *, shard):
            return iter(batches)

    with pytest.raises(ValueError, match="'test' has no batch: use another split, or more data"):
        evaluate(tiny.Classifier(), ImageClassification(), Empty(), "test", **OPTIONS)


def test_batches_of_any_form_are_moved():
    class Graph:
        def to(self, device, non_blocking):
            return ("moved", device.type)

    tensor = torch.zeros(2)
    moved = batch_to({"a": (tensor, [Graph()]), "b": 3}, torch.device("meta"))
    pair = namedtuple("Pair", "a b")(tensor, 3)
    assert batch_to(pair, torch.device("meta"))._fields == ("a", "b")
    for kind, content in ((AttrDict, {"a": tensor}), (Rows, [tensor])):
        found = batch_to(kind(content), torch.device("meta"))
        assert type(found) is kind and next(iter(found.values() if kind is AttrDict else found)).is_meta
    assert moved["a"][0].device.type == "meta" and moved["a"][1] == [("moved", "meta")] and moved["b"] == 3


def test_sums_of_any_shape_add_over_ranks(tmp_path, monkeypatch):
    """Two ranks of the same numbers; torch's own all_reduce needs two processes."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda packed: packed.mul_(2))
    sums = {"classes": torch.arange(3.0), "table": torch.ones(2, 2), "one": torch.tensor(5.0)}
    total = Tally(torch.tensor(1.5), 4, sums).detach().all_reduce()
    assert (total.count, float(total.loss_sum)) == (8, 3.0) and total.sums.keys() == sums.keys()
    assert all(torch.equal(total.sums[name], 2 * value.double()) for name, value in sums.items())


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"loss": 1.0}, "must give 'accuracy', its metric; it gives loss"),
        ({"loss": 1.0, "accuracy": torch.zeros(2)}, "must give numbers, got accuracy=tensor"),
    ],
)
def test_a_report_that_cannot_be_used(report, message):
    class Wrong(ImageClassification):
        def report(self, tally):
            return report

    with pytest.raises(ConfigError, match=message):
        evaluate(tiny.Classifier(), Wrong(), tiny.Vectors(), "test", **OPTIONS)


def test_a_report_of_tensors_is_one_of_numbers():
    class Tensors(ImageClassification):
        def report(self, tally):
            return {"loss": tally.loss_sum, "accuracy": np.float32(7)}

    found = evaluate(tiny.Classifier(), Tensors(), tiny.Vectors(), "test", **OPTIONS)
    assert type(found["loss"]) is float and found["accuracy"] == 7.0 and json.dumps(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "maximum"}, "mode='maximum' is not known; choose one of max, min"),
        ({"mode": None}, "must set mode"),
        (None, "must name a class that inherits from phantom.engine.tasks.Task"),
    ],
)
def test_a_task_of_ones_own_that_is_none(monkeypatch, changes, message):
    class Own(ImageClassification):
        kind, mode = "own", "max"

    for name, value in (changes or {}).items():
        monkeypatch.setattr(Own, name, value)
        if value is None:
            monkeypatch.delattr(Own, name)
            monkeypatch.delattr(ImageClassification, name)
    source = type("Own", (tiny.Vectors,), {"kind": "own", "task": "own.Task"})
    found = {"own.Source": source, "own.Task": Own if changes is not None else dict}
    monkeypatch.setattr(compatibility, "locate", found.__getitem__)
    with pytest.raises(ConfigError, match=message):
        compatibility.find_task({"data": {"_target_": "own.Source"}})
