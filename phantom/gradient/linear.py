"""f at one point: its value with a graph, the products with its Jacobian, and the tensors that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from phantom.state import FlatMap


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
            self.fz = f(self.z)
        self.inputs = readings.tensors
        self.is_frozen = not self.fz.requires_grad or not (self.inputs or readings.missed(self.fz, self.z))

    def vjp(self, u: Tensor) -> Tensor:
        """Return J^T u (B, D)."""
        return vjp(self.fz, self.z, u)

    def jvp(self, v: Tensor) -> Tensor:
        """Return J v (B, D): the gradient of J^T u, which is linear in u."""
        with torch.enable_grad():
            u = torch.zeros_like(self.fz).requires_grad_()
            product = vjp(self.fz, self.z, u, create_graph=True)
        return vjp(product, u, v)


def vjp(fz: Tensor, z: Tensor, u: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return (dfz/dz)^T u, zeros where `fz` does not depend on `z`."""
    if not fz.requires_grad:
        return torch.zeros_like(z)
    (product,) = torch.autograd.grad(fz, z, u, retain_graph=True, create_graph=create_graph, materialize_grads=True)
    return product


class Readings(TorchFunctionMode):
    """Collect the tensors with a graph that a map of `z` reads from outside.

    torch numbers the nodes of a graph in the order of their making: what was there before the map ran has a lower one.
    What compiled or scripted code reads is not seen; `missed` finds it.
    """

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self._known = {id(z)}
        self._first = z.view_as(z).grad_fn._sequence_nr()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ != "__get__":  # reading its shape is not reading a tensor
            for tensor in _tensors((*args, *kwargs.values())):
                if tensor.requires_grad and id(tensor) not in self._known and self._is_outside(tensor.grad_fn):
                    self._known.add(id(tensor))
                    self.tensors.append(tensor)
        return func(*args, **kwargs)

    def missed(self, fz: Tensor, z: Tensor) -> bool:
        """Return whether the graph of `fz`, the map at `z`, leads to a tensor that was not seen."""
        known = {torch.autograd.graph.get_gradient_edge(tensor).node for tensor in (z, *self.tensors)}
        pending, seen = [fz.grad_fn], set()
        while pending:
            node = pending.pop()
            if node is None or node in seen or node in known:
                continue
            if self._is_outside(node):
                return True
            seen.add(node)
            pending.extend(following for following, _ in node.next_functions)
        return False

    def _is_outside(self, node: Node | None) -> bool:
        return node is None or hasattr(node, "variable") or node._sequence_nr() < self._first


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
