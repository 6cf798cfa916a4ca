"""A run on PPI-shaped graphs says, per block, how the solves went; its presets compose; every estimator trains it."""

import json

import pytest

from phantom.engine.artifacts import checkpoint
from phantom.engine.build import build_trainer
from phantom.engine.errors import DivergenceError
from tests.plans import plan

SMALL = [
    *("data.scale=0.01", "model.node_labelling.widths=[8,6]", "epochs=1", "steps=2", "data.batch_size=10"),
    *("wandb=disabled", "progress=false"),
]


def trainer(folder, *overrides: str):
    job = [*SMALL, f"runs={folder}", *overrides]
    return build_trainer(plan(job))


def rows(run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("max_steps", [1, 100])
def test_every_block_is_logged(tmp_path, max_steps):
    run = trainer(tmp_path, "experiment=ppi_synthetic/upg_k5_lam0.5", f"solver.max_steps={max_steps}", "log_every=1")
    run.fit(resume=False)
    logged = rows(run)
    assert [row["kind"] for row in logged] == ["train", "train", "eval"]
    for row in logged:
        for block in range(3):
            assert row[f"state_rms/{block}"] > 0 and row[f"residual/{block}"] > 0
            assert row[f"converged/{block}"] == (max_steps > 1) and row[f"diverged/{block}"] == 0
            assert (row[f"num_steps/{block}"] == 1) == (max_steps == 1)
    shares = logged[-1]
    assert 0 <= shares["micro_f1"] <= 100 and 30 < shares["baseline"] < 60


@pytest.mark.parametrize("grad", ["implicit", "upg", "npg", "one_step", "shine", "bptt"])
def test_every_estimator_moves_every_block(tmp_path, grad):
    solver = ["solver=broyden"] if grad == "shine" else []
    run = trainer(tmp_path, "experiment=ppi_synthetic/implicit", f"grad={grad}", *solver)
    before = {name: value.clone() for name, value in run.unwrapped.state_dict().items()}
    run.fit(resume=False)
    moved = {name for name, value in run.unwrapped.state_dict().items() if not (value == before[name]).all()}
    assert moved == {name for name, parameter in run.unwrapped.named_parameters() if parameter.requires_grad}


def test_the_presets_for_a_steadier_run(tmp_path):
    run = trainer(
        tmp_path,
        *("experiment=table4/ppi_upg_k5_lam0.5", "data=ppi_synthetic", "model=ignn_spectral", "clipping=total"),
        *("solver.stop=relative", "solver.norm=l2", "solver.tol=1e-4"),
    )
    run.fit(resume=False)
    assert rows(run)[-1]["converged"] == 1


def test_a_diverging_run_stops_with_its_last_good_checkpoint(tmp_path):
    """Weights of 10^30 overflow on the way through the blocks: named at the first log row, the checkpoint kept."""
    run = trainer(tmp_path, "experiment=ppi_synthetic/upg_k5_lam0.5", "checkpoint_every=1", "optimizer.lr=1e30")
    with pytest.raises(DivergenceError, match=r"stopped being finite at step 2 .*last\.pt.*optimizer\.lr"):
        run.fit(resume=False)
    assert checkpoint.load(run.folder / "last.pt")["step"] == 1
