"""Rounds of picture trees: what lies beside the pictures changes nothing, or is named."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

from scripts.drilling.room import Room, hold
from scripts.drilling.rounds import drill

IMAGES = (
    *("data=imagenet", "recipe=null", "data.crop=16", "data.resize=20", "data.batch_size=4", "data.eval_batch_size=4"),
    *("steps=4", "epochs=4", "log_every=1", "checkpoint_every=1"),
)


def plant(room: Room) -> Path:
    """Make a tree of two classes, and name it for the jobs to come."""
    from PIL import Image

    root = room.folder / "images"
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("n01", "n02")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (24, 24), (30 * i, 90 * label, 60)).save(folder / f"{i}.JPEG")
    room.items = (f"data.root={root}",)
    return root


def _unchanged(room: Room, add: Callable[[Path], None]) -> None:
    root = plant(room)
    room.finish(data=IMAGES)
    before = json.loads((room.run / "record.json").read_bytes())
    add(root)
    room.finish("resume=never", data=IMAGES)
    after = json.loads((room.run / "record.json").read_bytes())
    hold(before["final"] == after["final"], f"{before['final']} became {after['final']}")


@drill("tree-loops")
def loops(room: Room) -> None:
    """Links that lead back add no pictures and no classes: the same training."""

    def add(root: Path) -> None:
        (root / "train" / "again").symlink_to(".")
        (root / "train" / "up").symlink_to("..")
        (root / "val" / "n01" / "up").symlink_to("../..")

    _unchanged(room, add)


@drill("tree-hidden")
def hidden(room: Room) -> None:
    """Hidden folders are no classes: the same training."""

    def add(root: Path) -> None:
        for folder in (root / "train" / ".ipynb_checkpoints", root / "train" / "n01" / ".thumbnails"):
            folder.mkdir()
            (folder / "0.JPEG").touch()

    _unchanged(room, add)


@drill("tree-unreadable")
def unreadable(room: Room) -> None:
    """A picture that cannot be read is named in one line, before the first step or with it."""
    root = plant(room)
    (root / "train" / "n01" / "9.JPEG").symlink_to("nowhere")
    room.start(data=IMAGES).hold_refused("9.JPEG is a link that leads nowhere")


@drill("worker-killed")
def worker_killed(room: Room) -> None:
    """A data worker that is killed is a sentence with the step and a hint, and the same command goes on."""
    plant(room)
    more = ("data.workers=2", "steps=30", "epochs=30")
    job = room.start(*more, data=IMAGES)
    job.until_rows(3)
    job.until(lambda: len(job.children()) > 0)
    for child in job.children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    job.hold_refused("a process that loads data died before step", "data.workers")
    room.finish(*more, data=IMAGES)
