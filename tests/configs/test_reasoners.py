"""The published settings of the recursive reasoners have the parameter counts of the official classes."""

import pytest
import torch

from phantom.engine.build import build_model
from phantom.engine.source import Spec
from tests.plans import plan

SUDOKU = {"vocab_size": 11, "height": 9, "width": 9}
MAZE = {"vocab_size": 6, "height": 30, "width": 30}
EQR_MAZE = ("model.cell.stack.block.num_heads=8", "model.d_model=128", "model.cell.stack.num_layers=1")


@pytest.mark.parametrize(
    ("leaf", "inputs", "overrides", "count"),
    [
        ("reasoner_trm", SUDOKU, (), 5_028_866),
        ("reasoner_trm", MAZE, (), 18_795_522),
        ("reasoner_trm_attention", SUDOKU, (), 6_828_034),
        ("reasoner_trm_attention", MAZE, ("model.cell.num_fast=4",), 6_822_914),
        ("reasoner_hrm", SUDOKU, (), 27_275_266),
        ("reasoner_hrm", MAZE, (), 27_270_146),
        ("reasoner_eqr", SUDOKU, (), 4_855_298),
        ("reasoner_trm_attention", MAZE, ("model.prefix_tokens=0", "model.positions=rope2d", *EQR_MAZE), 263_938),
        ("reasoner_trm_attention", SUDOKU, ("model.prefix_tokens=0", "model.positions=rope2d"), 6_828_034),
    ],
)
def test_parameters_of_the_published_settings(leaf, inputs, overrides, count):
    made = plan([f"model={leaf}", "data=sudoku", "solver=rollout", *overrides])
    with torch.device("meta"):
        model = build_model(made, Spec(kind="puzzle_solving", inputs=inputs, sizes={}))
    assert model.official_parameter_count == count
    prefix = 0 if model.prefix is None else 512
    assert sum(p.numel() for p in model.parameters()) == count + prefix
