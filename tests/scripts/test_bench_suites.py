"""The suite's page pairs what belongs together, and a step that leaks is seen."""

import sys

import pytest
import torch

from models.mdeq.convolution import Padded, Plain
from phantom.engine.errors import ConfigError
from phantom.engine.measure.timing import StepTimer
from scripts.bench import measure, variants
from scripts.bench.growth import measure_growth
from scripts.reporting import benchmarks, suites

SMALL = ["model=mdeq_tiny", "batch=1", "size=4", "solver.max_steps=2"]
CPU = torch.device("cpu")


def row(label: str, role: str, *, total: float) -> dict:
    return {"label": label, "role": role, "peak_bytes": {"solver": int(100 * total)}, "syncs": {"solve": 0}}


def ratio(a: str, b: str, total: float, backward: float | None = None) -> dict:
    parts = {"total": total} | ({} if backward is None else {"backward": backward})
    return {"a": a, "b": b, **{k: {"median": v, "low": v - 0.1, "high": v + 0.1, "n": 9} for k, v in parts.items()}}


def test_a_page_pairs_ours_with_its_floor_its_peer_and_the_peers_own_ratio():
    result = {
        "about": {"machine": "A machine", "clock": "cpu time"},
        "rows": [row("upg k=5", "ours", total=1.0), row("torchdeq upg k=5", "torchdeq", total=2.0)],
        "ratios": {
            "overhead": [ratio("upg k=5", "floor of upg k=5", 1.05)],
            "speedup": [ratio("torchdeq upg k=5", "upg k=5", 1.9), ratio("torchdeq implicit", "implicit", 2.0)],
            "implicit": [
                ratio("implicit", "upg k=5", 1.5, 3.5),
                ratio("torchdeq implicit", "torchdeq upg k=5", 1.7, 5.5),
            ],
        },
    }
    page = suites.render("Page", [("Model", "1.4x", result)])
    assert "| Model | upg k=5 | 1.90 [1.80, 2.00] | 1.05 [0.95, 1.15] | 0.50 | 0 |" in page
    numbers = "1.50 [1.40, 1.60] | 3.50 [3.40, 3.60] | 1.70 [1.60, 1.80] | 5.50 [5.40, 5.60]"
    assert f"| Model | upg k=5 | {numbers} | 1.4x |" in page


def test_growth_counts_what_a_step_leaves_behind():
    kept = []
    rows = [measure.Row(s, variants.make(s, CPU), "ours") for s in variants.settings([*SMALL, "grad=upg,npg"])]
    honest = rows[1].variant.step

    def leaky(timer):
        kept.append(torch.zeros(1000))
        return honest(timer)

    rows[1].variant.step = leaky
    measure_growth(rows, 5, CPU)
    assert [r.facts["growth"]["tensors"] for r in rows] == [0, 5]
    assert [r.facts["growth"]["bytes"] for r in rows] == [0, 20_000]
    facts = [{"label": r.variant.label, "growth": r.facts["growth"]} for r in rows]
    table = benchmarks.growth_table({"rows": facts}).splitlines()
    assert table[-1].startswith(f"| {rows[1].variant.label} | 5 | +5 | +20000 | ")


def test_every_way_to_run_ours_has_the_same_peer():
    options = [
        "grad=implicit",
        "compile=true,false",
        "gradient_precision=null,bf16",
        "speed=off,padded",
        "precision=fp32",
    ]
    peers = [variants.for_peer(setting) for setting in variants.settings([*SMALL, *options])]
    assert len(peers) == 8 and all(peer.plan.config == peers[0].plan.config for peer in peers)


def test_forms_of_the_cell_are_variants_beside_the_plain_one():
    made = {s.label: variants.make(s, CPU) for s in variants.settings([*SMALL, "k=2", "speed=off,padded"])}
    forms = {label: type(variant.model.cell.post_fuse[0].convolution) for label, variant in made.items()}
    assert forms == {"upg k=2 speed=off": Plain, "upg k=2 speed=padded": Padded}
    losses = [float(variant.step(StepTimer(CPU)).tally.loss_sum) for variant in made.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_form_that_the_cell_does_not_have_is_refused():
    (setting,) = variants.settings(["model=ignn", "size=5", "batch=2", "classes=2", "speed=padded"])
    with pytest.raises(ConfigError, match="speed=padded needs a model whose cell has that form"):
        variants.make(setting, CPU)


def test_kernels_without_triton_are_refused_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    (setting,) = variants.settings([*SMALL, "speed=kernels"])
    with pytest.raises(ConfigError, match="the kernels need Triton"):
        variants.make(setting, CPU)
