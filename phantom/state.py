"""The two forms of a state: what f sees (a tensor, or one tensor per resolution) and what solvers see (B, D)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

State = Tensor | tuple[Tensor, ...]
Map = Callable[[State], State]
FlatMap = Callable[[Tensor], Tensor]


class Packing:
    """Translate between the user's state and one (B, D) tensor in at least float32.

    Raises:
        TypeError: `z0` is neither a floating-point tensor nor a tuple of them.
        ValueError: the parts disagree on B, dtype or device.
    """

    def __init__(self, z0: State) -> None:
        parts = z0 if isinstance(z0, tuple) else (z0,)
        if not parts or not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts):
            raise TypeError(
                f"z0 must be a floating-point tensor or a non-empty tuple of them, got {_form(z0)}: "
                "pass z0=torch.zeros(B, ...) or z0=(zeros_1, zeros_2, ...)"
            )
        if any(part.dim() < 1 or part.shape[0] != parts[0].shape[0] for part in parts):
            raise ValueError(
                f"the parts of z0 must share the leading axis B, got shapes {[tuple(p.shape) for p in parts]}"
            )
        if any(part.dtype != parts[0].dtype or part.device != parts[0].device for part in parts):
            raise ValueError(
                f"the parts of z0 must share dtype and device, got {[(str(p.dtype), str(p.device)) for p in parts]}"
            )
        self.is_tuple = isinstance(z0, tuple)
        self.joins = len(parts) > 1  # packing is a concatenation, into new memory
        self.dtype = parts[0].dtype
        self.device = parts[0].device
        self.flat_dtype = torch.promote_types(self.dtype, torch.float32)
        self.batch = parts[0].shape[0]
        # a channels_last part is flattened in its own memory order, so that packing and unpacking never transpose
        self._channels_last = [_is_channels_last(part) for part in parts]
        self._shapes = [p.shape for p in parts]
        self._sizes = [p.shape[1:].numel() for p in parts]

    def pack(self, z: State) -> Tensor:
        """Return `z` as one (B, D) tensor in solver precision."""
        parts = z if isinstance(z, tuple) else (z,)
        if isinstance(z, tuple) != self.is_tuple or [getattr(part, "shape", None) for part in parts] != self._shapes:
            shapes = [str(tuple(shape)) for shape in self._shapes]
            wanted = f"a tuple of tensors {', '.join(shapes)}" if self.is_tuple else f"a tensor {shapes[0]}"
            raise ValueError(f"f must return the form of z0, {wanted}, got {_form(z)}")
        flat = [
            (p.permute(0, 2, 3, 1) if last else p).reshape(self.batch, size)
            for p, last, size in zip(parts, self._channels_last, self._sizes, strict=True)
        ]
        return (flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)).to(self.flat_dtype)

    def unpack(self, flat: Tensor) -> State:
        """Return the (B, D) tensor in the form and dtype of `z0` (views where the dtype is the same)."""
        parts = []
        # the backward of a split copies, even of one into one
        pieces = (flat,) if len(self._sizes) == 1 else flat.split(self._sizes, dim=1)
        for piece, shape, last in zip(pieces, self._shapes, self._channels_last, strict=True):
            if last:
                piece = piece.reshape(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
            else:
                piece = piece.reshape(shape)
            parts.append(piece.to(self.dtype))
        return tuple(parts) if self.is_tuple else parts[0]

    def wrap(self, f: Map) -> FlatMap:
        """Return f as a map of (B, D) tensors, run under the autocast that is active now.

        The solver's own arithmetic switches autocast off around its loop; f keeps the caller's.
        """
        device = self.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def flat_f(z: Tensor) -> Tensor:
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                return self.pack(f(self._arguments(z)))

        return flat_f if enabled else lambda z: self.pack(f(self._arguments(z)))

    def _arguments(self, z: Tensor) -> State:
        """Return `z` as f shall see it: with a graph, each part in memory of its own, where there are several.

        The parts of a tuple are slices, which a convolution copies; one that is kept for the backward would be copied
        in every vjp anew.
        """
        parts = self.unpack(z)
        if not self.joins or not torch.is_grad_enabled():
            return parts
        formats = (torch.channels_last if last else torch.contiguous_format for last in self._channels_last)
        return tuple(part.contiguous(memory_format=kind) for part, kind in zip(parts, formats, strict=True))


def _is_channels_last(part: Tensor) -> bool:
    # problem by problem: the parts of an unpacked tuple state are slices, dense within each problem only
    return (
        part.dim() == 4 and len(part) > 0 and not part[0].is_contiguous() and part[0].permute(1, 2, 0).is_contiguous()
    )


def _form(z: object) -> str:
    """Return what `z` is, for a message."""
    if isinstance(z, Tensor):
        return f"a tensor {tuple(z.shape)} of {z.dtype}"
    if isinstance(z, (tuple, list)):
        return f"a {type(z).__name__} of ({', '.join(_form(part) for part in z)})"
    return type(z).__name__
