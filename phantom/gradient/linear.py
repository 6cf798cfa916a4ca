"""f at one point: its value with a graph, the products with its Jacobian, and the tensors that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from phantom.runtime.host import TORCH
from phantom.runtime.watching import Watching
from phantom.state import FlatMap

TF32 = 2.0**-10  # the rounding of a product in TF32, which a GPU may take for float32


class Linearisation:
    """One evaluation of f with a graph, at a point of its own. J = df/dz, outputs as rows, problem by problem.

    Args:
        f: map of (B, D) tensors.
        z: (B, D) the point.

    Attributes:
        z: the point, a leaf.
        fz: f(z), with a graph to z and to what f reads.
        inputs: tensors with a graph that f reads from outside: parameters and input.
        is_frozen: whether there is none, so that f(z) has no gradient but that of z.
    """

    def __init__(self, f: FlatMap, z: Tensor) -> None:
        self.z = z.detach().requires_grad_()
        with Readings(self.z) as readings:
            self.fz = f(at(self.z))
        self.inputs = readings.tensors
        self.is_frozen = not self.fz.requires_grad or not (self.inputs or readings.missed(self.fz))


def at(z: Tensor) -> Tensor:
    """Return the leaf `z` for f to read: torch's FLOP counter refuses products with the graph of a module's leaf."""
    return z.view_as(z)


def vjp(fz: Tensor, z: Tensor, u: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return (dfz/dz)^T u, zeros where `fz` does not depend on `z`."""
    if not fz.requires_grad:
        return torch.zeros_like(z)
    (product,) = torch.autograd.grad(fz, z, u, retain_graph=True, create_graph=create_graph, materialize_grads=True)
    return product


def agree(now: Tensor, before: Tensor, computed_in: torch.dtype | None) -> bool:
    """Return whether two evaluations of f agree to half of the digits of its arithmetic; the host waits for that."""
    dtype = computed_in or before.dtype
    coarse = TF32 if before.is_cuda else torch.finfo(torch.float32).eps  # f may compute a part in float32
    eps = max(torch.finfo(dtype).eps, coarse)
    difference = torch.linalg.vector_norm(now - before)
    return not bool(difference > eps**0.5 * torch.linalg.vector_norm(before))  # true of values that are not finite


def partial_vjps(fz: Tensor, inputs: Sequence[Tensor], u: Tensor, *, fixed: Tensor) -> Sequence[Tensor | None]:
    """Return (dfz/dx)^T u with a graph for every x of `inputs`, the others and `fixed` held, though x may make them."""
    nodes = {node for tensor in (*inputs, fixed) if (node := tensor.grad_fn) is not None}
    stops = [node.register_prehook(lambda gradients: (None,) * len(gradients)) for node in nodes]
    try:
        return torch.autograd.grad(fz, inputs, u, create_graph=True, allow_unused=True)
    finally:
        for stop in stops:
            stop.remove()


def leads_elsewhere(fz: Tensor, z: Tensor) -> bool:
    """Return whether the graph of `fz` leads to another leaf than `z`."""
    pending, seen = [fz.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", z) is not z:
            return True
        pending.extend(before for before, _ in node.next_functions)
    return False


def edge_of(tensor: Tensor) -> tuple[Node, int]:
    """Return where the gradient of `tensor` goes: a node, and which of its outputs the tensor is."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


class Readings(Watching):
    """Collect the tensors with a graph that a map of `z` reads from outside.

    torch numbers the nodes that a thread makes in their order: what was there before the map ran has a lower number.
    What compiled or scripted code reads is not seen; `missed` finds it.

    Args:
        outside: nodes of which it is known that they were there: a backward runs in a thread of its own on a GPU.
    """

    def __init__(self, z: Tensor, outside: Iterable[Node] = ()) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self._outside = {*outside}
        self._own = [z]  # leaves that the map makes itself, as a solve inside of it does
        self._known = {id(z)}
        node: Any = z.view_as(z).grad_fn
        self._first = node._sequence_nr()

    def read(self, tensor: Tensor) -> None:
        if torch.is_grad_enabled() and self._is_reading(tensor):
            self._keep(tensor, self.tensors)

    def made(self, out: Any) -> None:
        is_leaf = isinstance(out, Tensor) and out.requires_grad and out.grad_fn is None
        if torch.is_grad_enabled() and is_leaf and self._is_new(out):
            self._keep(out, self._own)

    def _is_reading(self, tensor: Tensor) -> bool:
        return tensor.requires_grad and self._is_new(tensor) and self._is_outside(tensor.grad_fn)

    def _is_new(self, tensor: Tensor) -> bool:
        # what a transform of torch.func inside the map wraps has an edge in that transform alone
        return id(tensor) not in self._known and not TORCH._functorch.is_functorch_wrapped_tensor(tensor)

    def _keep(self, tensor: Tensor, where: list[Tensor]) -> None:
        self._known.add(id(tensor))
        where.append(tensor)

    def missed(self, fz: Tensor) -> bool:
        """Return whether the graph of the map's value `fz` leads to a tensor that was not seen."""
        known = {edge_of(tensor) for tensor in (*self._own, *self.tensors)}
        pending: list[Any] = [edge_of(fz)]
        seen = set()
        while pending:
            edge = pending.pop()
            if edge[0] is None or edge in seen or edge in known:
                continue
            if self._is_outside(edge[0]):
                return True
            seen.add(edge)
            pending.extend(edge[0].next_functions)
        return False

    def _is_outside(self, node: Node | None) -> bool:
        if node is None or node in self._outside or hasattr(node, "variable"):
            return True
        return node._sequence_nr() < self._first
