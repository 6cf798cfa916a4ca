"""The benchmark's language variants: random segments, a full memory, and the work that is counted."""

import pytest
import torch

from phantom.engine.errors import ConfigError
from phantom.engine.measure.timing import StepTimer
from scripts.bench import measure, ratios, variants
from scripts.bench.unhoisted import UnhoistedCell

SMALL = [
    "model=deq_transformer_small",
    "model.d_model=16",
    "model.num_heads=2",
    "model.d_inner=32",
    "model.cutoffs=[20]",
    "model.mem_len=13",
    "solver=anderson",
    "solver.max_steps=4",
    "batch=3",
    "size=5",
    "classes=50",
]


def make(*overrides: str) -> variants.Variant:
    (setting,) = variants.settings([*SMALL, *overrides])
    return variants.make(setting, torch.device("cpu"))


def test_segments_and_a_full_memory():
    variant = make()
    tokens, targets = variant.batch
    assert tokens.shape == targets.shape == (3, 5)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert [tuple(part.shape) for part in variant.carry] == [(3, 13, 16), (3, 13, 48)]
    assert not any(part.requires_grad for part in variant.carry)
    assert make("model.mem_len=0").carry is None


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.norm=post"],
        ["model.norm=pre", "model.attention_dropout=0.1"],
        ["model.norm=pre", "model.preln_residual=plain", "model.window=7"],
    ],
)
def test_the_cell_without_hoisting_gives_the_same_loss_and_gradients(overrides):
    hoisted, plain = make(*overrides), make(*overrides, "hoist=false")
    assert isinstance(plain.model.cell, UnhoistedCell) and not isinstance(hoisted.model.cell, UnhoistedCell)
    found = []
    for variant in (hoisted, plain):
        variant.model.double()
        torch.manual_seed(1)  # the same dropout masks
        carry = tuple(part.double() for part in hoisted.carry)
        nll, _, _ = variant.model(*variant.batch, carry)
        nll.sum().backward()
        found.append([nll, *(p.grad for p in variant.model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_hoisting_is_a_matter_of_the_transformer():
    with pytest.raises(ConfigError, match="hoist=false"):
        make("hoist=false", "compile=true")


def test_a_step_counts_tokens_and_evaluations():
    variant = make("grad=upg", "k=3")
    score = variant.step(StepTimer(torch.device("cpu")))
    facts = measure.facts_of(variant, score, variants.work_of(variant, score))
    assert (facts["items"], facts["evals"], facts["graph_evals"], facts["vjps"]) == (15, 5, 3, 0)
    assert measure.trace(variant)["traced_evals"] == 8


def test_the_ratio_of_hoisting_pairs_rows_that_differ_in_nothing_else():
    rows = []
    for setting in variants.settings([*SMALL, "grad=upg,implicit", "hoist=true,false"]):
        row = measure.Row(setting, variants.make(setting, torch.device("cpu")), "ours", times=[{"rest": 1.0}])
        row.floor = row
        rows.append(row)
    pairs = [(item["a"], item["b"]) for item in ratios.ratios(rows)["hoisting"]]
    assert pairs == [(f"{name} hoist=False", f"{name} hoist=True") for name in ("upg k=5", "implicit")]
