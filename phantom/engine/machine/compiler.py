"""Whether torch.compile works on this machine, before a run needs it."""

from __future__ import annotations

import torch

from phantom.engine.errors import first_line


def check_compiler(device: torch.device, name: str) -> None:
    """Raise unless torch compiles and runs a small function on `device`; seconds, and less where torch has it cached.

    torch looks for a compiler only when it has traced a whole model, and its error is then a page long.

    Args:
        name: the setting that asks for it, for the message.

    Raises:
        ValueError: there is no compiler, or it does not work.
    """
    try:
        torch.compile(_probe, fullgraph=True)(torch.ones(4, device=device))
    except Exception as error:  # of torch's compilers, whose classes change between versions, or of the system
        reason = first_line(error)
        needs = "a C++ compiler, such as g++, or the one that the environment variable CXX names"
        if device.type == "cuda":
            needs = "triton and a C compiler"
        raise ValueError(
            f"{name}=true needs {needs}, and torch cannot compile here ({reason}): install it, or leave {name}=false"
        ) from error


def can_compile(device: torch.device) -> bool:
    """Return whether torch compiles and runs a small function on `device`."""
    try:
        check_compiler(device, "compile")
    except ValueError:
        return False
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return 2 * x.sin() + 1
