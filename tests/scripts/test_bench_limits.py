"""FLOPs and bytes of operators are those counted by hand, and a page holds them against what a card can do."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scripts import benchmark
from scripts.bench import measure, variants
from scripts.bench.instruments import Tracer
from scripts.reporting import benchmarks, limits

FLOAT = 4  # bytes
SMALL = ["model=mdeq_tiny", "batch=1", "size=4", "solver.max_steps=2", "precision=fp32"]
CPU = torch.device("cpu")


def counted(call) -> Tracer:
    with Tracer() as tracer:
        call()
    return tracer


def test_a_convolution():
    """Two images of 3 x 8 x 8, four kernels of 3 x 3 x 3 with a padding of one: 27 multiply-adds an output."""
    conv, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 8, 8)
    outputs, inputs, weights = 2 * 4 * 64, 2 * 3 * 64, 4 * 27
    tracer = counted(lambda: conv(x))
    assert tracer.flops == {"float32": 2 * 27 * outputs}
    assert tracer.moved == FLOAT * (inputs + weights + 4 + outputs)
    loss = conv(x).sum()
    # the gradient of the weights alone, as x needs none: it reads that of the output, x and the weights, and writes two
    backward = counted(loss.backward)
    assert backward.flops == {"float32": 2 * 27 * outputs}
    # that of a sum is one number, broadcast: it is written, and read by what makes the gradients
    assert backward.moved == FLOAT * (inputs + weights + weights + 4 + 2)


def test_a_matrix_product_by_number_format():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    tracer = counted(lambda: a @ b)
    assert tracer.flops == {"float32": 2 * 3 * 5 * 7} and tracer.moved == FLOAT * (15 + 35 + 21)
    half = counted(lambda: a.bfloat16() @ b.bfloat16())
    assert half.flops == {"bfloat16": 210}
    assert half.moved == (FLOAT + 2) * (15 + 35) + 2 * (15 + 35 + 21), "two casts and the product"
    out = torch.empty(3, 7)
    assert counted(lambda: torch.mm(a, b, out=out)).moved == FLOAT * (15 + 35 + 21), "what is overwritten is not read"


@pytest.mark.parametrize(
    ("call", "elements"),
    [
        (lambda a, b: a + b, 30),
        (lambda a, b: a.add_(b), 30),  # a is read and written
        (lambda a, b: torch._foreach_add_([a, a], [b, b]), 60),
        (lambda a, b: a.copy_(b), 20),
        (lambda a, b: a.zero_(), 10),
        (lambda a, b: a.t().view(10)[2:], 0),
        (lambda a, b: torch.empty_like(a), 0),
        (lambda a, b: a[:5] * 2, 10),
        (lambda a, b: b[:1].expand(10) + a, 1 + 10 + 10),
    ],
)
def test_bytes_by_the_rule(call, elements):
    assert counted(lambda: call(torch.ones(10), torch.ones(10))).moved - 2 * 10 * FLOAT == FLOAT * elements


def test_a_gather_reads_what_it_returns():
    table, index = torch.ones(1000, 8), torch.tensor([3, 5])
    assert counted(lambda: nn.functional.embedding(index, table)).moved == 2 * FLOAT * 16 + 2 * 8
    assert counted(lambda: table[index]).moved == 2 * FLOAT * 16 + 2 * 8


@pytest.mark.parametrize("grad", ["upg", "implicit"])
def test_the_flops_of_a_step_are_those_of_torchs_own_counter(grad):
    (setting,) = variants.settings([*SMALL, f"grad={grad}"])
    variant = variants.make(setting, CPU)
    found = measure.trace(variant)
    with FlopCounterMode(display=False) as counter:
        variant.step(Tracer())
    assert found["flops"] == {"float32": counter.get_total_flops()} and found["moved_bytes"] > 1e6
    compiled = variants.settings([*SMALL, f"grad={grad}", "compile=true"])[0]
    work = measure.eager_work(compiled, CPU)
    assert work == {key: found[key] for key in ("flops", "moved_bytes", "precision")}


CARD = limits.Card(bandwidth=1e12, flops={"fp32": 1e12, "tf32": 4e12, "bf16": 8e12})


def row(**changes) -> dict:
    seconds = {"total": {"median": 0.01}}
    return {"label": "a", "seconds": seconds, "precision": "tf32", "moved_bytes": 10**9} | changes


def test_the_limit_is_that_of_flops_or_of_bytes(monkeypatch):
    monkeypatch.setitem(limits.CARDS, "a card", CARD)
    steps = [
        row(flops={"float32": 8 * 10**9, "bfloat16": 8 * 10**9}),  # 2 + 1 ms, and 1 ms of bytes
        row(flops={"float32": 8 * 10**9}, precision="fp32"),  # 8 ms
        row(flops={"float32": 10**9}, precision="bf16", moved_bytes=5 * 10**9),  # 0.25 ms, and 5 ms of bytes
        row(flops={"float64": 1}),
    ]
    _, about, table = limits.blocks({"about": {"machine": "a card"}, "rows": [*steps, {"label": "a floor"}]})
    assert "1 TB/s, fp32 1 TFLOP/s, tf32 4 TFLOP/s, bf16 8 TFLOP/s." in about
    (_, _, summary) = limits.of_a_suite([("one", {"about": {"machine": "a card"}, "rows": steps[:1]})])
    assert summary.splitlines()[2:] == ["| one | a | 16 | 1 | 3 | 1 | 10 | 30.0 |"]
    assert limits.of_a_suite([("one", {"about": {"machine": "another"}, "rows": steps})]) == []
    assert table.splitlines()[2:] == [
        "| a | 16 | 1 | 3 | 1 | 10 | 30.0 |",
        "| a | 8 | 1 | 8 | 1 | 10 | 80.0 |",
        "| a | 1 | 5 | 0.25 | 5 | 10 | 50.0 |",
        "| a | 1e-09 | 1 | -- | -- | 10 | -- |",
    ]


def test_of_an_unknown_card_the_page_says_so(tmp_path):
    items = [*SMALL, "repeats=1", "warmup=0", "clock=cpu", "device=cpu", f"out={tmp_path / 'a.json'}"]
    result = benchmark.main(items)
    text = benchmarks.render(result)
    assert "## Limits of the card" in text and "No limit is shown: " in text
    lines = text[text.index("No limit is shown") :].splitlines()
    cells = next(line.split("|") for line in lines if line.startswith("| upg k=5 | "))
    assert cells[4].strip() == cells[5].strip() == cells[7].strip() == "--" and float(cells[2]) > 0
    assert (
        limits.blocks({"about": {"machine": "NVIDIA H200"}, "rows": [{"label": "counted by an earlier version"}]}) == []
    )


def test_cards_are_those_of_the_data_sheets():
    """Dense peaks: half of those that Hopper's sheets print, which count pruned weights."""
    h200, a100 = limits.CARDS["NVIDIA H200"], limits.CARDS["NVIDIA A100-SXM4-80GB"]
    assert (h200.bandwidth, h200.flops["tf32"], h200.flops["bf16"]) == (4.8e12, 494.5e12, 989.5e12)
    assert (a100.bandwidth, a100.flops["fp32"], a100.flops["bf16"]) == (2.039e12, 19.5e12, 312e12)
