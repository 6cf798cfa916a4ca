"""The errors of a user: each message names the field or file, the value got, what is allowed and the way out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where it has none.

    Where torch refuses to unpickle a file, it gives advice first, and then the reason: that is the line.
    """
    advice, found, reason = str(error).partition("WeightsUnpickler error: ")
    text = reason.partition(". ")[0] if found else advice
    return (text.strip().splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """Return a text without the control characters that a terminal obeys, but for ends of lines and tabs.

    A name in a file from elsewhere may hold them, and paint over what was said before.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


class UserError(ValueError):
    """An error whose message is all that the user needs; the command line prints it without a traceback."""


class ConfigError(UserError):
    """A config that cannot run."""


class DataError(UserError):
    """Data that is missing, damaged or in another layout; raised before training starts."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""


class DivergenceError(UserError):
    """The loss or the gradient stopped being finite."""


class LockedError(UserError):
    """A run folder that another process writes to, or that is no longer where it was."""


@contextmanager
def as_config_error(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Raise what a check or a constructor refuses, a ValueError or one of `kinds`, as a `ConfigError`."""
    try:
        yield
    except (ValueError, *kinds) as error:
        raise ConfigError(f"{prefix}{error}") from error
