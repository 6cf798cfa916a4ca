"""Rounds of data: a run belongs to what it read, and not to the name of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from scripts.drilling.room import Room, contents, hold
from scripts.drilling.rounds import drill
from scripts.drilling.trees import IMAGES, plant

LONG = ("steps=40", "epochs=40")


def _other(root: Path) -> Path:
    """Copy a tree of pictures, and draw one of them larger."""
    from PIL import Image

    other = Path(shutil.copytree(root, root.with_name("andere Bilder, größer")))
    Image.linear_gradient("L").convert("RGB").save(other / "train" / "n01" / "0.JPEG")
    return other


def _refused(room: Room, other: Path, *items: str) -> None:
    before = contents(room.run)
    mine, room.items = room.items, (f"data.root={other}",)
    room.start(*items, data=IMAGES).hold_refused("is of other data than these", str(other))
    room.items = mine
    after = contents(room.run)
    kept = [name for name in before if name != "run.lock" and before[name] != after.get(name)]
    hold(not kept, f"changed: {', '.join(kept)}")


@drill("other-data-resumed")
def other_data_resumed(room: Room) -> None:
    """Other data under the same name do not resume a killed run: refused, nothing changed, and its own data do."""
    root = plant(room)
    room.kill(*LONG, rows=3, data=IMAGES)
    _refused(room, _other(root), *LONG)
    room.finish(*LONG, data=IMAGES)


@drill("other-data-finished")
def other_data_finished(room: Room) -> None:
    """Other data under the same name do not count as finished: refused, and nothing changed."""
    root = plant(room)
    room.finish(data=IMAGES)
    _refused(room, _other(root))


@drill("data-moved")
def data_moved(room: Room) -> None:
    """Data that only moved are the same: the run is finished, at once."""
    root = plant(room)
    room.finish(data=IMAGES)
    before = (room.run / "record.json").read_bytes()
    room.items = (f"data.root={root.rename(root.with_name('umgezogen (1)'))}",)
    job = room.finish(data=IMAGES)
    hold("this run is finished" in job.text and before == (room.run / "record.json").read_bytes(), job.text)
