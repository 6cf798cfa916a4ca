"""The implicit graph layer and the Chains model against arrays recorded from the official code, in float64.

The folder of the arrays is named by PHANTOM_REFERENCE; without it these tests are skipped.
"""

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from data.graphs.graph import Graph, normalized_adjacency, sparse_matrix, spectral_radius
from models.ignn.layers import ImplicitGraphLayer, project_rows
from models.ignn.model import ChainsIGNN, solve
from models.official.load import load_reference
from phantom import DEQ, NPG, UPG, FixedPoint, Implicit

FOLDER = os.environ.get("PHANTOM_REFERENCE")
FILE = Path(FOLDER or ".") / "ignn_layer.npz"
pytestmark = pytest.mark.skipif(
    not (FOLDER and FILE.is_file()), reason="PHANTOM_REFERENCE does not name a folder with ignn_layer.npz"
)

KAPPA = 0.9
TIGHT = FixedPoint(max_steps=2000, tol=1e-15, stop="absolute", norm="max")
CASES = ("layer_sym", "layer_directed")


@pytest.fixture(scope="module")
def arrays():
    with np.load(FILE) as file:
        return {name: torch.tensor(file[name]) for name in file.files}


def close(ours: torch.Tensor, theirs: torch.Tensor, tol: float = 1e-9) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert (ours.detach() - theirs).abs().max() <= tol


def run(arrays, case: str, grad):
    """Solve the recorded layer, and differentiate the sum of squares of what it returns."""
    section = f"{case}.f64."
    adjacency = arrays[section + "adj"]
    edges = adjacency.nonzero().T
    graph = Graph(
        features=arrays["common.features"].clone().requires_grad_(),
        adjacency=sparse_matrix(edges, adjacency[tuple(edges)], (12, 12)),
        radius=KAPPA / float(arrays[section + "kappa_over_rho"]),
    )
    layer = ImplicitGraphLayer(in_features=5, features=6, kappa=KAPPA, dead_parameters=True).double()
    names = {"W": "W", "Omega_1": "omega_1", "Omega_2": "omega_2", "bias": "bias"}
    layer.load_state_dict({ours: arrays[f"{section}param_init.{name}"] for name, ours in names.items()})
    injection = layer.inject(graph.features, graph)
    solution = solve(DEQ(solver=TIGHT, grad=grad), layer, injection, injection, graph)
    solution.value.square().sum().backward()
    return layer, injection, solution, graph


def test_projection(arrays):
    close(
        project_rows(arrays["projection.input"], float(arrays["projection.kappa"])), arrays["projection.output"], 1e-12
    )


@pytest.mark.parametrize("case", CASES)
def test_equilibrium_and_exact_gradients(arrays, case):
    layer, injection, solution, graph = run(arrays, case, Implicit(solver=TIGHT))
    section = f"{case}.f64."
    close(layer.W, arrays[section + "W_projected"], 1e-12)
    close(injection.T, arrays[section + "B"], 1e-12)
    close(solution.z_star[0].T, arrays[section + "X_star"])
    close(layer.W.grad, arrays[section + "exact.grad.W"])
    close(layer.omega_1.grad, arrays[section + "exact.grad.Omega_1"])
    close(graph.features.grad.T, arrays[section + "grad_input_features_pxn"])
    assert layer.omega_2.grad is None and layer.bias.grad is None


def test_the_official_gradient_of_w_is_wrong_on_a_directed_graph(arrays):
    """It has A X^T where the derivative has A^T X^T; ours is the derivative."""
    exact, official = arrays["layer_directed.f64.exact.grad.W"], arrays["layer_directed.f64.grad.W"]
    assert (exact - official).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lam", [0.5, 0.8, 1.0])
@pytest.mark.parametrize(("name", "estimator"), [("upg", UPG), ("npg", NPG)])
def test_phantom_gradients(arrays, case, lam, name, estimator):
    layer, *_ = run(arrays, case, estimator(k=5, lam=lam))
    section = f"{case}.f64.{name}_k5_lam{lam}.grad."
    close(layer.W.grad, arrays[section + "W"])
    close(layer.omega_1.grad, arrays[section + "Omega_1"])


@pytest.mark.parametrize(("name", "scaling"), [("adj_augnorm", "symmetric"), ("adj_augnorm_doubled", "doubled")])
def test_normalised_adjacency(arrays, name, scaling):
    edges = arrays["common.adj_raw"].nonzero().T
    close(normalized_adjacency(edges, 12, scaling, torch.float64).to_dense(), arrays[f"common.{name}"], 1e-12)


def test_spectral_radius(arrays):
    for case in CASES:
        adjacency = arrays[f"{case}.f64.adj"]
        edges = adjacency.nonzero().T
        ours = spectral_radius(sparse_matrix(edges, adjacency[tuple(edges)], (12, 12)))
        assert ours == pytest.approx(float(torch.linalg.eigvals(adjacency).abs().max()), abs=1e-9)


def test_chains_model(arrays):
    rows, columns = arrays["chains.adj_rows"], arrays["chains.adj_cols"]
    features = torch.zeros(*arrays["chains.features_shape"].tolist(), dtype=torch.float64)
    features[tuple(arrays["chains.features_nonzero"].T)] = arrays["chains.features_nonzero_vals"].double()
    graph = Graph(
        features=features,
        adjacency=sparse_matrix(torch.stack([rows, columns]), arrays["chains.adj_vals"].double(), (400, 400)),
        radius=float(arrays["chains.f64.adj_rho"]),
    )
    model = ChainsIGNN(
        hidden=16,
        dropout=0.5,
        layer=functools.partial(ImplicitGraphLayer, kappa=KAPPA, dead_parameters=True),
        deq=DEQ(solver=TIGHT, grad=Implicit(solver=TIGHT)),
        in_features=100,
        num_classes=2,
    ).double()
    state = {
        name.removeprefix("chains.f64.param_init."): value
        for name, value in arrays.items()
        if name.startswith("chains.f64.param_init.")
    }
    load_reference(model, state, "ignn")
    model.eval()
    output, (solution,) = model(graph)
    state = solution.z_star[0]
    close(state.T, arrays["chains.f64.X_star_ig1"])
    # the last nodes' states are 1e-7 long, and are scaled to length one: so is the recorded solve's own error
    error = (output.detach() - arrays["chains.f64.output"]).abs().amax(dim=1)
    assert (error * state.norm(dim=1)).max() <= 1e-12
    output.square().sum().backward()
    close(model.classifier.weight.grad, arrays["chains.f64.grad.V.weight"], 1e-5)
    close(model.layers[0].omega_1.grad, arrays["chains.f64.grad.ig1.Omega_1"], 1e-4)  # entries up to 48
