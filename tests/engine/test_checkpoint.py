"""Checkpoints: whole or absent, checked before they are believed, and each refusal says what to do."""

import zipfile
from collections import OrderedDict, deque
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from phantom.engine.artifacts import checkpoint, identity
from phantom.engine.errors import CheckpointError
from tests.engine import tiny

STATE = {"model": {"weight": torch.arange(6.0).reshape(2, 3)}, "step": 3, "best": {"test": {"loss": 0.5}}, "ema": None}


@pytest.fixture
def path(tmp_path):
    checkpoint.save(tmp_path / "last.pt", STATE)
    return tmp_path / "last.pt"


def test_what_was_saved_is_read_without_executing_anything(path):
    assert tiny.same(checkpoint.load(path), {"format": checkpoint.FORMAT, **STATE})
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


def test_what_numpy_made_is_written_as_plain_values(tmp_path):
    weights = nn.BatchNorm1d(2).state_dict()
    made = {
        "step": np.int64(3),
        "best": {np.str_("test"): {"loss": np.float64(0.5), "better": np.bool_(True)}},
        "ranks": [{"carries": (np.arange(4)[::-1], None)}],
        "model": weights,
    }
    checkpoint.save(tmp_path / "last.pt", made)
    found = checkpoint.load(tmp_path / "last.pt")
    carries = (torch.tensor([3, 2, 1, 0]), None)
    plain = {"step": 3, "best": {"test": {"loss": 0.5, "better": True}}, "ranks": [{"carries": carries}]}
    assert tiny.same(found, {"format": checkpoint.FORMAT, "model": weights, **plain})
    loss = found["best"]["test"]["loss"]
    assert [type(value) for value in (found["step"], loss)] == [int, float]
    assert type(found["model"]) is OrderedDict and found["model"]._metadata == weights._metadata
    assert type(made["step"]) is np.int64


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Colour.RED, "Colour"),
        (Path("a"), "PosixPath"),
        (lambda: 0, "function"),
        (range(3), "range"),
        (np.array(["a"]), "ndarray"),
        (np.longdouble(1), "longdouble"),
        (np.ma.array([1.0, 2.0], mask=[0, 1]), "MaskedArray"),
    ],
    ids=["enum", "path", "function", "range", "text", "long", "masked"],
)
def test_what_could_not_be_read_is_not_written(path, value, kind):
    with pytest.raises(CheckpointError, match=rf"last\.pt cannot be written: best\.test\.0 is a .*{kind}, and a check"):
        checkpoint.save(path, {"best": {"test": [value]}})
    assert checkpoint.load(path)["step"] == 3
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


def test_arrays_of_another_byte_order(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"h": np.arange(3).astype(">i4")})
    assert checkpoint.load(tmp_path / "last.pt")["h"].tolist() == [0, 1, 2]


def test_what_could_not_be_saved_is_told_after_the_first_step(tmp_path):
    class Remembers(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.state[self.param_groups[0]["params"][0]]["rates"] = deque([1.0])

    model = tiny.Classifier()
    run = tiny.trainer(tmp_path, unwrapped=model, optimizer=Remembers(model.parameters(), lr=0.1))
    with pytest.raises(CheckpointError, match=r"optimizer\.state\.0\.rates is a collections\.deque"):
        run.fit(resume=False)
    assert run.step == 1


def test_sets_and_sizes_are_kept_as_torch_reads_them(tmp_path):
    state = {"model": {"extra": {1, 2}, "shape": torch.Size([1]), "dtype": torch.float32, "bytes": b"1"}}
    checkpoint.save(tmp_path / "last.pt", state)
    assert checkpoint.load(tmp_path / "last.pt")["model"] == state["model"]


def test_a_file_that_torch_refuses_says_why(path):
    torch.save({"format": checkpoint.FORMAT, "step": np.float64(3)}, path)
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load(path)
    assert "(Unsupported global: GLOBAL numpy._core.multiarray.scalar was not an allowed" in str(refused.value)
    assert "\x1b" not in str(refused.value) and "Weights only" not in str(refused.value)


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("a checkpoint was executed",))


def test_code_inside_a_file_is_not_run(path):
    torch.save({"format": checkpoint.FORMAT, "model": Malicious()}, path)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("at", ["torch.save", "os.fsync", "os.replace"])
def test_a_crash_while_writing_leaves_the_old_file(path, monkeypatch, at):
    def crash(*args):
        if at == "torch.save":
            args[1].write(b"the first half")
        raise OSError("no space left on device")

    monkeypatch.setattr(f"phantom.engine.artifacts.checkpoint.{at}", crash)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {**STATE, "step": 4})
    monkeypatch.undo()
    assert checkpoint.load(path)["step"] == 3
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


def test_what_a_killed_run_left_half_written_is_replaced(path):
    path.with_suffix(".tmp").write_bytes(b"half of a checkpoint")
    checkpoint.save(path, {**STATE, "step": 4})
    assert checkpoint.load(path)["step"] == 4
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


def test_a_link_in_the_place_of_the_half_written_file_is_not_followed(path):
    """A run folder from elsewhere may have one, which leads out of it."""
    other = path.parent / "other"
    other.write_text("precious")
    path.with_suffix(".tmp").symlink_to(other)
    checkpoint.save(path, {**STATE, "step": 4})
    assert checkpoint.load(path)["step"] == 4 and not path.is_symlink() and other.read_text() == "precious"


def test_every_flipped_bit_is_noticed_or_harmless(path):
    """Whatever byte is hit: the checkpoint is refused, or it holds exactly what was written."""
    whole, before = path.read_bytes(), checkpoint.load(path)
    refused = 0
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            after = checkpoint.load(path)
        except CheckpointError as error:
            assert "damaged" in str(error) and "resume=never" in str(error)
            refused += 1
        else:
            assert tiny.same(after, before), position
    assert refused > 100


def test_a_flipped_bit_in_a_weight_is_refused(path):
    """torch alone reads such a file without complaint."""
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(STATE["model"]["weight"].numpy().tobytes()) + 6] ^= 16
    path.write_bytes(damaged)
    assert not torch.equal(torch.load(path)["model"]["weight"], STATE["model"]["weight"])
    with pytest.raises(CheckpointError, match=r"damaged and cannot be read .wrong checksum"):
        checkpoint.load(path)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file(path, keep):
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged and cannot be read .*resume=never"):
        checkpoint.load(path)


def test_random_bytes_and_foreign_archives(path):
    path.write_bytes(bytes(torch.randint(256, (5000,), generator=torch.Generator().manual_seed(0)).tolist()))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", "world")
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [{"state_dict": {}}, torch.zeros(2), {"format": "other"}])
def test_a_file_of_another_program(path, content):
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"not a checkpoint of this program.* official=<file>"):
        checkpoint.load(path)


@pytest.mark.parametrize("number", [checkpoint.FORMAT - 1, checkpoint.FORMAT + 1])
def test_another_format(path, number):
    torch.save({"format": number}, path)
    with pytest.raises(CheckpointError, match=f"has format {number} .* reads format {checkpoint.FORMAT}.*resume=never"):
        checkpoint.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint .*last\.pt: train first"):
        checkpoint.load(tmp_path / "last.pt")


def test_weights_of_another_model_are_named_and_not_loaded(path):
    model = nn.Sequential(nn.Linear(3, 2))
    before = model[0].weight.clone()
    weights = {"0.weight": torch.zeros(2, 4), "0.extra": torch.zeros(1)}
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load_weights(model, weights, path)
    for part in (
        "another model than Sequential",
        "missing here: 0.extra",
        "missing there: 0.bias",
        "0.weight: shape (2, 4) there, (2, 3) here",
    ):
        assert part in str(refused.value)
    assert torch.equal(model[0].weight, before)


def test_a_long_list_of_differences_is_cut(path):
    with pytest.raises(CheckpointError, match="and 4 more"):
        checkpoint.load_weights(nn.Identity(), {f"w{i}": torch.zeros(1) for i in range(10)}, path)


def resumed_under(folder, config: str):
    tiny.trainer(folder, config="seed: 0\nk: 5\nwandb: auto\ndata: {root: a, size: 3}\n").fit(resume=False)

    def differences(text: str) -> list[str]:
        return identity.differences(yaml.safe_load(config), yaml.safe_load(text))

    tiny.trainer(folder, config=config, differences=differences).fit(resume=True)


def test_resuming_under_another_config_names_the_keys(tmp_path):
    with pytest.raises(CheckpointError, match=r"another config \(different: data, k\).*resume=never"):
        resumed_under(tmp_path, "seed: 0\nk: 9\nwandb: auto\ndata: {root: a, size: 4}\n")


def test_resuming_elsewhere_is_allowed(tmp_path):
    resumed_under(tmp_path, "seed: 0\nk: 5\nwandb: disabled\ndata: {root: b, size: 3}\n")
