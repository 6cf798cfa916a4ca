"""A damaged or missing file of a run costs the steps since an older one, and never the run."""

import json
import logging
import os

import pytest
import torch

from phantom.engine import command
from phantom.engine.artifacts import checkpoint, lock, records
from phantom.engine.artifacts.journal import MetricsLog, rows
from phantom.engine.config import upgrade
from phantom.engine.errors import CheckpointError, ConfigError
from tests.engine import tiny


def fit(folder, **changes) -> tiny.Trainer:
    run = tiny.trainer(folder, budget=tiny.budget(epochs=3, checkpoint_every=1, **changes))
    run.fit(resume=True)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    fit(folder)
    return folder


def stopped(folder, **changes) -> None:
    """Leave what a run leaves that is killed after step 7 of 9."""
    budget = tiny.budget(epochs=3, checkpoint_every=1, **changes)
    with pytest.raises(tiny.Killed):
        tiny.trainer(folder, budget=budget, source=tiny.Killing(step=7)).fit(resume=True)


def steps(folder) -> dict[str, int]:
    return {path.name: checkpoint.load(path)["step"] for path in sorted(folder.glob("*.pt")) if path.name != "best.pt"}


@pytest.mark.parametrize(
    ("count", "kept"), [(1, [7]), (2, [7, 6]), (3, [7, 6, 5]), (9, [7, 6, 5, 4, 3, 2, 1])], ids=["1", "2", "3", "9"]
)
def test_the_last_n_are_kept(tmp_path, count, kept):
    stopped(tmp_path, keep_checkpoints=count)
    names = ["last.pt", *(f"last-{i}.pt" for i in range(1, len(kept)))]
    assert steps(tmp_path) == dict(zip(names, kept, strict=True))


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
def test_a_save_that_fails_leaves_the_ones_before(tmp_path, monkeypatch, links):
    stopped(tmp_path)

    def refuse(*_):
        raise OSError("not here")

    if not links:
        monkeypatch.setattr("os.link", refuse)
    checkpoint.shift(tmp_path, 2)
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="not here"):
        checkpoint.save(tmp_path / "last.pt", {"step": 8})
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / checkpoint.newest(tmp_path))["step"] == 7


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
def test_kills_in_the_middle_of_writing_cost_no_checkpoint(tmp_path, monkeypatch, count, links):
    """Bits that flip in the newest one, under whatever names, cost that one alone."""
    stopped(tmp_path, keep_checkpoints=count)

    def killed(*_):
        raise tiny.Killed

    def refuse(*_):
        raise OSError("not here")

    if not links:
        monkeypatch.setattr("os.link", refuse)
    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(tiny.Killed):
            patch.setattr("phantom.engine.artifacts.checkpoint.torch.save", killed)
            fit(tmp_path, keep_checkpoints=count)
    assert set(steps(tmp_path).values()) == set(range(7, 7 - count, -1))
    cut(tmp_path / checkpoint.newest(tmp_path))
    assert checkpoint.load(tmp_path / checkpoint.newest(tmp_path))["step"] == 6
    fit(tmp_path, keep_checkpoints=count)
    assert steps(tmp_path) == dict(zip(["last.pt", "last-1.pt", "last-2.pt"], range(9, 9 - count, -1), strict=False))


def delete(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [delete, cut, empty])
@pytest.mark.parametrize(
    ("names", "step"), [(["last.pt"], 6), (["last.pt", "last-1.pt"], None)], ids=["the last", "both"]
)
def test_the_newest_intact_one_is_taken_and_said(tmp_path, whole, caplog, damage, names, step):
    stopped(tmp_path)
    best = checkpoint.load(tmp_path / "best.pt")["step"]
    for name in names:
        damage(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        fit(tmp_path)
    chosen = f"best.pt, of step {best}" if step is None else f"last-1.pt, of step {step}"
    assert f"the newest intact checkpoint is {chosen}" in caplog.text
    assert (tmp_path / "last.damaged").exists() is (damage is not delete)
    for name in ("last.pt", "last-1.pt", "best.pt"):
        found, expected = (checkpoint.load(folder / name) for folder in (tmp_path, whole))
        assert all(tiny.same(found[key], expected[key]) for key in expected.keys() - tiny.CLOCKED), name
    assert tiny.rows(tmp_path) == tiny.rows(whole)


def test_where_none_is_intact_nothing_is_trained_over_them(tmp_path):
    stopped(tmp_path)
    for path in tmp_path.glob("*.pt"):
        cut(path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged.*resume=never.*best\.pt, last-1\.pt, none is int"):
        fit(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_empty_folder_has_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize(
    "line",
    [b'{"step": 2, "lo\xff\xfe"}', b"\0" * 40, b"", b"[1, 2]", b"7", b'{"kind": "train"}', b'{"step": "2"}'],
    ids=["not UTF-8", "zeros", "empty", "a list", "a number", "no step", "a step that is text"],
)
def test_a_damaged_line_of_the_log_costs_that_line_alone(tmp_path, caplog, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with caplog.at_level(logging.WARNING):
        assert rows(path) == [{"step": 1}, {"step": 2}]
        MetricsLog(path, keep_until=2).close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert caplog.text.count("damaged lines are left out (1)") == 2 and rows(tmp_path / "none") == []


def test_half_a_record_is_none(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    record = json.dumps({"seed": 0, "final": {}, "best": {}})
    for text in (record[: len(record) // 2].encode(), b"", b"\xff" + record.encode(), b"null", b"{}"):
        (tmp_path / "record.json").write_bytes(text)
        assert records.read(tmp_path) is None
    (tmp_path / "record.json").write_text(record)
    assert records.read(tmp_path) == ({"seed": 0, "final": {}, "best": {}}, "seed: 0\n")
    assert caplog.text.count("is damaged and does not count") == 3


def test_rows_are_on_the_disk_before_the_checkpoint_that_counts_on_them(tmp_path, monkeypatch):
    seen = []
    sync, save = MetricsLog.sync, checkpoint.save
    monkeypatch.setattr(MetricsLog, "sync", lambda log: (seen.append("rows"), sync(log)))
    monkeypatch.setattr(checkpoint, "save", lambda path, state: (seen.append(path.name), save(path, state)))
    fit(tmp_path)
    assert seen[-2:] == ["rows", "last.pt"] and seen[0::2] == ["rows"] * (len(seen) // 2)


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    """Every bit of the zip's headers and of its table; one bit a byte of the rest, padding included."""
    path, state = tmp_path / "last.pt", {"model": {"w": torch.arange(3.0)}, "step": 7}
    checkpoint.save(path, state)
    content, expected, noticed = path.read_bytes(), checkpoint.load(path), 0
    table = content.index(b"PK\x01\x02")
    for place in range(len(content)):
        for bit in (1 << i for i in range(8) if place >= table or i == place % 8):
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            try:
                found = checkpoint.load(path)
            except CheckpointError:
                noticed += 1
            else:
                assert tiny.same(found, expected), (place, bit)
    assert noticed > len(content) / 4


ODD = {
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path.name),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["record.json", "config.yaml"])
def test_what_is_no_file_is_no_record(tmp_path, name, kind):
    """Without a writer a pipe is waited for in vain, and /dev/zero has no end."""
    (tmp_path / "record.json").write_text('{"seed": 0, "final": {}, "best": {}}')
    (tmp_path / "config.yaml").write_text("seed: 0")
    assert records.read(tmp_path) is not None
    (tmp_path / name).unlink()
    ODD[kind](tmp_path / name)
    assert records.read(tmp_path) is None


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_has_no_rows(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    ODD[kind](path)
    assert rows(path) == []
    MetricsLog(path, keep_until=3).close()
    assert path.is_file() and not path.is_symlink()


def test_what_is_nested_without_end_is_damaged(tmp_path, caplog):
    deep = "[" * 100_000
    (tmp_path / "record.json").write_text(deep)
    (tmp_path / "config.yaml").write_text("seed: 0")
    (tmp_path / "metrics.jsonl").write_text(f'{deep}\n{{"step": 1}}\n')
    assert records.read(tmp_path) is None and rows(tmp_path / "metrics.jsonl") == [{"step": 1}]
    assert "is damaged and does not count" in caplog.text


def test_a_lock_that_is_a_link_is_said_in_one_sentence(tmp_path):
    (tmp_path / "run.lock").symlink_to(tmp_path / "other")
    with pytest.raises(OSError) as caught, lock.hold(tmp_path):
        pass
    assert command.is_user_error(caught.value) and "run.lock" in command.message_of(caught.value)
    assert not (tmp_path / "other").exists()


LAUGHS = "\n".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10) if i else 'lol'}]" for i in range(12))


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", LAUGHS, "a: " + "[" * 300 + "]" * 300, "[" * 10_000])
def test_a_config_without_end_is_refused(text):
    """An alias of YAML may name what it is in, or multiply."""
    with pytest.raises(ConfigError, match=r"no run saves that|is no YAML"):
        upgrade.read(text, {})
