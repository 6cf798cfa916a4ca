"""Rounds of the command line: paths as they are typed, evaluation, and folders from elsewhere."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from phantom.engine.artifacts import checkpoint
from scripts.drilling.room import Job, Room, hold, hold_same, whole
from scripts.drilling.rounds import drill


def _answer(job: Job) -> dict[str, Any]:
    """Return what evaluate.py has printed, once."""
    hold(job.process.returncode == 0 and job.text.count('"accuracy"') == 1, job.text)
    return json.loads(job.text[job.text.index("{") : job.text.rindex("}") + 1])


def _hold_own_number(folder: Path, found: dict[str, Any]) -> None:
    own = json.loads((folder / "record.json").read_bytes())["final"]["test"]
    hold(found["accuracy"] == own["accuracy"], f"accuracy {found['accuracy']}, the run has {own['accuracy']}")
    hold(abs(found["loss"] - own["loss"]) < 1e-5 * own["loss"], f"loss {found['loss']}, the run has {own['loss']}")


@drill("path-unicode")
def path_unicode(room: Room) -> None:
    """A path with spaces, brackets and other letters works as typed: killed, gone on bit for bit, evaluated."""
    room.runs = room.folder / "Läufe (1) von 実験 & 'mehr'"
    room.kill(rows=11)
    room.finish()
    hold_same(room.run)
    _hold_own_number(room.run, _answer(room.evaluate(f"run={room.run}")))


@drill("evaluate-two-ranks")
def evaluate_two_ranks(room: Room) -> None:
    """evaluate.py under torchrun prints once, and the run's own number."""
    folder = whole(1)
    _hold_own_number(folder, _answer(room.evaluate(f"run={folder}", ranks=2)))


class _Payload:
    """What writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def _hold_harmless(room: Room, job: Job, sentence: str) -> None:
    job.hold_refused(sentence)
    hold(not (room.folder / "pwned").exists(), "code of the folder was run")


@drill("foreign-target")
def foreign_target(room: Room) -> None:
    """A run folder whose config names what is not of the project is refused, and none of it is called."""
    folder = room.folder / "run"
    shutil.copytree(whole(1), folder)
    payload, pwned = room.folder / "payload.pt", room.folder / "pwned"
    payload.write_bytes(pickle.dumps(_Payload(pwned)))
    state = checkpoint.load(folder / "last.pt")
    for group, node in {
        "data": {"_target_": "torch.load", "f": str(payload), "weights_only": False},
        "solver": {"_target_": "phantom.deq.torch.load", "f": str(payload), "weights_only": False},
        "grad": {"_target_": "shutil.copyfile", "src": str(payload), "dst": str(pwned)},
        "schedule": {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": [str(pwned)]}},
        "optimizer": {"_target_": "os.system", "_partial_": True, "command": f"touch {pwned}"},
    }.items():
        config = yaml.safe_dump(yaml.safe_load(state["config"]) | {group: node})
        checkpoint.save(folder / "last.pt", state | {"config": config})
        (folder / "config.yaml").write_text(config, "utf-8")
        _hold_harmless(room, room.evaluate(f"run={folder}"), f"_target_='{node['_target_']}' of the saved config is")


@drill("foreign-pickle")
def foreign_pickle(room: Room) -> None:
    """A checkpoint that would run code when it is read is refused, in an evaluation and as a beginning."""
    folder = room.folder / "run"
    shutil.copytree(whole(1), folder)
    torch.save({"format": checkpoint.FORMAT, "model": _Payload(room.folder / "pwned")}, folder / "last.pt")
    _hold_harmless(room, room.evaluate(f"run={folder}"), "is damaged and cannot be read")
    _hold_harmless(room, room.start(f"init={folder / 'last.pt'}"), "cannot be read as tensors alone")


@drill("no-compiler")
def no_compiler(room: Room) -> None:
    """compile=true without a compiler is a sentence that names what is missing, before any work."""
    job = room.start("compile=true", environment={"CXX": str(room.folder / "no-compiler"), "PATH": str(room.folder)})
    job.hold_refused("compile=true", "a C++ compiler")
    hold(not list(room.runs.rglob("last.pt")), job.text)
