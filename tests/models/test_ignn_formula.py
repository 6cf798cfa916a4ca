"""The models of IGNN against their formulas: dense matrices, and equilibria by plain iteration."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ignn.layers import ImplicitGraphLayer, SpectralGraphLayer
from models.ignn.model import ChainsIGNN
from tests.models.graph_models import deq, directed_graph, graph_model, make_layer, node_model

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def shrink(model: nn.Module, radius: float) -> nn.Module:
    """Put every W inside its ball, where the projection leaves it alone, and return the model."""
    for layer in model.layers:
        with torch.no_grad():
            w = layer.W if isinstance(layer, ImplicitGraphLayer) else layer.W.weight
            w.mul_(0.9 * layer.kappa / radius / w.abs().sum(dim=1).max())
    return model


@torch.no_grad()
def equilibrium(layer: nn.Module, inputs: Tensor, adjacency: Tensor) -> Tensor:
    """Return X = relu(A^T X W^T + B) with B = A^T U Omega_1^T, and U Omega_2^T more in a spectral layer."""
    if isinstance(layer, ImplicitGraphLayer):
        w, injection = layer.W, adjacency.T @ inputs @ layer.omega_1.T
    else:
        w, injection = layer.W(), adjacency.T @ inputs @ layer.omega_1().T + inputs @ layer.omega_2().T
    x = torch.zeros_like(injection)
    for _ in range(2000):
        x = (adjacency.T @ x @ w.T + injection).clamp_min(0)
    return x


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def both_signs(x: Tensor) -> bool:
    return bool((x > 1e-3).any() and (x < -1e-3).any())


def dropped(*shape: int) -> Tensor:
    """Return the factors of dropout at one half, of the current random state."""
    mask = F.dropout(torch.ones(*shape, dtype=torch.float64), 0.5)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    return mask


@pytest.mark.parametrize("training", [False, True])
def test_graph_classification(training):
    """V_1 drop(relu(V_0 sum_n X*)), X* of the last of the stacked layers, with no activation of its own between."""
    graph = directed_graph()
    model = shrink(graph_model(dropout=0.5), graph.radius).train(training)
    torch.manual_seed(7)
    logits, solutions = model(graph)
    x, a = graph.features, graph.adjacency.to_dense()
    for layer, solution in zip(model.layers, solutions, strict=True):
        x = equilibrium(layer, x, a)
        torch.testing.assert_close(solution.z_star[0], x, **CLOSE)
    hidden = linear(torch.stack([x[:4].sum(dim=0), x[4:].sum(dim=0)]), model.hidden)
    assert both_signs(hidden), "where the activation matters"
    torch.manual_seed(7)
    mask = dropped(2, 6) if training else torch.ones(2, 6)
    torch.testing.assert_close(logits, linear(hidden.clamp_min(0) * mask, model.classifier), **CLOSE)


@pytest.mark.parametrize("kind", [ImplicitGraphLayer, SpectralGraphLayer])
def test_node_labelling(kind):
    """x <- ELU(X* + V x), the last block without ELU."""
    graph = directed_graph()
    model = shrink(node_model(layer=make_layer(kind)), graph.radius).eval()
    logits, solutions = model(graph)
    x, a = graph.features, graph.adjacency.to_dense()
    for i, (layer, skip, solution) in enumerate(zip(model.layers, model.skips, solutions, strict=True)):
        z = equilibrium(layer, x, a)
        torch.testing.assert_close(solution.z_star[0], z, **CLOSE)
        x = z + linear(x, skip)
        assert both_signs(x), "where the activation matters"
        if i < 2:
            x = torch.where(x > 0, x, x.exp() - 1)
    torch.testing.assert_close(logits, x, **CLOSE)


@pytest.mark.parametrize("training", [False, True])
def test_chains(training):
    """V drop(X* / |X*|), by the length of every node's row; a node that nothing reaches stays zero."""
    graph = directed_graph()
    torch.manual_seed(0)
    model = ChainsIGNN(hidden=6, dropout=0.5, layer=make_layer(), in_features=4, num_classes=3, deq=deq()).double()
    shrink(model, graph.radius).train(training)
    torch.manual_seed(7)
    logits, (solution,) = model(graph)
    x = equilibrium(model.layers[0], graph.features, graph.adjacency.to_dense())
    torch.testing.assert_close(solution.z_star[0], x, **CLOSE)
    lengths = x.square().sum(dim=1).sqrt()
    assert lengths.max() > 1.5 and lengths[lengths > 0].min() < 0.7, "where the scaling matters"
    direction = torch.stack([row / length if length > 0 else row for row, length in zip(x, lengths, strict=True)])
    torch.manual_seed(7)
    mask = dropped(9, 6) if training else torch.ones(9, 6)
    torch.testing.assert_close(logits, linear(direction * mask, model.classifier), **CLOSE)


def test_evaluation_takes_no_power_step():
    """Singular vectors follow the weights in training alone: an evaluation is a function, and leaves no trace."""
    graph = directed_graph()
    model = node_model(layer=make_layer(SpectralGraphLayer))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert len(before) == 3 * 3 * 2, "u and v of three weights of three layers"
    logits, _ = model.eval()(graph)
    logits.sum().backward()
    with torch.no_grad():
        again = model(graph)[0]
        assert torch.equal(model(graph)[0], again)
    torch.testing.assert_close(again, logits, **CLOSE)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    model.train()(graph)
    assert all(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
