"""The benchmark's graph batches are the same at every call, and IGNN's floor does the work of its step."""

import torch

from phantom.engine.measure.timing import StepTimer
from scripts.bench import batches, measure, variants


def test_graphs_are_symmetric_normalised_and_fixed():
    inputs, (graph, labels) = batches.make("graph_classification", batch=3, size=6, classes=2)
    assert inputs == {"in_features": 35, "num_classes": 2}
    dense = graph.adjacency.to_dense()
    assert dense.shape == (18, 18) and torch.equal(dense, dense.T)
    assert torch.linalg.eigvalsh(dense.double()).abs().max() <= 1 + 1e-6
    assert torch.equal(dense[:6, 6:], torch.zeros(6, 12)), "graphs are not connected to each other"
    again, other = batches.make("graph_classification", batch=3, size=6, classes=2)[1]
    assert torch.equal(again.features, graph.features) and torch.equal(other, labels)


def test_every_layer_has_its_floor():
    options = [
        "model=ignn",
        "batch=2",
        "size=5",
        "classes=2",
        "solver=fixed_point",
        "solver.max_steps=4",
        "optimizer=adam",
    ]
    settings = variants.settings([*options, "grad=upg,npg", "k=3"])
    device = torch.device("cpu")
    upg, floor, npg, _ = measure.build_rows(settings, device, StepTimer(device, clock="cpu"), peer=False)
    # three layers: four steps and the first evaluation each, then k with a graph, or one and k - 1 vjps
    assert (upg.facts["evals"], upg.facts["graph_evals"], upg.facts["vjps"]) == (15, 9, 0)
    assert (npg.facts["evals"], npg.facts["graph_evals"], npg.facts["vjps"]) == (15, 3, 6)
    assert upg.facts["syncs"]["solve"] == 0
    assert [(w.evals, w.graph_evals, w.vjps) for w in floor.variant.model.deq.work] == [(5, 3, 0)] * 3
    assert floor.variant.model.layers is upg.variant.model.layers
