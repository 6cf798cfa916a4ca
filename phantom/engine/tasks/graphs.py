"""The three tasks on graphs: classify graphs, label nodes, classify some nodes of one graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from phantom import Solution
from phantom.engine.tasks.base import (
    Score,
    Tally,
    Task,
    at_least_float32,
    classification_report,
    classification_tally,
    outputs_of,
)

# |X*| of every implicit layer, as sums that add: squares and how many
SQUARES, ENTRIES = "squares", "entries"


class _Classification(Task):
    """One class each, of graphs or of nodes; what is reported is the same."""

    metric = "accuracy"
    mode = "max"

    def report(self, tally: Tally) -> dict[str, float]:
        return classification_report(tally) | _state_sizes(tally)


class GraphClassification(_Classification):
    """Score (graphs, labels (G,)) by the cross entropy of `model(graphs)`; counts graphs."""

    kind = "graph_classification"

    def score(self, model: nn.Module, batch: Any, carry: Any) -> Score:
        graph, labels = batch
        logits, solutions = outputs_of(model, graph)
        return Score(_with_states(classification_tally(logits, labels), solutions), solutions, None)


class NodeClassification(_Classification):
    """Score (graph, labels (N,), nodes (S,)) by the cross entropy of `model(graph)` on those nodes; counts nodes."""

    kind = "node_classification"

    def score(self, model: nn.Module, batch: Any, carry: Any) -> Score:
        graph, labels, nodes = batch
        logits, solutions = outputs_of(model, graph)
        return Score(_with_states(classification_tally(logits[nodes], labels[nodes]), solutions), solutions, None)


class NodeLabelling(Task):
    """Score (graph, labels (N, L) of zeros and ones) by the binary cross entropy of every label; counts pairs of them.

    The metric is micro-F1 in percent, 2 tp / (2 tp + fp + fn) with a label predicted where its logit is positive: true
    and false positives add over batches, so it is exact however a split is batched. Where nothing is predicted and
    nothing is there to find, it is 0. `baseline` is that of the answer `all present`, 2p / (1 + p) for a share p.
    """

    kind = "node_labelling"
    metric = "micro_f1"
    mode = "max"

    def score(self, model: nn.Module, batch: Any, carry: Any) -> Score:
        graph, labels = batch
        logits, solutions = outputs_of(model, graph)
        predicted, present = logits > 0, labels > 0.5
        sums = {
            "true_positives": (predicted & present).sum(),
            "false_positives": (predicted & ~present).sum(),
            "false_negatives": (~predicted & present).sum(),
        }
        loss = F.binary_cross_entropy_with_logits(at_least_float32(logits), labels, reduction="sum")
        return Score(_with_states(Tally(loss, labels.numel(), sums), solutions), solutions, None)

    def report(self, tally: Tally) -> dict[str, float]:
        hits = 2 * float(tally.sums["true_positives"])
        wrong = float(tally.sums["false_positives"]) + float(tally.sums["false_negatives"])
        present = float(tally.sums["true_positives"]) + float(tally.sums["false_negatives"])
        return {
            "loss": float(tally.loss_sum) / tally.count,
            "micro_f1": 100 * hits / (hits + wrong) if hits + wrong else 0.0,
            "baseline": 100 * 2 * present / (tally.count + present),
            **_state_sizes(tally),
        }


def _with_states(tally: Tally, solutions: Sequence[Solution]) -> Tally:
    """Return the tally with what the size of every X* needs: the sum of its squares, and the number of its entries."""
    for i, solution in enumerate(solutions):
        parts = pytree.tree_leaves(solution.z_star)
        squares = [torch.linalg.vector_norm(part.float()).square() for part in parts]
        tally.sums[f"{SQUARES}/{i}"] = torch.stack(squares).sum()
        tally.sums[f"{ENTRIES}/{i}"] = squares[0].new_tensor(float(sum(part.numel() for part in parts)))
    return tally


def _state_sizes(tally: Tally) -> dict[str, float]:
    """Return the root mean square of X* for every implicit layer in order, as `state_rms/0`, `state_rms/1`, ..."""
    layers = [name.split("/")[1] for name in tally.sums if name.startswith(f"{SQUARES}/")]
    return {
        f"state_rms/{i}": (float(tally.sums[f"{SQUARES}/{i}"]) / float(tally.sums[f"{ENTRIES}/{i}"])) ** 0.5
        for i in layers
    }
