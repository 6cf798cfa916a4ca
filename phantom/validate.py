"""Checks of arguments, for the whole project: each error names the argument, the value got and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from numbers import Integral, Real

ANY = "(-inf, inf)"


def is_number(value: object) -> bool:
    """Return whether `value` is a real number, numpy's included; a bool, or a number in quotes, is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_count(name: str, value: int | None, *, least: int, also: str = "", optional: bool = False) -> None:
    """Raise ValueError unless `value` is an integer >= `least`, or None if `optional`; `also` ends the message."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer >= {least}{also}")


def check_counts(*, least: int, **counts: int) -> None:
    """Raise ValueError unless every keyword is an integer >= `least`."""
    for name, value in counts.items():
        check_count(name, value, least=least)


def check_number(name: str, value: float, allowed: str, *, also: str = "") -> None:
    """Raise ValueError unless `value` is a finite number in `allowed`.

    Args:
        allowed: `>= 0` or `> 0` with any bound, an interval such as `(0, 1]`, or `ANY`.
        also: ends the message, with a reason or with what else is allowed.
    """
    if is_number(value) and math.isfinite(value) and _within(value, allowed):
        return
    kind = "a finite number" if allowed == ANY else f"a number {allowed}" if allowed[0] == ">" else f"in {allowed}"
    raise ValueError(f"{name}={value!r} must be {kind}{also}")


def _within(value: float, allowed: str) -> bool:
    if allowed[0] == ">":
        bound = float(allowed.lstrip(">="))
        return value > bound or (value == bound and allowed.startswith(">="))
    low, high = map(float, allowed[1:-1].split(","))
    return (low < value or (low == value and allowed[0] == "[")) and (
        value < high or (value == high and allowed[-1] == "]")
    )


def check_lam(value: float) -> None:
    """Raise ValueError unless lam is in (0, 1], where Theorem 2 of Geng et al. 2021 holds."""
    check_number("lam", value, "(0, 1]", also=": it weights the new iterate in z <- lam f(z) + (1 - lam) z")


def check_choice(name: str, value: str | None, allowed: Sequence[str | None]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        names = ", ".join("null" if choice is None else choice for choice in allowed)
        raise ValueError(f"{name}={value!r} is not known; choose one of {names}")


def check_flag(name: str, value: bool, *, also: str = "") -> None:
    """Raise ValueError unless `value` is true or false; `also` ends the message."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be true or false{also}")


def check_triton() -> None:
    """Raise ValueError unless Triton is installed."""
    if find_spec("triton") is None:
        raise ValueError("the kernels need Triton, which torch brings on Linux with a GPU: leave them out")


def check_kind(name: str, value: object, kind: type, example: str) -> None:
    """Raise unless `value` is an object of `kind`; `example` makes one."""
    if isinstance(value, type) and issubclass(value, kind):
        raise TypeError(
            f"{name} must be a {kind.__name__}, got the class {value.__name__}: call it, {value.__name__}()"
        )
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__} such as {example}, got {value!r}")
