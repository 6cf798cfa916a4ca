"""The one dialect of the commands here: `key=value` items as for train.py, bare words, and --help."""

from __future__ import annotations

import io
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

Default = TypeVar("Default")


class Arguments(NamedTuple):
    """A command line, taken apart.

    Args:
        own: the items whose key belongs to the command.
        words: the bare words.
        overrides: all other items, for train.py.
    """

    own: dict[str, str]
    words: list[str]
    overrides: list[str]


def split(
    arguments: Sequence[str], *, doc: str | None, own: Sequence[str] = (), words: Sequence[str] = ()
) -> Arguments:
    """Take a command line apart; print `doc` and end the program where --help is asked for.

    Args:
        own: keys of the command itself.
        words: bare words that are allowed.
    """
    _check_tree()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it was closed before the program began
            stream.reconfigure(errors="replace")  # a table has characters that ASCII lacks
    if {"-h", "--help"} & set(arguments):
        print((doc or "").strip())
        raise SystemExit(0)
    found = Arguments({}, [], [])
    for item in arguments:
        key, equals, value = item.partition("=")
        if item.startswith("-"):
            fail(f"{item} is not known: there are no flags here but --help; write key=value")
        if not equals:
            if item not in words:
                allowed = f"neither one of {', '.join(words)}, nor" if words else "not"
                fail(f"{item!r} is {allowed} of the form key=value; see --help")
            found.words.append(item)
        elif key not in own:
            found.overrides.append(item)
        elif key in found.own:
            fail(f"{key} is given twice: {key}={found.own[key]} and {item}")
        else:
            found.own[key] = value
    return found


def _check_tree() -> None:
    """Refuse a script of another tree than that of its packages: it would run, and record, other code than it shows."""
    started, here = Path(sys.argv[0]).resolve().parent, Path(__file__).resolve().parent
    if started.name == here.name and started != here:
        fail(
            f"{sys.argv[0]} would run the code of {here.parent}, where this Python finds its packages: use the "
            f"environment of its own tree (bash {started / 'setup.sh'} makes one), or set PYTHONPATH={started.parent}"
        )


def count(own: dict[str, str], key: str, default: Default, least: int = 1) -> int | Default:
    """Return the integer of an item, or the default where it is not given."""
    if key not in own:
        return default
    if not own[key].isdecimal() or int(own[key]) < least:
        fail(f"{key}={own[key]} must be an integer >= {least}")
    return int(own[key])


def fraction(own: dict[str, str], key: str, default: float) -> float:
    """Return the number between 0 and 1 of an item, or the default where it is not given."""
    try:
        value = float(own.get(key, default))
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        fail(f"{key}={own[key]} must be a number above 0, at most 1")
    return value


def choice(own: dict[str, str], key: str, allowed: Sequence[str], default: Default) -> str | Default:
    """Return the value of an item, or the default where it is not given."""
    if key in own and own[key] not in allowed:
        fail(f"{key}={own[key]} is not known; choose {' or '.join(allowed)}")
    return own.get(key, default)


def output(own: dict[str, str]) -> Path | None:
    """Return the JSON file that `out` names, or None; what is measured first would be lost if it could not be written.

    Its folder is made.
    """
    if "out" not in own:
        return None
    path = Path(own["out"])
    if path.suffix != ".json" or path.is_dir():
        fail(f"out={path} must be a file that ends in .json; its page is written beside it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        fail(f"out={path} cannot be written: {path.parent}: {error.strerror}")


def some(own: dict[str, str], key: str, allowed: Sequence[str], where: str) -> list[str]:
    """Return the comma-separated names of an item, or all that are allowed where it is not given."""
    if key not in own:
        return list(allowed)
    wanted = list(dict.fromkeys(own[key].split(",")))
    unknown = [name for name in wanted if name not in allowed]
    if unknown:
        fail(f"{where} has no {key.removesuffix('s')} {', '.join(unknown)}; it has {', '.join(allowed)}")
    return wanted


def fail(message: str) -> NoReturn:
    """End the program with one sentence for the user."""
    # a name in a file from elsewhere may hold characters that a terminal obeys
    shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", message)
    sys.exit(f"error: {shown}")
