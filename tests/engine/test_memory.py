"""The peak of memory is that of one job, in bytes, on every system."""

import resource
import sys
from types import SimpleNamespace

import pytest
import torch

from phantom.engine.machine import memory
from phantom.engine.machine.memory import begin_peak, peak_memory

CPU = torch.device("cpu")
LARGE = 3 * 10**8


@pytest.mark.skipif(sys.platform != "linux" or not memory.CLEAR.exists(), reason="only Linux can forget a peak")
def test_a_job_does_not_have_the_peak_of_the_job_before():
    begin_peak(CPU)
    before = peak_memory(CPU)
    held = bytearray(LARGE)
    large = peak_memory(CPU)
    assert 0.9 * LARGE < large - before < 1.2 * LARGE
    del held
    assert peak_memory(CPU) == large
    begin_peak(CPU)
    assert abs(peak_memory(CPU) - before) < 0.3 * LARGE


def test_a_system_that_cannot_forget_still_measures(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "missing" / "clear_refs")
    begin_peak(CPU)
    assert peak_memory(CPU) > 10**7


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_unit_is_that_of_the_system(monkeypatch, platform, unit):
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    monkeypatch.setattr(sys, "platform", platform)
    assert peak_memory(CPU) == 5000 * unit


def test_a_gpu_forgets_its_peak(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 if calls == [device] else 0)
    gpu = torch.device("cuda", 1)
    begin_peak(gpu)
    assert peak_memory(gpu) == 7
