"""Ask a map what is wrong with it: the questions that a solve and an estimator cannot afford to ask at every step."""

from __future__ import annotations

from functools import partial
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from phantom.runtime import transforms
from phantom.runtime.host import is_traced
from phantom.runtime.watching import Watching
from phantom.state import FlatMap, Map, Packing, State, form_of

CHANGES = (
    "f is random, or remembers earlier calls: two evaluations at the same z differ. Draw masks once per solve, outside "
    "of f (phantom.variational_mask), and give its layers no cache, so that f stays one map."
)


def check(f: Map, z0: State) -> list[str]:
    """Return in sentences what is wrong with `f` as a map of states like `z0`; an empty list where nothing was found.

    f is evaluated about 7 + 2 log2(B) times: it must return the form and dtype of z0, leave its argument and its
    buffers alone, give the same value again, and with a graph as without, treat the B problems apart, depend on z, and
    lead its graph to z and to every parameter that it reads. The state of the random generators and the buffers are as
    before afterwards.

    Args:
        f: closed map, as for `fixed_point`.
        z0: a tensor or a collection of tensors with a leading axis of B independent problems.

    Raises:
        TypeError, ValueError: `z0` is no state, as in `fixed_point`.
        RuntimeError: under inference mode or a transform of torch.func.
    """
    if torch.is_inference_mode_enabled() or transforms.are_active():
        raise RuntimeError("phantom.check looks at the graph of f: call it outside of inference mode and torch.func")
    packing = Packing(z0)
    devices = [packing.device] if packing.device.type == "cuda" else []
    reads = _Reads(_names(f))

    def watched(z: State) -> State:
        reads.own(z)
        with reads:
            return f(z)

    with torch.random.fork_rng(devices):
        try:
            return _findings(watched, packing, packing.pack(z0).detach().clone(), reads)
        finally:
            reads.restore()


def _findings(f: Map, packing: Packing, z: Tensor, reads: _Reads) -> list[str]:
    def evaluate(z: Tensor) -> Tensor:
        return packing.pack(f(_state(packing, z))).clone()

    with torch.no_grad():
        argument = _state(packing, z)
        parts, form = pytree.tree_flatten(argument)  # f may change the collection, which is its own at every call
        copies = [part.clone() for part in parts]
        versions = [part._version for part in parts]
        fz = f(argument)
        found = _form(fz, pytree.tree_unflatten(parts, form))
        if found:
            return found
        fz = packing.pack(fz).clone()
        written = any(part._version != version for part, version in zip(parts, versions, strict=True))
        if written or not all(map(_same, parts, copies)):
            found.append("f writes its argument: use out-of-place operations, nn.ReLU(inplace=False) for one.")
        moved = reads.moved()
        if moved:
            found.append(
                f"f moves what it reads, {', '.join(moved)}: every evaluation does, so its value after a solve depends "
                "on the number of steps. Freeze running statistics inside f (eval mode), or normalise without them."
            )
        if not fz.isfinite().all():
            return [*found, "f(z0) is not finite: nothing else can be told from there."]
        again = evaluate(z)
    with torch.enable_grad():
        leaf = z.clone().requires_grad_()
        with_graph = evaluate(leaf)
    if not _same(again, fz):
        found.append(CHANGES)
    else:
        # a solve inside f returns another iterate with a graph, within its tolerance
        if not _same(with_graph.detach(), fz, tol=torch.finfo(z.dtype).eps ** 0.5):
            found.append("f gives another value with a graph than under no_grad: the gradient is that of another map.")
        with torch.no_grad():
            found += _dependence(evaluate, z, fz)
    return found + _graph(with_graph, leaf, reads)


def _state(packing: Packing, z: Tensor) -> State:
    """Return `z` (B, D) in the form of f, each part in memory of its own."""
    return pytree.tree_map(Tensor.clone, packing.unpack(z))


def _dependence(f: FlatMap, z: Tensor, fz: Tensor) -> list[str]:
    if z.numel() == 0:
        return []
    step = torch.randn_like(z) * (0.1 * z.square().mean().sqrt() + 0.01)
    if _same(f(z + step), fz):
        return ["f does not depend on z: its fixed point is f(z0), and no solve is needed."]
    if not _same(f(z), fz):
        return [CHANGES]
    rows = torch.arange(len(z), device=z.device)
    for bit in range((len(z) - 1).bit_length()):
        for value in (0, 1):
            moved = (rows >> bit) % 2 == value
            other = f(torch.where(moved[:, None], z + step, z))
            if not _same(other[~moved], fz[~moved]):
                return [
                    "f couples the rows of z: one problem changes another, and each is stopped and measured alone. Pass"
                    " what belongs together as one problem, z[None], or normalise each problem for itself."
                ]
    return []


def _graph(with_graph: Tensor, leaf: Tensor, reads: _Reads) -> list[str]:
    """Return what the graph of f does not reach, of all that f has read."""
    wanted = [leaf, *(tensor for tensor in reads.tensors.values() if tensor.requires_grad)]
    if with_graph.requires_grad:
        gradients = torch.autograd.grad(with_graph.sum(), wanted, allow_unused=True)
    else:
        gradients = [None] * len(wanted)
    found = []
    if gradients[0] is None:
        found.append(
            "the graph of f does not lead to z: every estimator takes df/dz = 0. Look for detach() or no_grad()."
        )
    cut = [reads.name(tensor) for tensor, gradient in zip(wanted[1:], gradients[1:], strict=True) if gradient is None]
    if cut:
        found.append(
            f"f reads {', '.join(cut)}, which needs a gradient, and its graph does not lead there: it would never be "
            "trained. Look for detach(), .data or no_grad() inside f."
        )
    return found


def _form(fz: Any, z: State) -> list[str]:
    parts, wanted = _parts(fz), _parts(z)
    if pytree.tree_structure(fz) != pytree.tree_structure(z) or not all(isinstance(part, Tensor) for part in parts):
        return [f"f returns {form_of(fz)} for {form_of(z)}: it must return the form of its argument."]
    found = []
    for part, want in zip(parts, wanted, strict=True):
        if part.shape != want.shape:
            found.append(f"f changes the shape of its state from {tuple(want.shape)} to {tuple(part.shape)}.")
        # autocast gives its own to a map that ends in a linear layer, and the solve takes it
        if part.dtype != want.dtype and not torch.is_autocast_enabled(want.device.type):
            found.append(f"f changes the dtype of its state from {want.dtype} to {part.dtype}.")
        if part.device != want.device:
            found.append(f"f moves its state from {want.device} to {part.device}.")
    return found


def _parts(z: Any) -> tuple[Any, ...]:
    return tuple(pytree.tree_leaves(z))


def _same(a: Tensor, b: Tensor, tol: float | None = None) -> bool:
    """Return whether two tensors agree, by default up to the rounding of sums taken in another order."""
    tol = 100 * torch.finfo(a.dtype).eps if tol is None else tol
    scale = b.abs().amax() if b.numel() else 1.0
    return bool(((a - b).abs() <= tol * scale).all())


class _Reads(Watching):
    """Keep every tensor that f reads from outside, and what a buffer was before f ran."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names = names
        self.tensors: dict[int, Tensor] = {}
        self._own: dict[int, Tensor] = {}
        self._before: dict[int, Tensor] = {}

    def made(self, out: Any) -> None:
        self.own(out)

    def own(self, values: Any) -> None:
        """Take these tensors for made inside; one read from outside before stays so."""
        for value in _parts(values):
            if isinstance(value, Tensor) and id(value) not in self.tensors:
                self._own[id(value)] = value

    def read(self, tensor: Tensor) -> None:
        if is_traced(tensor) or id(tensor) in self._own or id(tensor) in self.tensors:
            return  # torch.func inside f makes tensors of its own
        self.tensors[id(tensor)] = tensor
        # neither a sparse adjacency matrix nor a quantised weight is a buffer that moves, or can be compared
        if not tensor.requires_grad and tensor.layout == torch.strided and type(tensor) in (Tensor, nn.Parameter):
            self._before[id(tensor)] = tensor.detach().clone()

    def moved(self) -> list[str]:
        return [self.name(self.tensors[key]) for key, old in self._before.items() if not _equal(self.tensors[key], old)]

    def restore(self) -> None:
        with torch.no_grad():
            for key, old in self._before.items():
                if not _equal(self.tensors[key], old):
                    self.tensors[key].copy_(old)

    def name(self, tensor: Tensor) -> str:
        return self._names.get(id(tensor), f"a tensor of shape {tuple(tensor.shape)}")


def _names(f: Any) -> dict[int, str]:
    """Return the names of the tensors of those modules that `f` is, is a method of, or reads by a name of its own."""
    inner = f.func if isinstance(f, partial) else f
    holders = [inner, getattr(inner, "__self__", None)]
    code, scope = getattr(inner, "__code__", None), getattr(inner, "__globals__", {})
    holders += [scope.get(name) for name in code.co_names] if code else []
    holders += [cell.cell_contents for cell in getattr(inner, "__closure__", None) or () if not _is_empty(cell)]
    names = {}
    for module in holders:
        if isinstance(module, nn.Module):
            names |= {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    return names


def _is_empty(cell: CellType) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:
        return True


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or (bool((a.isnan() & b.isnan()).any()) and torch.allclose(a, b, 0, 0, equal_nan=True))
