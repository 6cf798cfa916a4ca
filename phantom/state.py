"""The two forms of a state: what f sees (a tensor, or a collection of them) and what solvers see (B, D)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from phantom.runtime.precision import autocast_dtype

# a tensor, or tuples, lists, dicts and namedtuples of tensors, nested as they may be
State = Any
Map = Callable[[State], State]
FlatMap = Callable[[Tensor], Tensor]


class Packing:
    """Translate between the user's state and one (B, D) tensor in at least float32.

    Raises:
        TypeError: `z0` is neither a floating-point tensor nor a collection of them.
        ValueError: the parts disagree on B, dtype or device.
    """

    def __init__(self, z0: State) -> None:
        parts, self._spec = _flatten(z0)
        _check_parts(z0, parts)
        self._keys = [*map(str, z0)] if isinstance(z0, Mapping) else []
        self.joins = len(parts) > 1  # packing is a concatenation, into new memory
        self.dtype = parts[0].dtype
        self.device = parts[0].device
        self.flat_dtype = torch.promote_types(self.dtype, torch.float32)
        self.batch = parts[0].shape[0]
        # a channels_last part is flattened in its own memory order, so that packing and unpacking never transpose
        self._channels_last = [_is_channels_last(part) for part in parts]
        self._shapes = [p.shape for p in parts]
        self._sizes = [p.shape[1:].numel() for p in parts]
        # a (B, D) tensor in solver precision is its own packing
        self._is_flat = self._spec is None and parts[0].dim() == 2 and self.dtype == self.flat_dtype

    def computed_in(self) -> torch.dtype | None:
        """Return the arithmetic of f under the autocast that is active now, where it is coarser than the solver's."""
        if self.dtype == torch.float64:  # which autocast leaves alone
            return None
        coarse = max((self.dtype, autocast_dtype(self.device.type) or self.dtype), key=lambda d: torch.finfo(d).eps)
        return coarse if torch.finfo(coarse).eps > torch.finfo(self.flat_dtype).eps else None

    def pack(self, z: State) -> Tensor:
        """Return `z` as one (B, D) tensor in solver precision."""
        if self._is_flat and isinstance(z, Tensor) and z.shape == self._shapes[0] and z.dtype == self.dtype:
            return z
        parts, spec = _flatten(z)
        if spec != self._spec or [part.shape if isinstance(part, Tensor) else None for part in parts] != self._shapes:
            raise ValueError(f"f must return the form of z0, {self._wanted()}, got {form_of(z)}")
        if not all(part.is_floating_point() for part in parts):
            raise TypeError(f"f must return floating-point numbers, got {form_of(z)}")
        flat = [
            (p.permute(0, 2, 3, 1) if last else p).reshape(self.batch, size)
            for p, last, size in zip(parts, self._channels_last, self._sizes, strict=True)
        ]
        return (flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)).to(self.flat_dtype)

    def unpack(self, flat: Tensor, *, copy: bool = False) -> State:
        """Return the (B, D) tensor in the form and dtype of `z0`, as views where the dtype is the same or as copies."""
        if self._is_flat:
            return flat.clone(memory_format=torch.contiguous_format) if copy else flat
        parts = []
        # the backward of a split copies, even of one into one
        pieces = (flat,) if len(self._sizes) == 1 else flat.split(self._sizes, dim=1)
        for piece, shape, last in zip(pieces, self._shapes, self._channels_last, strict=True):
            if last:
                piece = piece.reshape(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
            else:
                piece = piece.reshape(shape)
            if copy:
                kind = torch.preserve_format if last else torch.contiguous_format
                parts.append(piece.to(self.dtype, copy=True, memory_format=kind))
            else:
                parts.append(piece.to(self.dtype))
        return self._join(parts)

    def wrap(self, f: Map) -> FlatMap:
        """Return f as a map of (B, D) tensors, run under the autocast that is active now.

        The solver's own arithmetic switches autocast off around its loop; f keeps the caller's.
        """
        if not callable(f):
            raise TypeError(f"f must be a map of states, got {form_of(f)}: pass f itself, and not its value f(z)")
        device = self.device.type
        dtype = autocast_dtype(device)

        def flat_f(z: Tensor) -> Tensor:
            with torch.autocast(device, dtype=dtype):
                return self.pack(f(self._arguments(z)))

        if dtype is not None:
            return flat_f
        return (lambda z: self.pack(f(z))) if self._is_flat else lambda z: self.pack(f(self._arguments(z)))

    def _arguments(self, z: Tensor) -> State:
        """Unpack `z` for f. With grad enabled, copy each part of a tuple, so that it is contiguous.

        The parts are slices. A convolution copies a slice, and one that is kept for the backward again in every vjp.
        """
        parts = self.unpack(z)
        if not self.joins or not torch.is_grad_enabled():
            return parts
        formats = (torch.preserve_format if last else torch.contiguous_format for last in self._channels_last)
        leaves = zip(_flatten(parts)[0], formats, strict=True)
        return self._join([part.clone(memory_format=kind) for part, kind in leaves])

    def _join(self, parts: list[Tensor]) -> State:
        """Return these parts in the form of `z0`."""
        if self._spec is None:
            return parts[0]
        return tuple(parts) if self._spec is tuple else pytree.tree_unflatten(parts, self._spec)

    def _wanted(self) -> str:
        shapes = ", ".join(str(tuple(shape)) for shape in self._shapes)
        if self._spec is None:
            return f"a tensor {shapes}"
        if self._spec is tuple:
            return f"a tuple of tensors {shapes}"
        keys = f", with the keys {', '.join(self._keys)} in order" if self._keys else ""
        return f"a {self._spec.type.__name__} of tensors {shapes}{keys}"


def _check_parts(z0: State, parts: list[Any]) -> None:
    """Raise TypeError or ValueError where `parts` are not those of a state: see `Packing`."""
    if not parts or not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts):
        way = (
            "z0=torch.zeros(B, ...) or z0=(zeros_1, zeros_2, ...); lists, dicts and nested ones are fine, too, and "
            "dataclasses that torch.export.register_dataclass knows"
        )
        if any(isinstance(part, Tensor) and part.is_complex() for part in parts):
            way = "z0=torch.view_as_real(z0), and let f begin with torch.view_as_complex and end with view_as_real"
        raise TypeError(
            f"z0 must be a floating-point tensor or a non-empty tuple of them, got {form_of(z0)}: pass {way}"
        )
    if any(part.is_nested or part.layout != torch.strided for part in parts):
        raise TypeError(
            "z0 must be of dense tensors, neither nested nor sparse: pad what is ragged, and let f set the padding "
            "to zero by a mask"
        )
    if any(hasattr(part, "device_mesh") for part in parts):
        raise TypeError(
            "z0 must be of plain tensors, and this is a DTensor: solve the local part of every rank, z0.to_local(), "
            "and let f return local tensors, as tensor-parallel layers do with use_local_output=True"
        )
    if any(part.dim() < 1 or part.shape[0] != parts[0].shape[0] for part in parts):
        raise ValueError(
            f"the parts of z0 must share the leading axis B, got shapes {[tuple(p.shape) for p in parts]}: parts "
            "of one problem without such an axis get one by z0[None]"
        )
    if any(part.dtype != parts[0].dtype or part.device != parts[0].device for part in parts):
        raise ValueError(
            f"the parts of z0 must share dtype and device, got {[(str(p.dtype), str(p.device)) for p in parts]}: "
            "convert them with .to(dtype), and those that f wants in another one inside f"
        )


def _flatten(z: State) -> tuple[list[Any], Any]:
    """Return the parts of a state, and its form: None of a tensor, `tuple` of a plain tuple, else what pytree says."""
    if isinstance(z, Tensor):
        return [z], None
    if type(z) is tuple and all(isinstance(part, Tensor) for part in z):
        return list(z), tuple
    parts, spec = pytree.tree_flatten(z)
    return parts, None if spec.is_leaf() else spec


def _is_channels_last(part: Tensor) -> bool:
    # problem by problem: the parts of an unpacked tuple state are slices, dense within each problem only
    return (
        part.dim() == 4
        and part.shape[0] > 0
        and not part[0].is_contiguous()
        and part[0].permute(1, 2, 0).is_contiguous()
    )


def form_of(z: object) -> str:
    """Return what `z` is, for a message."""
    if isinstance(z, Tensor):
        return f"a tensor {tuple(z.shape)} of {z.dtype}"
    if isinstance(z, Mapping):
        return f"a {type(z).__name__} of ({', '.join(f'{name}: {form_of(part)}' for name, part in z.items())})"
    if isinstance(z, (tuple, list)):
        return f"a {type(z).__name__} of ({', '.join(form_of(part) for part in z)})"
    return type(z).__name__
