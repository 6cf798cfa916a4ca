"""The language-modelling task on the embedded corpus: perplexity, the memory as carry, resume, ranks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate as evaluate_script
from data.text.pydocs import PyDocs
from models.deq_transformer.model import DEQTransformer
from phantom import DEQ, UPG, Broyden
from phantom.engine import rebuild
from phantom.engine.artifacts import identity
from phantom.engine.build import build_trainer
from phantom.engine.source import Shard
from phantom.engine.tasks.base import Tally
from phantom.engine.tasks.language import LanguageModelling
from phantom.engine.training import loop
from phantom.engine.training.evaluation import evaluate
from phantom.engine.training.loop import Budget
from tests.plans import plan, trained
from train import CONFIGS

TINY = (
    "model=deq_transformer_small",
    "model.d_model=16",
    "model.num_heads=2",
    "model.d_inner=32",
    "model.mem_len=16",
    "model.eval_mem_len=16",
    "data=pydocs",
    "data.streams=4",
    "data.segment=16",
    "solver=anderson",
    "solver.max_steps=5",
    "solver.tol=null",
    "optimizer=adam",
    "clipping=total",
    "clipping.max_norm=0.25",
    "eval_splits=[test]",
    "wandb=disabled",
    "progress=false",
    "log_every=1",
)


def make(**options) -> DEQTransformer:
    torch.manual_seed(0)
    return DEQTransformer(
        **{
            "vocab_size": 50,
            "d_model": 8,
            "num_heads": 2,
            "d_inner": 12,
            "cutoffs": [20],
            "div_val": 2,
            "norm": "post",
            "preln_residual": "normalised",
            "mem_len": 6,
            "eval_mem_len": 6,
            "window": 1000,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "init_std": 0.01,
        }
        | options,
        deq=DEQ(solver=Broyden(max_steps=30, tol=1e-11), grad=UPG(k=3, lam=0.8)),
    ).double()


def segments(batch: int, *lengths: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    words = torch.randint(50, (batch, sum(lengths) + 1), generator=torch.Generator().manual_seed(1))
    result, begin = [], 0
    for length in lengths:
        result.append((words[:, begin : begin + length], words[:, begin + 1 : begin + length + 1]))
        begin += length
    return result


class Segments:
    """A source of given segments."""

    def __init__(self, batches):
        self.batches = batches

    def evaluate(self, split, *, shard):
        yield from self.batches


def test_perplexity_weighs_tokens_not_segments():
    task, model, batches = LanguageModelling(), make(), segments(3, 5, 5, 2)
    memory, losses = None, []
    with torch.no_grad():
        model.eval()
        for tokens, targets in batches:
            nll, _, memory = model(tokens, targets, memory)
            losses.append(nll)
    expected = torch.cat(losses, dim=1).mean().item()
    options = {"shard": Shard(), "device": torch.device("cpu"), "precision": "fp32"}
    metrics = evaluate(model, task, Segments(batches), "test", **options)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-12)
    assert metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-12)
    forgetful = sum(task.score(model, batch, None).tally.loss_sum.item() for batch in batches) / 36
    assert abs(forgetful - expected) > 1e-4
    assert task.report(Tally(torch.tensor(1e9), 2))["perplexity"] == math.inf


def test_evaluation_does_not_disturb_the_memory_of_training():
    task, model, batches = LanguageModelling(), make(), segments(2, 4, 4)
    carry = task.score(model, batches[0], None).carry
    kept = tuple(part.clone() for part in carry)
    options = {"shard": Shard(), "device": torch.device("cpu"), "precision": "fp32"}
    evaluate(model, task, Segments(batches), "test", **options)
    assert all(torch.equal(a, b) for a, b in zip(carry, kept, strict=True))


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 1), (2, 2)])
def test_shares_of_the_streams_add_up_to_the_whole(world, micro):
    task = LanguageModelling()
    source = PyDocs(streams=4, eval_streams=2, segment=6)

    def run(*shards: Shard) -> tuple[float, list[torch.Tensor]]:
        model = make(vocab_size=source.spec.inputs["vocab_size"])
        total = 0.0
        for shard in shards:
            carries = [None] * shard.micro
            for step, micro_batches in enumerate(source.train(epoch=0, start=0, shard=shard)):
                if step == 3:
                    break
                for i, batch in enumerate(micro_batches):
                    score = task.score(model, batch, carries[i])
                    carries[i] = score.carry
                    score.tally.loss_sum.backward()
                    total += score.tally.loss_sum.item()
        return total, [p.grad for p in model.parameters()]

    whole, gradients = run(Shard())
    shared, added = run(*(Shard(rank=rank, world=world, micro=micro) for rank in range(world)))
    assert shared == pytest.approx(whole, rel=1e-10)
    for a, b in zip(added, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def train(folder: Path, steps: int, *overrides: str, stop: int | None = None) -> dict:
    """Train for `steps`; with `stop`, leave after that many, as if the process had ended there."""
    job = [*TINY, f"steps={steps}", "epochs=2", f"runs={folder}", *overrides]
    trainer = build_trainer(plan(job))
    trainer.folder.mkdir(parents=True, exist_ok=True)
    if stop is not None:
        trainer.budget = Budget(**{**vars(trainer.budget), "checkpoint_every": stop})
        after = trainer._after_step

        def leave(*args, **kwargs):
            after(*args, **kwargs)
            if trainer.step == stop:
                raise KeyboardInterrupt

        trainer._after_step = leave
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(resume=False)
    else:
        trainer.fit(resume=True)
    return {
        "trainer": trainer,
        "carries": trainer._take_step.carries,
        "weights": trainer.unwrapped.state_dict(),
        "job": job,
    }


def rows_of(folder: Path) -> list[dict]:
    (log,) = folder.rglob("metrics.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.slow  # test_ranks_agree.py has both models in every suite
def test_two_processes_equal_one(tmp_path):
    train(tmp_path / "one", 3, "model.dropout=0.0")
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [*TINY, "steps=3", "epochs=2", "model.dropout=0.0", f"runs={tmp_path / 'two'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*launch, str(root / "train.py"), *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("one", "two")]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_memory_and_order_survive_resume_bit_for_bit(tmp_path, accumulate):
    option = f"accumulate={accumulate}"
    whole = train(tmp_path / "whole", 6, option)
    train(tmp_path / "parts", 6, option, stop=3)
    resumed = train(tmp_path / "parts", 6, option)
    assert len(whole["carries"]) == accumulate
    for a, b in zip(whole["carries"], resumed["carries"], strict=True):
        assert a[0].shape == (4 // accumulate, 16, 16)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for name, value in whole["weights"].items():
        assert torch.equal(value, resumed["weights"][name]), name
    rows = [rows_of(tmp_path / name) for name in ("whole", "parts")]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4, 5, 6, 6]
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == b["loss"] and a["perplexity"] == b["perplexity"]


@pytest.mark.parametrize("grad", ["upg", "npg", "implicit"])
def test_evaluation_of_a_run_gives_its_own_perplexity(tmp_path, grad):
    run = train(tmp_path, 3, f"grad={grad}")
    trainer = run["trainer"]

    def evaluated(*overrides: str) -> dict:
        found = rebuild.rebuild_run(trainer.folder, which="last", overrides=overrides, configs=CONFIGS)
        return rebuild.evaluate_rebuilt(found, None)

    metrics = evaluated()
    assert metrics["perplexity"] == trainer.final["test"]["perplexity"]
    assert metrics["num_evals"] == 6
    changed = evaluated("eval_solver.max_steps=9", "model.eval_mem_len=48")
    assert changed["num_evals"] == 10
    assert changed["perplexity"] != metrics["perplexity"]


def test_perplexity_against_solver_budget_and_memory_length(tmp_path, capsys):
    run = train(tmp_path, 2, "grad=upg")
    capsys.readouterr()
    evaluate_script.main([f"run={run['trainer'].folder}", "eval_solver.max_steps=1,5", "model.eval_mem_len=0,16"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["overrides"] for row in rows] == [
        [f"eval_solver.max_steps={steps}", f"model.eval_mem_len={length}"] for steps in (1, 5) for length in (0, 16)
    ]
    assert [row["num_evals"] for row in rows] == [2, 2, 6, 6]
    assert rows[-1]["perplexity"] == run["trainer"].final["test"]["perplexity"]
    assert len({row["perplexity"] for row in rows}) == 4


def test_best_is_the_evaluation_at_which_the_first_split_was_best(tmp_path, monkeypatch):
    """The test perplexity of the weights with the best valid perplexity, not the best test perplexity."""
    values = {"valid": iter([5.0, 3.0, 4.0]), "test": iter([6.0, 8.0, 7.0])}
    monkeypatch.setattr(loop, "evaluate", lambda *args, **options: {"perplexity": next(values[args[3]])})
    trainer = train(tmp_path, 3, "eval_every=1", "eval_splits=[valid,test]")["trainer"]
    assert {split: (row["perplexity"], row["step"]) for split, row in trainer.best.items()} == {
        "valid": (3.0, 2),
        "test": (8.0, 2),
    }
    assert torch.load(trainer.folder / "best.pt", weights_only=True)["step"] == 2
    assert trainer.final["test"]["perplexity"] == 7.0


def test_the_record_has_the_unigram_perplexity_and_both_parameter_counts(tmp_path, capsys):
    job = [*TINY, "steps=1", f"runs={tmp_path}"]
    trainer, record = trained(job)
    assert record["baseline"] == PyDocs(streams=4, eval_streams=4, segment=16).spec.baseline
    shared = trainer.unwrapped.embedding.projections[1].numel()
    assert record["official_parameter_count"] == record["num_parameters"] + shared
    assert f"{record['baseline']['test']:.2f} (without input)" in capsys.readouterr().out


def test_pretraining_penalty_and_jitter_reach_the_model(tmp_path):
    train(
        tmp_path,
        8,
        "grad=implicit",
        "pretraining=unrolled",
        "pretraining.steps=2",
        "pretraining.layers=2",
        "penalty=jacobian",
        "penalty.weight=0.5",
        "penalty.frequency=1.0",
        "jitter=below",
        "jitter.below=2",
    )
    rows = [row for row in rows_of(tmp_path) if row["kind"] == "train"]
    assert [row["num_evals"] for row in rows[:2]] == [2, 2] and all("penalty" not in row for row in rows[:2])
    assert all(row["penalty"] > 0 and row["num_vjps"] > 0 for row in rows[2:])
    evals = {row["num_evals"] for row in rows[2:]}
    assert evals <= {5, 6, 7} and len(evals) > 1


def test_where_prepared_files_lie_is_not_what_is_run():
    here, there = ({"data": {"oov": "unk", "cache": cache}, "seed": 0} for cache in (None, "/fast/disk"))
    assert identity.config_hash(here) == identity.config_hash(there)
    folders = [identity.run_folder("runs", "x", items, 0) for items in ([], ["data.cache=/fast/disk"])]
    assert folders[0] == folders[1]
