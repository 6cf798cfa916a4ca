"""A stdout or stderr that takes nothing more ends neither a run nor an evaluation, and loses nothing of them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phantom.engine.artifacts import checkpoint
from tests.tiny_run import TINY

ROOT = Path(__file__).resolve().parents[2]


def broken_pipe() -> int:
    """Return the end of a pipe whose reader has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def call(*arguments: str, **streams: int) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, timeout=120, **streams)


SAY = """
import logging, sys, subprocess
from phantom.engine.machine import streams
streams.prepare(); streams.prepare()
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
for i in range(2000):
    print("to stdout", i); print("to stderr", i, file=sys.stderr); logging.info("logged %d", i)
subprocess.run(["echo", "of a child"], check=True)
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("gone", [broken_pipe, full_disk])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_what_shows_goes_silent_and_the_other_stream_goes_on(gone, name):
    number, other = gone(), "stderr" if name == "stdout" else "stdout"
    done = call("-c", SAY, **{name: number, other: subprocess.PIPE})
    os.close(number)
    told = getattr(done, other).decode().splitlines()
    assert done.returncode == 0
    assert [line for line in told if line.startswith("to")] == [f"to {other} {i}" for i in range(2000)]
    assert len(told) == (2000 if other == "stderr" else 4001)


def test_a_run_and_its_evaluation_end_as_usual(tmp_path):
    gone = broken_pipe()
    run = call("train.py", *TINY, "progress=true", f"runs={tmp_path}", stdout=gone, stderr=gone)
    assert run.returncode == 0
    (record,) = tmp_path.rglob("record.json")
    assert checkpoint.load(record.parent / "last.pt")["step"] == 8
    told = call("evaluate.py", f"run={record.parent}", stdout=gone, stderr=subprocess.PIPE)
    os.close(gone)
    assert (told.returncode, told.stderr) == (0, b"")


RESULT = """
import sys
from phantom.engine.machine import streams
streams.prepare()
for i in range(20000):
    print("line", i)
streams.check_result()
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_result_that_is_lost_is_no_success():
    full = full_disk()
    done = call("-c", RESULT, stdout=full, stderr=subprocess.PIPE)
    os.close(full)
    assert done.returncode == 1
    assert done.stderr.decode() == "error: stdout could not take the whole result: No space left on device\n"
    gone = broken_pipe()
    done = call("-c", RESULT, stdout=gone, stderr=subprocess.PIPE)
    os.close(gone)
    assert (done.returncode, done.stderr) == (0, b""), "its reader wanted no more"


def test_a_slow_reader_is_waited_for():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with subprocess.Popen([sys.executable, "-c", RESULT], cwd=ROOT, stdout=writing) as process:
        os.close(writing)
        time.sleep(3)  # the pipe is full long before
        with open(reading) as pipe:
            lines = pipe.read().splitlines()
    assert process.returncode == 0 and lines == [f"line {i}" for i in range(20000)]
