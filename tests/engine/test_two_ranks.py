"""Two processes train as one does on the same global batches, and resume as they were."""

import shutil

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from phantom.engine.artifacts import checkpoint
from phantom.engine.errors import CheckpointError
from phantom.engine.training.evaluation import evaluate
from phantom.layers import variational_mask
from tests.engine import tiny, two_ranks

EQUAL = 1e-10
# not num_evals: a batch is evaluated until its last problem has converged, and each rank has a batch of its own
NUMBERS = {
    *("step", "epoch", "loss", "accuracy", "gradient_norm", "lr", "penalty"),
    *("residual", "num_steps", "converged", "diverged"),
}

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(two_ranks.main, args=(2, folder), nprocs=2)
    return folder


def numbers(folder) -> list[dict]:
    return [{key: row[key] for key in NUMBERS & row.keys()} for row in tiny.rows(folder)]


@pytest.mark.parametrize("micro", [1, 2])
def test_two_ranks_equal_one_process(folder, tmp_path, micro):
    two_ranks.exact(tmp_path, 0, 1, micro=1)
    one, two = (checkpoint.load(each / "last.pt") for each in (tmp_path, folder / f"exact{micro}"))
    assert one["step"] == two["step"] == 9
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=EQUAL, atol=EQUAL, msg=name)
    start = two_ranks.trainer(tmp_path, 0, 1, noisy=False, count=11).unwrapped.state_dict()
    assert all((start[name] - weight).abs().max() > 1e-4 for name, weight in one["model"].items())
    for a, b in zip(numbers(tmp_path), numbers(folder / f"exact{micro}"), strict=True):
        assert b == pytest.approx(a, rel=EQUAL)


def test_a_step_counts_the_items_of_all_ranks(folder, tmp_path):
    """Eleven items in three steps, of which the first rank has six."""
    assert (folder / "exact1" / "items").read_text() == "[4, 4, 3, 4, 4, 3, 4, 4, 3]"


def test_no_rank_leaves_before_the_checkpoint_is_written(folder):
    """Where one has left, srun and torchrun may end the one that writes."""
    assert [(folder / "stopped" / f"left{rank}").read_text() for rank in (0, 1)] == ["True", "True"]
    assert 2 < checkpoint.load(folder / "stopped" / "last.pt")["step"] < 6


def test_a_batch_too_small_to_share_is_left_out_by_all(folder):
    assert checkpoint.load(folder / "short" / "last.pt")["step"] == 9
    steps = [row["step"] for row in tiny.rows(folder / "short") if row["kind"] == "train"]
    assert steps == [1, 2, 4, 5, 7, 8]  # every third batch has one example


@pytest.mark.parametrize("step", [3, 5])
def test_resumed_ranks_are_the_unbroken_ones(folder, step):
    """Each rank has its own dropout masks and carries; with one rank's state for both the runs would part."""
    expected = checkpoint.load(folder / "interruptedNone" / "last.pt")
    first, second = expected["ranks"]
    assert not tiny.same(first["rng"], second["rng"]) and not tiny.same(first["carries"], second["carries"])
    found = checkpoint.load(folder / f"interrupted{step}" / "last.pt")
    for key in expected.keys() - tiny.CLOCKED:
        assert tiny.same(found[key], expected[key]), key
    assert tiny.rows(folder / f"interrupted{step}") == tiny.rows(folder / "interruptedNone")


def test_one_process_goes_on_where_two_stopped(folder, tmp_path):
    """As one process would have from the start; what cannot be shared is refused, and left as it is."""
    two_ranks.exact(tmp_path / "whole", 0, 1, micro=1)
    shutil.copytree(folder / "exact1", tmp_path / "parts")
    for name, epochs in (("whole", 5), ("parts", 5)):
        two_ranks.trainer(
            tmp_path / name, 0, 1, noisy=False, count=11, budget=tiny.budget(epochs=epochs, checkpoint_every=2)
        ).fit(resume=True)
    whole, parts = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 15 and len(parts["ranks"]) == 1
    for name, weight in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], weight, rtol=EQUAL, atol=EQUAL, msg=name)
    run = two_ranks.trainer(folder / "interruptedNone", 0, 1, noisy=True, task=tiny.WarmStart(), micro=2)
    with pytest.raises(
        CheckpointError, match=r"written by 2 process.*this run has 1.*carry_rows\): resume with 2.*never"
    ):
        run.fit(resume=True)


@pytest.mark.parametrize("ema", [None, 0.7])
def test_all_ranks_evaluate_the_same_batch_statistics(folder, ema):
    """Each rank gathers its own; every rank evaluates the weights that the checkpoint holds."""
    folder = folder / f"statistics{ema}"
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    assert ranks[0]["buffers"]["norm.running_mean"].abs().max() > 0.01
    assert tiny.same(ranks[0]["buffers"], ranks[1]["buffers"])
    state = checkpoint.load(folder / "last.pt")
    alone = two_ranks.trainer(folder, 0, 1, noisy=True)
    alone.unwrapped.load_state_dict(state["model"] if ema is None else state["ema"])
    for split in ("valid", "test"):
        metrics = evaluate(
            alone.unwrapped, alone.task, alone.source, split, shard=alone.shard, device=tiny.CPU, precision="fp32"
        )
        for name in ("loss", "accuracy"):
            assert ranks[0]["final"][split][name] == ranks[1]["final"][split][name]
            assert ranks[0]["final"][split][name] == pytest.approx(metrics[name], rel=EQUAL)


def test_ranks_stop_at_a_target_together(folder, tmp_path):
    """At the step at which one process does, before the end, with the same metrics."""
    ranks = [torch.load(folder / "target" / f"rank{rank}.pt") for rank in range(2)]
    assert tiny.same(*ranks)
    (tmp_path / "alone").mkdir()
    two_ranks.target(tmp_path / "alone", 0, 1)
    alone = torch.load(tmp_path / "alone" / "rank0.pt")
    assert alone["reached"] and 1 < alone["step"] == ranks[0]["step"] < 30
    assert ranks[0]["best"]["valid"]["accuracy"] == pytest.approx(alone["best"]["valid"]["accuracy"], rel=EQUAL)


def test_a_rank_without_an_example_knows_what_the_others_found(folder, tmp_path):
    alone = two_ranks.trainer(tmp_path, 0, 1, noisy=False, count=1)
    options = {"shard": alone.shard, "device": tiny.CPU, "precision": "fp32"}
    expected = evaluate(alone.unwrapped, alone.task, alone.source, "test", **options)
    for rank in range(2):
        assert torch.load(folder / "one" / f"rank{rank}.pt") == pytest.approx(expected, rel=EQUAL)


def test_ranks_drop_units_of_their_own(folder):
    """A run has one seed, and the mask that a rank draws next is not the one that the other draws."""
    (last,) = (folder / "command_line").rglob("last.pt")
    masks = []
    with torch.random.fork_rng(devices=[]):
        for own in checkpoint.load(last)["ranks"]:
            checkpoint.set_rng_state(own["rng"], tiny.CPU)
            masks.append(variational_mask((4, 8, 1, 1), p=0.5, training=True, device=tiny.CPU, dtype=torch.float32))
    assert len(masks) == 2 and not torch.equal(*masks)
