"""Checks of constructor arguments: each error names the argument, the value got and what is allowed."""

from __future__ import annotations


def is_number(value: object) -> bool:
    """Return whether `value` is an int or a float; a bool, or a number in quotes, is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_count(name: str, value: int, *, least: int) -> None:
    """Raise unless `value` is an integer >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer >= {least}")


def check_lam(value: float) -> None:
    """Raise unless lam is in (0, 1], where Theorem 2 of Geng et al. 2021 holds."""
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"lam={value!r} must be in (0, 1]: it weights the new iterate in z <- lam f(z) + (1 - lam) z")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(allowed)}")
