"""The numbers of the leaves of the recursive reasoners, written down a second time, each with its source."""

from typing import Any


def reasoner(
    *,
    heads: int | None = None,
    d_model: int = 512,
    prefix: int = 16,
    fast: int = 6,
    layers: int = 2,
    multiple: int = 256,
    shared: bool = True,
    lam: float = 1.0,
    halting: str = "halt",
    **changes: Any,
) -> dict[str, Any]:
    """Return the numbers of a reasoner; `heads`: of attention, without it the block is a mixer."""
    attention = {"class": "AttentionBlock", "num_heads": heads} if heads else {"class": "MixerBlock"}
    block = {**attention, "expansion": 4, "multiple": multiple}
    usual = {
        "class": "Reasoner",
        **{"d_model": d_model, "prefix_tokens": prefix, "positions": "rope" if heads else "none"},
        **{"start": "fixed", "noise": 0.0, "differentiate": "cycle"},
        "cell": {
            **{"class": "TwoSpeeds", "num_fast": fast, "shared": shared, "lam": lam},
            "stack": {"class": "Stack", "num_layers": layers, "block": block},
        },
        "supervision": {
            **{"class": "Supervision", "steps": 16, "halting": halting, "exploration": 0.1, "loss": "stablemax"},
            **{"eval_steps": None, "restarts": 1},
        },
    }
    return usual | changes


MODELS = {
    # Jolicoeur-Martineau 2025 and its official code: the mixer on Sudoku, attention on mazes
    "reasoner_trm": reasoner(),
    "reasoner_trm_attention": reasoner(heads=8),
    # Wang et al. 2025: two networks of four blocks, two fast calls
    "reasoner_hrm": reasoner(
        heads=8, prefix=1, fast=2, layers=4, shared=False, halting="halt_or_continue", differentiate="pair"
    ),
    # EqR: damped calls, noise and random starts
    "reasoner_eqr": reasoner(prefix=0, lam=0.95, start="random", noise=0.01),
    # ours
    "reasoner_small": reasoner(d_model=32, prefix=0, fast=2, multiple=16),
}
GENERATED = {
    **{"num_train": 2000, "num_valid": 0, "num_test": 500, "generation_seed": 0},
    **{"batch_size": 64, "eval_batch_size": 250, "passes": 16, "augment": True},
}
DATA = {
    # ours
    "sudoku": {"class": "Sudoku", "size": 4, "clues": [5, 7], **GENERATED},
    "maze": {"class": "Mazes", "size": 9, "path": [6, 20], **GENERATED},
    # the protocol of HRM and TRM on Sudoku-Extreme: 1,000 training puzzles, batches of 768
    "sudoku_files": {
        **{"class": "SudokuFiles", "size": 9, "train_file": "train.csv", "test_file": "test.csv"},
        **{"num_train": 1000, "num_test": None, "draw_seed": 42},
        **{"batch_size": 768, "eval_batch_size": 768, "passes": 1000, "augment": True},
    },
}
COURSES = {
    # Huginn: 1 + Poisson(rate), log rate ~ N(log 32 - 1/8, 1/2)
    "random_depth": {
        **{"class": "Course", "k": None, "lam": None},
        "depth": {"class": "RandomDepth", "mean": 33, "sigma": 0.5},
    },
    # HRM-Text: k from 2 to 5 over the first fifth
    "warm_up_k": {
        **{"class": "Course", "lam": None},
        "k": {"class": "Ramp", "first": 2, "last": 5, "steps": 1000, "of_steps": 5000},
        "depth": {"class": "Ramp", "first": 8, "last": 8, "steps": 1, "of_steps": None},
    },
}
ROLLOUT = {"class": "Rollout", "max_steps": 3, "tol": None, "lam": 1.0}
