"""Counters of what makes the host wait for a device; no GPU is needed for that."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Syncs(TorchDispatchMode):
    """Count the operations that wait for the device, or upload from the host (indexing by a Python list)."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal")
    UPLOADING = ("lift_fresh", "_index_put_impl_", "index_put_", "index_put", "index")

    def __init__(self) -> None:
        super().__init__()
        self.waiting, self.uploading = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.waiting += name in self.WAITING
        self.uploading += name in self.UPLOADING
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Count the calls of `tolist`, which waits as well; on a CPU it dispatches no operation."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.waiting += func is Tensor.tolist
        return func(*args, **(kwargs or {}))
