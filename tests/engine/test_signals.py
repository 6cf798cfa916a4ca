"""A signal ends a run at the next step, or in its evaluation, with a checkpoint that goes on to the same numbers."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from phantom.engine.artifacts import checkpoint
from phantom.engine.machine.lateness import Lateness
from phantom.engine.machine.signals import ECHO, STOPPING, Interrupted, Interruption
from phantom.engine.machine.vote import Vote
from tests.engine import tiny

ROOT = Path(__file__).resolve().parents[2]


class Signalled(tiny.Vectors):
    """Vectors that signal this process before global training step `step`, or in evaluation number `evaluation`."""

    def __init__(self, number: int, *, step: int | None = None, evaluation: int | None = None) -> None:
        super().__init__()
        self.number, self.step, self.evaluation, self.evaluations = number, step, evaluation, 0

    def send(self) -> None:
        os.kill(os.getpid(), self.number)
        time.sleep(0.1)  # a thread hears it

    def train(self, *, epoch, start, shard):
        for i, batches in enumerate(super().train(epoch=epoch, start=start, shard=shard), start):
            if epoch * self.steps(epoch) + i == self.step:
                self.send()
            yield batches

    def evaluate(self, split, *, shard):
        for i, batch in enumerate(super().evaluate(split, shard=shard)):
            if i == 1 and self.evaluations == self.evaluation:
                torch.rand(3)  # as a task that draws
                self.send()
            yield batch
        self.evaluations += 1


def fit(folder: Path, source: tiny.Vectors) -> tiny.Trainer:
    torch.manual_seed(0)
    model = tiny.Classifier(dropout=0.3, batch_norm=True)
    run = tiny.trainer(
        folder,
        unwrapped=model,
        source=source,
        task=tiny.WarmStart(),
        ema_decay=0.8,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        budget=tiny.budget(epochs=3, log_every=4),
    )
    torch.manual_seed(1)
    run.fit(resume=True)
    return run


@pytest.fixture(autouse=True)
def heard():
    """Hear SIGHUP also where nohup started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, tiny.Vectors())
    return folder


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("where", "step"),
    [({"step": 0}, 1), ({"step": 4}, 5), ({"step": 8}, 9), ({"evaluation": 0}, 3), ({"evaluation": 3}, 6)],
    ids=["first step", "in a window of rows", "last evaluation", "first evaluation", "second split"],
)
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, whole, caplog, number, where, step):
    before = [signal.getsignal(each) for each in STOPPING]
    with pytest.raises(Interrupted) as end:
        fit(tmp_path, Signalled(number, **where))
    assert end.value.code == 128 + number
    assert f"{number.name}: stopped after step {step} of 9" in caplog.text
    assert [signal.getsignal(each) for each in STOPPING] == before
    assert checkpoint.load(tmp_path / "last.pt")["step"] == step
    fit(tmp_path, tiny.Vectors())
    for name in ("last.pt", "best.pt"):
        found, expected = (checkpoint.load(folder / name) for folder in (tmp_path, whole))
        assert all(tiny.same(found[key], expected[key]) for key in expected.keys() - tiny.CLOCKED), name
    assert tiny.rows(tmp_path) == tiny.rows(whole)


@pytest.mark.parametrize(
    ("resume", "command"),
    [("auto", "; the same command goes on"), ("never", "; the same command without resume=never goes on")],
)
def test_the_sentence_names_a_command_that_goes_on(tmp_path, caplog, resume, command):
    """Under resume=never the same command would remove what was saved."""
    with pytest.raises(Interrupted):
        tiny.trainer(tmp_path, source=Signalled(signal.SIGTERM, step=1), config=f"resume: {resume}\n").fit(resume=False)
    assert f"stopped after step 2 of 6{command} from there" in caplog.text


def test_outside_the_main_thread_nothing_is_caught(tmp_path):
    errors = []

    def train():
        try:
            fit(tmp_path, tiny.Vectors())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not errors and checkpoint.load(tmp_path / "last.pt")["step"] == 9


TWICE = """
import hashlib, time
from phantom.engine.machine.signals import Interruption
with Interruption() as interruption:
    print("begun", flush=True)
    while not interruption.number:
        time.sleep(0.01)
    print("first", flush=True)
    {work}
"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize(
    "work", ["time.sleep(60)", "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"], ids=["waiting", "computing"]
)
def test_the_second_signal_ends_at_once_whatever_the_process_does(first, work):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
    code = TWICE.format(work=work)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **streams)
    try:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(first)
        assert process.stdout.readline() == "first\n"
        if first == signal.SIGTERM:  # at once, it would be the first one, sent along
            process.send_signal(signal.SIGTERM)
            time.sleep(1.5 * ECHO)
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert errors == "SIGTERM, the second signal: the run ends at once; what was saved before is kept\n"


def test_a_forked_worker_hears_nothing_and_tells_nothing():
    """A terminal signals all processes of a group; what a worker would write to the pipe is a second signal."""
    with Interruption() as interruption:
        child = os.fork()
        if child == 0:
            for number in STOPPING:
                os.kill(os.getpid(), number)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        time.sleep(0.1)
        assert interruption.number == 0


@pytest.mark.parametrize(
    ("second", "later", "echo"),
    [
        (signal.SIGHUP, 0.0, True),  # of a session that ends
        (signal.SIGHUP, 2 * ECHO, False),
        (signal.SIGTERM, 0.0, True),
        (signal.SIGTERM, 2 * ECHO, False),
        (signal.SIGINT, 0.0, False),
        (signal.SIGXCPU, 2 * ECHO, False),
    ],
)
def test_what_counts_as_a_second_signal(monkeypatch, second, later, echo):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    interruption = Interruption()
    interruption._hear(signal.SIGTERM)
    assert interruption._is_echo(second, time.monotonic() + later) is echo


def test_a_limit_on_cpu_time_is_told_every_second_and_is_one_signal(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    interruption = Interruption()
    for _ in range(3):
        interruption._hear(signal.SIGXCPU)
        monkeypatch.setattr(interruption, "_first", interruption._first - 2 * ECHO)
    assert interruption.number == signal.SIGXCPU


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert interruption.number == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_vote_passes_with_one_voice():
    vote = Vote(torch.device("cpu"))
    assert not vote.passed
    for votes in (0.0, 1.0, 3.0, 0.0):
        vote.count(torch.tensor(votes))
        assert vote.passed is (votes > 0)


def told(*updates: tuple[float, dict[int, tuple[int, int]]]) -> list[str]:
    lateness = Lateness(patience=60)
    return [sentence for now, states in updates for sentence in lateness.update(now, states)]


def test_a_rank_that_the_others_wait_for_is_named_once():
    times = range(0, 130, 5)
    (sentence,) = told(*((t, {0: (8, t), 1: (7 if t < 125 else 8, t), 2: (8, t)}) for t in times))
    assert sentence.startswith("rank 1 has not gone on from step 7 for 60 s") and "process lives" in sentence


def test_a_rank_that_is_stopped_is_named():
    (sentence,) = told(*((t, {0: (7, t), 1: (7, min(t, 20))}) for t in range(0, 200, 5)))
    assert sentence.startswith("rank 1 has not gone on from step 7 for 60 s") and "stopped" in sentence


def test_nobody_is_late_while_all_are_at_one_step():
    """As long as an evaluation or a compilation lasts."""
    assert told(*((t, {0: (7, t), 1: (7, t)}) for t in range(0, 4000, 5))) == []


def test_steps_that_take_long_make_nobody_late():
    assert told(*((t, {0: (t // 50, t), 1: ((t - 20) // 50, t)}) for t in range(0, 4000, 5))) == []
