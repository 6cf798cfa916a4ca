"""The implicit graph layer of IGNN: X = relu(A^T X W^T + B), node-major, with W kept a contraction by projection.

N nodes, m hidden features, p input features. One graph batch is one problem: states are (1, N, m).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from models.ignn.sparse import Matrix, multiply
from phantom.validate import check_number

NodeMap = Callable[[Tensor], Tensor]


class GraphInput(Protocol):
    """What the models here read of a graph, or of a batch as one disjoint union.

    Args:
        features: (N, p).
        adjacency: (N, N), entry (i, j) weighing the edge from node i to node j.
        radius: an upper bound of the spectral radius of |adjacency|.
        pooling: (G, N) sum over the nodes of each of G graphs; read by graph classification alone.
    """

    features: Tensor
    adjacency: Matrix
    radius: float
    pooling: Matrix | None


class GraphLayer(Protocol):
    """A layer whose equilibrium the models solve for; its map returns new memory at every call, and keeps none."""

    def inject(self, inputs: Tensor, graph: GraphInput) -> Tensor: ...

    def bind(self, injection: Tensor, graph: GraphInput) -> NodeMap: ...


class ImplicitGraphLayer(nn.Module):
    """X = relu(A^T X W^T + B) with B = A^T U Omega_1^T, and every row of W in an L1 ball of radius kappa / rho.

    The bound |W|_inf rho(|A|) <= kappa < 1 makes the map a contraction in a weighted norm: the equilibrium exists, is
    unique, and plain iteration reaches it. In training, W is projected in place when a map is bound: with any optimiser
    this is its projected form, and the stored weight is unprojected between the update and the next forward. In
    evaluation the projection is a function of the stored weight, which stays as it is (the official code shrinks it
    there too). The gradient passes the projection unchanged in both modes.

    Args:
        in_features: p.
        features: m.
        kappa: bound of |W|_inf rho(|A|), in (0, 1).
        dead_parameters: keep Omega_2 and bias, which the official model owns, counts and never uses. They take no
            gradient.

    Source: Gu et al., *Implicit Graph Neural Networks* (2020), and its official code.
    """

    W: Tensor
    omega_1: Tensor

    def __init__(self, *, in_features: int, features: int, kappa: float, dead_parameters: bool) -> None:
        super().__init__()
        check_kappa(kappa)
        self.kappa = kappa
        bound = 1 / math.sqrt(features)
        shapes = {"W": (features, features), "omega_1": (features, in_features)}
        dead = {"omega_2": (features, in_features), "bias": (features, 1)} if dead_parameters else {}
        for name, shape in (shapes | dead).items():
            values = torch.empty(shape).uniform_(-bound, bound)
            self.register_parameter(name, nn.Parameter(values, requires_grad=name not in dead))

    def inject(self, inputs: Tensor, graph: GraphInput) -> Tensor:
        """Return B (N, m) for `inputs` U (N, p)."""
        return propagate(inputs, self.omega_1, graph)

    def bind(self, injection: Tensor, graph: GraphInput) -> NodeMap:
        """Return f of states (1, N, m) for `injection` (N, m)."""
        radius = self.kappa / graph.radius
        if self.training:
            with torch.no_grad():
                self.W.copy_(project_rows(self.W, radius))
            # a copy, so that the next forward's projection cannot reach what this one's backward still needs
            return node_map(self.W.clone(), injection, graph)
        return node_map(_projected(self.W, radius), injection, graph)


class SpectralGraphLayer(nn.Module):
    """X = relu(A^T X W^T + B), B = A^T U Omega_1^T + U Omega_2^T, all three weights bounded in spectral norm.

    The layer of torchdeq's IGNN for nodes, steadier on PPI than `ImplicitGraphLayer`. W is rebuilt from its own
    parameters at every bind and then projected, never stored projected; the gradient passes the projection unchanged.

    Args:
        in_features: p.
        features: m.
        kappa: bound of |W|_inf rho(|A|), in (0, 1).
        dead_parameters: keep the unused bias of the original, which takes no gradient.

    Source: torchdeq, deq-zoo/ignn/nodeclassification.
    """

    def __init__(self, *, in_features: int, features: int, kappa: float, dead_parameters: bool) -> None:
        super().__init__()
        check_kappa(kappa)
        self.kappa = kappa
        bound = 1 / math.sqrt(features)
        self.W = SpectralWeight(torch.empty(features, features).uniform_(-bound, bound))
        self.omega_1 = SpectralWeight(torch.empty(features, in_features).uniform_(-bound, bound))
        self.omega_2 = SpectralWeight(torch.empty(features, in_features).uniform_(-bound, bound))
        if dead_parameters:
            self.bias = nn.Parameter(torch.empty(features, 1).uniform_(-bound, bound), requires_grad=False)

    def inject(self, inputs: Tensor, graph: GraphInput) -> Tensor:
        """Return B (N, m) for `inputs` U (N, p)."""
        return propagate(inputs, self.omega_1(), graph) + nn.functional.linear(inputs, self.omega_2())

    def bind(self, injection: Tensor, graph: GraphInput) -> NodeMap:
        """Return f of states (1, N, m) for `injection` (N, m)."""
        return node_map(_projected(self.W(), self.kappa / graph.radius), injection, graph)


class SpectralWeight(nn.Module):
    """Hold a matrix whose rows are scaled by min(1, g / sigma), sigma its largest singular value and g learnt per row.

    sigma = u^T W v, where u and v follow the singular vectors by one power step per forward in training mode.

    Args:
        weight: (m, p) initial value; g starts at one.

    Source: Miyato et al., *Spectral Normalization* (2018), in the capped form of torchdeq.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.g = nn.Parameter(weight.new_ones(weight.shape[0], 1))
        self.register_buffer("u", nn.functional.normalize(torch.randn_like(weight[:, 0]), dim=0))
        self.register_buffer("v", torch.zeros_like(weight[0]))
        for _ in range(15):
            self._power_step()

    def forward(self) -> Tensor:
        """Return the effective weight."""
        if self.training:
            self._power_step()
        # copies, so that the next power step cannot reach what this backward still needs
        sigma = self.u.clone() @ self.weight @ self.v.clone()
        return self.weight * (self.g / sigma).clamp_max(1.0)

    @torch.no_grad()
    def _power_step(self) -> None:
        self.v.copy_(nn.functional.normalize(self.weight.T @ self.u, dim=0))
        self.u.copy_(nn.functional.normalize(self.weight @ self.v, dim=0))


def propagate(inputs: Tensor, weight: Tensor, graph: GraphInput) -> Tensor:
    """Return A^T U Omega^T (N, m) for `inputs` U (N, p) and `weight` Omega (m, p), summing the narrower side."""
    if weight.shape[0] > weight.shape[1]:
        return nn.functional.linear(multiply(graph.adjacency, inputs, transposed=True), weight)
    return multiply(graph.adjacency, nn.functional.linear(inputs, weight), transposed=True)


def node_map(weight: Tensor, injection: Tensor, graph: GraphInput) -> NodeMap:
    """Return f(X) = relu(A^T X W^T + B) on states (1, N, m)."""
    adjacency, transposed = graph.adjacency, weight.T.contiguous()

    def f(x: Tensor) -> Tensor:
        message = multiply(adjacency, x.squeeze(0), transposed=True)
        return torch.mm(message, transposed).add_(injection).relu_().unsqueeze(0)

    return f


def project_rows(weight: Tensor, radius: float) -> Tensor:
    """Return the rows of `weight` (m, p), each projected onto the L1 ball of `radius`; rows inside are untouched.

    Soft-thresholding sign(w) max(|w| - theta, 0), theta from the sorted magnitudes.

    Source: Duchi et al., *Efficient Projections onto the l1-Ball* (2008).
    """
    magnitude = weight.abs()
    ordered = magnitude.sort(dim=1, descending=True).values
    excess = ordered.cumsum(dim=1) - radius
    ranks = torch.arange(1, weight.shape[1] + 1, device=weight.device, dtype=weight.dtype)
    support = (ordered * ranks > excess).sum(dim=1, keepdim=True).clamp_min(1)
    theta = excess.gather(1, support - 1) / support
    shrunk = weight.sign() * (magnitude - theta).clamp_min(0)
    return torch.where(magnitude.sum(dim=1, keepdim=True) > radius, shrunk, weight)


def _projected(weight: Tensor, radius: float) -> Tensor:
    """Return the projected rows, with the gradient of `weight` itself."""
    if not torch.is_grad_enabled():
        return project_rows(weight, radius)
    return project_rows(weight.detach(), radius) + (weight - weight.detach())


def check_kappa(kappa: float) -> None:
    """Raise unless `kappa` is in (0, 1)."""
    check_number("kappa", kappa, "(0, 1)", also=": it bounds |W|_inf rho(|A|), below one for a contraction")
