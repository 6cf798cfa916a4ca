"""The benchmark's language variants: random segments, a full memory, and the work that is counted."""

import torch

from scripts.bench import measure, variants

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


def test_a_step_counts_tokens_and_evaluations():
    variant = make("grad=upg", "k=3")
    score = variant.step(measure._no_phase)
    facts = measure.facts_of(variant, score, variants.work_of(variant, score))
    assert (facts["items"], facts["evals"], facts["graph_evals"], facts["vjps"]) == (15, 5, 3, 0)
    assert measure.trace(variant)["traced_evals"] == 8
