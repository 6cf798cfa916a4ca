"""The implicit graph layer of IGNN: X = relu(A^T X W^T + B), node-major; projecting W keeps the map a contraction.

N nodes, m hidden features, p input features. One graph batch is one problem: states are (1, N, m).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from models.ignn.sparse import Matrix, multiply
from phantom import SpectralNorm
from phantom.validate import check_flag, check_number

NodeMap = Callable[[Tensor], Tensor]


class GraphInput(Protocol):
    """The fields that the models here read of a graph, or of a batch as one disjoint union.

    Args:
        features: (N, p).
        adjacency: (N, N), entry (i, j) is the weight of the edge from node i to node j.
        radius: an upper bound of the spectral radius of |adjacency|.
        pooling: (G, N) sum over the nodes of each of G graphs; only graph classification reads it.
    """

    features: Tensor
    adjacency: Matrix
    radius: float
    pooling: Matrix | None


class GraphLayer(Protocol):
    """A layer whose equilibrium the models solve for; its map returns a new tensor at every call and keeps none."""

    def inject(self, inputs: Tensor, graph: GraphInput) -> Tensor: ...

    def bind(self, injection: Tensor, graph: GraphInput) -> NodeMap: ...


class ImplicitGraphLayer(nn.Module):
    """X = relu(A^T X W^T + B) with B = A^T U Omega_1^T and every row of W in the L1 ball of radius kappa / rho.

    The bound |W|_inf rho(|A|) <= kappa < 1 makes the map a contraction in a weighted norm: the equilibrium exists, is
    unique, and fixed-point iteration reaches it. In training, `bind` projects W in place, which makes any optimiser a
    projected one; between an update and the next `bind`, W is not projected. In evaluation, `bind` projects a copy
    and leaves W unchanged (the official code projects W there too). In both modes the gradient passes the projection
    unchanged.

    Args:
        in_features: p.
        features: m.
        kappa: bound of |W|_inf rho(|A|), in (0, 1).
        dead_parameters: keep Omega_2 and bias, which the official model has and counts but never uses; they get no
            gradient.

    Source: Gu et al., *Implicit Graph Neural Networks* (2020), and its official code.
    """

    def __init__(self, *, in_features: int, features: int, kappa: float, dead_parameters: bool) -> None:
        super().__init__()
        check_kappa(kappa)
        check_flag("dead_parameters", dead_parameters)
        self.kappa = kappa
        self.W = nn.Parameter(_drawn(features, features))
        self.omega_1 = nn.Parameter(_drawn(features, in_features))
        if dead_parameters:
            self.omega_2 = nn.Parameter(_drawn(features, in_features), requires_grad=False)
            self.bias = nn.Parameter(_drawn(features, 1), requires_grad=False)

    def inject(self, inputs: Tensor, graph: GraphInput) -> Tensor:
        """Return B (N, m) for `inputs` U (N, p)."""
        return propagate(inputs, self.omega_1, graph)

    def bind(self, injection: Tensor, graph: GraphInput) -> NodeMap:
        """Return f of states (1, N, m) for `injection` (N, m)."""
        radius = row_bound(self.kappa, graph)
        if self.training:
            with torch.no_grad():
                self.W.copy_(project_rows(self.W, radius))
            # clone W: the next forward projects W in place, and this backward needs the present values
            return node_map(self.W.clone(), injection, graph)
        return node_map(_projected(self.W, radius), injection, graph)


class SpectralGraphLayer(nn.Module):
    """X = relu(A^T X W^T + B), B = A^T U Omega_1^T + U Omega_2^T, all three weights bounded in spectral norm.

    torchdeq's IGNN for nodes uses this layer; it is more stable on PPI than `ImplicitGraphLayer`. Every `bind` computes
    W from its parameters and projects it, but never stores the projected W. The gradient passes the projection
    unchanged.

    Args:
        in_features: p.
        features: m.
        kappa: bound of |W|_inf rho(|A|), in (0, 1).
        dead_parameters: keep the original's unused bias, which gets no gradient.

    Source: torchdeq, deq-zoo/ignn/nodeclassification.
    """

    def __init__(self, *, in_features: int, features: int, kappa: float, dead_parameters: bool) -> None:
        super().__init__()
        check_kappa(kappa)
        check_flag("dead_parameters", dead_parameters)
        self.kappa = kappa

        def drawn(columns: int) -> SpectralNorm:
            return SpectralNorm(_drawn(features, columns), learned=True, capped=True)

        self.W, self.omega_1, self.omega_2 = drawn(features), drawn(in_features), drawn(in_features)
        if dead_parameters:
            self.bias = nn.Parameter(_drawn(features, 1), requires_grad=False)

    def inject(self, inputs: Tensor, graph: GraphInput) -> Tensor:
        """Return B (N, m) for `inputs` U (N, p)."""
        return propagate(inputs, self.omega_1(), graph) + nn.functional.linear(inputs, self.omega_2())

    def bind(self, injection: Tensor, graph: GraphInput) -> NodeMap:
        """Return f of states (1, N, m) for `injection` (N, m)."""
        return node_map(_projected(self.W(), row_bound(self.kappa, graph)), injection, graph)


def _drawn(features: int, columns: int) -> Tensor:
    """Return a weight (m, columns) drawn uniformly within 1 / sqrt(m)."""
    bound = 1 / math.sqrt(features)
    return torch.empty(features, columns).uniform_(-bound, bound)


def propagate(inputs: Tensor, weight: Tensor, graph: GraphInput) -> Tensor:
    """Return A^T U Omega^T (N, m) for `inputs` U (N, p), `weight` Omega (m, p); A^T multiplies the narrower matrix."""
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
    """Return the rows of `weight` (m, p), each projected onto the L1 ball of `radius`; rows inside do not change.

    Soft-thresholding sign(w) max(|w| - theta, 0), with theta from the sorted magnitudes.

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
    """Return the projected rows; the gradient passes to `weight` unchanged."""
    if not torch.is_grad_enabled():
        return project_rows(weight, radius)
    return project_rows(weight.detach(), radius) + (weight - weight.detach())


def row_bound(kappa: float, graph: GraphInput) -> float:
    """Return the bound of |W|_inf; a graph without cycles has the radius 0, and needs none."""
    return kappa / graph.radius if graph.radius > 0 else math.inf


def check_kappa(kappa: float) -> None:
    """Raise ValueError unless `kappa` is in (0, 1)."""
    check_number("kappa", kappa, "(0, 1)", also=": it bounds |W|_inf rho(|A|), which a contraction keeps below 1")
