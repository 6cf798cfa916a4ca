"""Rounds of files: what is deleted, cut short or cannot be written costs steps at most, and is said."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from scripts.drilling.room import Room, contents, hold, hold_same
from scripts.drilling.rounds import drill


def _goes_on(room: Room, sentence: str) -> None:
    job = room.finish()
    hold(sentence in job.text and "Traceback" not in job.text, job.text)
    hold_same(room.run)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@drill("last-deleted")
def last_deleted(room: Room) -> None:
    """last.pt deleted: the newest intact one is chosen, said, and leads to the same numbers."""
    (room.kill(rows=11) / "last.pt").unlink()
    _goes_on(room, "the newest intact checkpoint is")


@drill("last-cut")
def last_cut(room: Room) -> None:
    """last.pt cut in half: the same, and the damaged file is kept."""
    _cut(room.kill(rows=11) / "last.pt")
    _goes_on(room, "the newest intact checkpoint is")
    hold((room.run / "last.damaged").exists(), "the damaged file is gone")


@drill("last-flipped")
def last_flipped(room: Room) -> None:
    """One bit of a weight in last.pt flipped: noticed, and the same."""
    path = room.kill(rows=11) / "last.pt"
    content = bytearray(path.read_bytes())
    # between the tensors lies padding, where a flipped bit changes nothing
    with zipfile.ZipFile(path) as archive:
        largest = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
    content[content.index(largest) + len(largest) // 2] ^= 16
    path.write_bytes(content)
    _goes_on(room, "the newest intact checkpoint is")


@drill("best-alone")
def best_alone(room: Room) -> None:
    """Only best.pt is left: it goes on from there."""
    folder = room.kill("eval_every=1", "checkpoint_every=1", rows=11)
    best = (folder / "best.pt").exists()
    for path in folder.glob("last*.pt"):
        path.unlink()
    job = room.finish("eval_every=1", "checkpoint_every=1")
    hold(best and "the newest intact checkpoint is best.pt" in job.text, job.text)


@drill("all-damaged")
def all_damaged(room: Room) -> None:
    """No checkpoint is intact: refused, and nothing is trained over them."""
    folder = room.kill(rows=11)
    for path in folder.glob("*.pt"):
        _cut(path)
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    room.start().hold_refused("none is intact either")
    hold(before == {path.name: path.read_bytes() for path in folder.glob("*.pt")}, "the checkpoints were changed")


def _after_a_finished_run(room: Room, damage: Callable[[Path], None], sentence: str) -> None:
    room.finish()
    damage(room.run)
    job = room.finish()
    hold(sentence in job.text and "Traceback" not in job.text, job.text)
    hold_same(room.run)


@drill("record-cut")
def record_cut(room: Room) -> None:
    """record.json cut in half: it does not count, is said, and is written again without training."""
    _after_a_finished_run(room, lambda folder: _cut(folder / "record.json"), "is damaged and does not count")


@drill("config-damaged")
def config_damaged(room: Room) -> None:
    """config.yaml that is not UTF-8: the same."""
    _after_a_finished_run(room, lambda folder: _spoil(folder / "config.yaml"), "is damaged and does not count")


def _spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n")


@drill("rows-damaged")
def rows_damaged(room: Room) -> None:
    """A row of metrics.jsonl that is not UTF-8 is left out and said; the others stay."""
    path = room.kill(rows=11) / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b'{"step": 1, "\xff\xfe\n', *lines[3:]]))
    _goes_on(room, "damaged lines are left out (1)")


@drill("file-too-large")
def file_too_large(room: Room) -> None:
    """A limit on the size of files (EFBIG) is a sentence; what was saved before goes on."""
    # 16 blocks of 1 KiB: rows fit, and a checkpoint does not
    job = room.start(before=("bash", "-c", 'ulimit -f 16; exec "$@"', "bash"))
    job.hold_refused("File too large")
    room.finish()


@drill("wandb-folder")
def wandb_folder(room: Room) -> None:
    """A folder that wandb cannot write to costs its curve alone."""
    folder = room.kill(rows=11)
    (folder / "wandb").write_text("a file in the place of the folder", "utf-8")
    job = room.finish("wandb=offline")
    hold("Traceback" not in job.text, job.text)
    hold_same(room.run)


@drill("wandb-mode")
def wandb_mode(room: Room) -> None:
    """WANDB_MODE=bogus is refused before any work, with what is allowed; what was saved stays."""
    folder = room.kill(rows=11)
    before = contents(folder)
    job = room.start("wandb=auto", "resume=never", environment={"WANDB_MODE": "bogus"})
    job.hold_refused("WANDB_MODE='bogus' is not known; choose one of online, offline")
    hold(before == contents(folder), "files were changed")
