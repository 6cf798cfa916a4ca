"""What importing torch_geometric, whose readers some sets of graphs use, takes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_deprecations() -> Iterator[None]:
    """Hide torch's deprecation warnings, which importing torch_geometric triggers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
