"""Number formats: fp32, tf32 (float32 with TF32 matrix units) and bf16 (autocast)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from phantom.validate import check_choice

PRECISIONS = ("fp32", "tf32", "bf16")


def settle(precision: str, device: str) -> str:
    """Return `precision`, of "auto" that which suits the machine: tf32 on a GPU, fp32 on a CPU.

    Args:
        device: "auto", "cpu" or "cuda", as in the config.
    """
    if precision != "auto":
        return precision
    return "tf32" if device != "cpu" and torch.cuda.is_available() else "fp32"


def set_up(precision: str, *, deterministic: bool) -> None:
    """Set torch's global switches for a run.

    Raises:
        ValueError: `precision` is not one of `PRECISIONS`.
    """
    check_choice("precision", precision, PRECISIONS)
    # only torch's per-backend switches: the solvers set them too, and torch refuses a mix with the older global ones
    kind = "ieee" if precision == "fp32" else "tf32"
    torch.backends.cuda.matmul.fp32_precision = kind
    if torch.cuda.is_available():  # once it is "ieee", torch.export fails in this process (seen with torch 2.14)
        torch.backends.cudnn.conv.fp32_precision = kind  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Return the context a forward pass runs in; solver arithmetic stays in at least float32 inside it."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
