"""Which tensors a map takes from outside: what it hands to torch's functions, and whose parts it asks for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Watching(TorchFunctionMode):
    """Call `read` with every tensor that a function of torch takes while this is entered, and `made` with its value."""

    def read(self, tensor: Tensor) -> None: ...

    def made(self, out: Any) -> None: ...

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        is_getter = func.__name__ == "__get__"
        if not is_getter:
            self._walk((*args, *kwargs.values()))
        out = func(*args, **kwargs)
        if is_getter and isinstance(out, Tensor):  # its transpose, say; to read its shape is not to read a tensor
            self._walk(args)
        self.made(out)
        return out

    def _walk(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, (tuple, list)):
                self._walk(value)
            elif isinstance(value, Tensor):
                self.read(value)
