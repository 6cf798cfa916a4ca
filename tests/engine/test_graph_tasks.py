"""Tasks on graphs: exact sums over batches, micro-F1 by its definition, sizes of the states."""

import functools
from itertools import pairwise

import pytest
import torch
from torch import nn

from data.graphs.chains import Chains
from data.graphs.ppi_synthetic import SyntheticPPI
from models.ignn.layers import ImplicitGraphLayer
from models.ignn.model import ChainsIGNN, NodeIGNN
from phantom import DEQ, UPG, FixedPoint, Solution, Stats
from phantom.engine.source import Shard
from phantom.engine.tasks.graphs import GraphClassification, NodeClassification, NodeLabelling

SOLVER = FixedPoint(max_steps=300, tol=1e-6)


class Says(nn.Module):
    """Answer with given logits, and states of given size."""

    def __init__(self, logits: torch.Tensor, *states: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.states = logits, states

    def forward(self, graph):
        stats = Stats.of_no_solve(torch.zeros(1, 1))
        return self.logits, tuple(Solution(value=z, z0=z, z_star=z, stats=stats) for z in self.states)


def layer():
    return functools.partial(ImplicitGraphLayer, kappa=0.9, dead_parameters=False)


def test_graph_classification():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    score = GraphClassification().score(Says(logits), (None, labels), None)
    report = GraphClassification().report(score.tally.detach())
    assert score.tally.count == 3 and report["accuracy"] == pytest.approx(200 / 3)
    assert report["loss"] == pytest.approx(float(-logits.log_softmax(1)[range(3), labels].mean()))


def test_node_classification_scores_the_chosen_nodes():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    batch = (None, torch.tensor([0, 0, 0]), torch.tensor([0, 1]))
    score = NodeClassification().score(Says(logits), batch, None)
    assert score.tally.count == 2 and NodeClassification().report(score.tally)["accuracy"] == 50


@pytest.mark.parametrize("seed", [0, 1])
def test_micro_f1_is_exact_however_batched(seed):
    from sklearn.metrics import f1_score

    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(50, 7, generator=generator)
    labels = (torch.rand(50, 7, generator=generator) < 0.3).float()
    task, cuts = NodeLabelling(), [0, 3, 30, 50]
    parts = [task.score(Says(logits[a:b]), (None, labels[a:b]), None) for a, b in pairwise(cuts)]
    tally = parts[0].tally + parts[1].tally + parts[2].tally
    report = task.report(tally.detach())
    assert tally.count == 350
    assert report["micro_f1"] == pytest.approx(100 * f1_score(labels, logits > 0, average="micro"), abs=1e-10)
    exact = nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert report["loss"] == pytest.approx(float(exact), rel=1e-6)


def test_micro_f1_of_the_trivial_answers():
    labels = (torch.rand(200, 5, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    share, task = float(labels.mean()), NodeLabelling()

    def report(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        return task.report(task.score(Says(logits), (None, labels), None).tally.detach())

    def f1(logits: torch.Tensor, labels: torch.Tensor) -> float:
        return report(logits, labels)["micro_f1"]

    assert f1(torch.ones(200, 5), labels) == pytest.approx(100 * 2 * share / (1 + share))
    assert report(torch.randn(200, 5), labels)["baseline"] == f1(torch.ones(200, 5), labels)
    assert f1(2 * labels - 1, labels) == 100
    assert f1(-torch.ones(200, 5), labels) == f1(-torch.ones(200, 5), torch.zeros(200, 5)) == 0


def test_state_sizes_add_over_batches_of_any_size():
    small, large = torch.full((1, 2, 3), 2.0), torch.full((1, 10, 3), 1.0)
    labels, task = torch.tensor([0]), GraphClassification()
    tallies = [
        task.score(Says(torch.zeros(1, 2), z, 10 * z, {"a": z, "b": (z,)}), (None, labels), None).tally
        for z in (small, large)
    ]
    report = task.report((tallies[0] + tallies[1]).detach())
    assert report["state_rms/0"] == pytest.approx(((6 * 4 + 30 * 1) / 36) ** 0.5)
    assert report["state_rms/1"] == pytest.approx(10 * report["state_rms/0"])
    assert report["state_rms/2"] == pytest.approx(report["state_rms/0"])


def test_parts_of_the_nodes_add_up_to_the_whole():
    """The gradient of a node-classification step does not depend on how ranks and micro-batches share the nodes."""
    source = Chains(
        length=8,
        chains_per_class=20,
        num_classes=2,
        num_features=6,
        train_nodes=20,
        valid_nodes=10,
        test_nodes=10,
        seed=0,
    )
    gradients = []
    for shards in ([Shard()], [Shard(rank=rank, world=2, micro=2) for rank in range(2)]):
        torch.manual_seed(0)
        deq = DEQ(solver=SOLVER, grad=UPG(k=5, lam=0.8))
        model = ChainsIGNN(hidden=5, dropout=0.0, layer=layer(), deq=deq, **source.spec.inputs)
        batches = [part for shard in shards for parts in source.train(epoch=0, start=0, shard=shard) for part in parts]
        tallies = [NodeClassification().score(model, batch, None).tally for batch in batches]
        sum(tally.loss_sum for tally in tallies).backward()
        assert sum(tally.count for tally in tallies) == 20 and len(tallies) == len(shards) ** 2
        gradients.append(model.layers[0].W.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_labels_are_learnt_from_neighbours():
    """A few steps on small generated graphs beat the answer `all present`, whose micro-F1 is 2p / (1 + p)."""
    source = SyntheticPPI(scale=0.04, generation_seed=0, batch_size=4, eval_batch_size=2, seed=0)
    torch.manual_seed(0)
    deq = DEQ(solver=SOLVER, grad=UPG(k=5, lam=0.5))
    model = NodeIGNN(widths=[64], layer=layer(), deq=deq, **source.spec.inputs)
    task, optimizer = NodeLabelling(), torch.optim.Adam(model.parameters(), lr=5e-3)
    for epoch in range(12):
        for (batch,) in source.train(epoch=epoch, start=0, shard=Shard()):
            optimizer.zero_grad()
            tally = task.score(model, batch, None).tally
            (tally.loss_sum / tally.count).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        (batch,) = source.evaluate("test", shard=Shard())
        report = task.report(task.score(model, batch, None).tally.detach())
    assert report["micro_f1"] > report["baseline"] + 10, report
