"""Weights that ship: make them from a finished run, list them, push them to the Hugging Face hub.

    python scripts/publish.py list                                       # what weights/ has
    python scripts/publish.py pack run=<folder> name=<name>              # weights/<name>/, from the run's best.pt
    python scripts/publish.py push name=<name> [repo=<user>/<repository>] [private=true]

    checkpoint=best|last  of the run (default: best)
    trust=<package,...>   of yours; the run's config may build what they define
    repo=                 on the hub (default: phantom-<name> of who is logged in)
    private=true|false    of a repository that is new (default: false)

`pack` evaluates the checkpoint first, and writes nothing unless the number of the run's record comes out again. The
folder has the weights as safetensors, the config, the record and a card. `push` needs `hf auth login`, once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import huggingface_hub
    from huggingface_hub import errors

    from evaluate import WEIGHTS, shipped_folder, shipped_names
    from phantom.engine.artifacts import shipped
    from phantom.engine.errors import CheckpointError, UserError, first_line
    from phantom.engine.machine import streams
    from scripts import arguments
    from scripts.reporting import cards
    from scripts.running import shipping
    from train import CONFIGS
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: `bash scripts/setup.sh` and .venv/bin/python, or pip install -e . -r requirements.txt")

# what each command takes, and cannot do without
TAKES = {"list": (), "pack": ("run", "name", "checkpoint", "trust"), "push": ("name", "repo", "private")}
NEEDS = {"list": (), "pack": ("run", "name"), "push": ("name",)}
# what the hub allows in the name of a repository, which has "phantom-" before it
NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,60}[A-Za-z0-9])?", flags=re.ASCII)


def main(items: Sequence[str]) -> None:
    """List, pack or push."""
    streams.prepare()
    own, words, others = arguments.split(
        items, doc=__doc__, own=sorted({key for keys in TAKES.values() for key in keys}), words=tuple(TAKES)
    )
    if len(words) != 1:
        arguments.fail(f"say one of {', '.join(TAKES)}; see --help")
    (word,) = words
    unused = [*others, *(f"{key}={own[key]}" for key in own if key not in TAKES[word])]
    if unused:
        allowed = ", ".join(f"{key}=" for key in TAKES[word]) or "nothing else"
        arguments.fail(f"{unused[0]} does not go with {word}, which takes {allowed}")
    missing = [key for key in NEEDS[word] if key not in own]
    if missing:
        arguments.fail(f"{word} needs {missing[0]}=; see --help")
    try:
        {"list": _list, "pack": _pack, "push": _push}[word](own)
    except UserError as error:
        arguments.fail(str(error))


def _list(own: dict[str, str]) -> None:
    for name in shipped_names():
        try:
            print(f"{name}: {_line(shipped.read(WEIGHTS / name).record)}")
        except UserError as error:  # one damaged folder hides none of the others
            print(f"{name}: {error}", file=sys.stderr)


def _line(record: Mapping[str, Any]) -> str:
    try:
        return f"{record['metric']} {cards.headline(record)} on {record['weights']['split']}, {record['label']}"
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"its record is not that of a run ({type(error).__name__}: {error})") from error


def _pack(own: dict[str, str]) -> None:
    name, which = own["name"], arguments.choice(own, "checkpoint", ("last", "best"), "best")
    if not NAME.fullmatch(name):
        arguments.fail(f"name={name} must be letters, digits and _.- between them, at most 62 in all")
    trust = own.get("trust")
    record = shipping.pack(Path(own["run"]), WEIGHTS / name, which=which, configs=CONFIGS, trust=trust)
    print(f"{WEIGHTS.name}/{name}: {record['metric']} {cards.headline(record)}, as in the record of the run")


def _push(own: dict[str, str]) -> None:
    private = arguments.choice(own, "private", ("true", "false"), "false") == "true"
    folder = shipped_folder(own["name"])
    shipped.read(folder)  # what is damaged stays here
    api = huggingface_hub.HfApi()
    try:
        repo = own.get("repo") or f"{api.whoami()['name']}/phantom-{folder.name}"
        where = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[shipped.WEIGHTS, cards.NAME, "config.yaml", "record.json"],
            commit_message=f"Add {folder.name}",
        )
    except errors.LocalTokenNotFoundError:
        arguments.fail("nobody is logged in at the Hugging Face hub: `hf auth login` first, or set HF_TOKEN")
    # the base of all errors of the hub's HTTP client, which is another library by version
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        arguments.fail(f"the Hugging Face hub: {first_line(error)}")
    print(f"{own['name']} is at {where}")


if __name__ == "__main__":
    main(sys.argv[1:])
