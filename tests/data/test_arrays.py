"""Arrays in the cache folder: whole, on the disk before they have their name, or not there."""

import os

import numpy as np
import pytest

from data.arrays import load_array, save_array


def save(path, array) -> None:
    def fill(part):
        with open(part, "wb") as file:
            np.save(file, array)

    save_array(path, fill)


def test_an_array_comes_back_and_stays_a_npy_file(tmp_path):
    path, array = tmp_path / "folder" / "a.npy", np.arange(12, dtype=np.int32).reshape(3, 4)
    assert load_array(path) is None
    save(path, array)
    found = load_array(path)
    assert isinstance(found, np.memmap) and np.array_equal(found, array) and np.array_equal(np.load(path), array)


@pytest.mark.parametrize("place", [0, 100, 150, -1], ids=["its mark", "its header", "its values", "its hash"])
def test_one_byte_that_differs_is_seen(tmp_path, place):
    path = tmp_path / "a.npy"
    save(path, np.arange(12))
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert load_array(path) is None


def test_a_link_where_it_is_written_leads_nowhere(tmp_path):
    path, other = tmp_path / "a.npy", tmp_path / "other"
    other.write_text("precious")
    for name in ("a.npy", f"a.npy.{os.getpid()}.part"):
        (tmp_path / name).symlink_to(other)
    save(path, np.arange(3))
    assert other.read_text() == "precious" and np.array_equal(np.load(path), np.arange(3))


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    events, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (events.append(os.fstat(number).st_size), sync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("named"), replace(*paths)))
    save(tmp_path / "a.npy", np.arange(12))
    assert events == [(tmp_path / "a.npy").stat().st_size, "named"]
