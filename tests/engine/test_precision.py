"""Number formats of a run: torch's switches, and what autocast reaches."""

import pytest
import torch

from phantom.engine.machine import precision
from phantom.engine.machine.precision import autocast, set_up
from tests.engine import tiny


@pytest.fixture(autouse=True)
def switches():
    """Leave torch's global switches as they were."""
    backends = torch.backends
    kept = backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision, backends.cudnn.benchmark
    yield
    backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision, backends.cudnn.benchmark = kept
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("name", "products"), [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "tf32")])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_switches(name, products, deterministic, gpu, monkeypatch):
    """Without a GPU cuDNN keeps its switch, of which torch.export asks for another answer than "ieee"."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    before = torch.backends.cudnn.conv.fp32_precision
    set_up(name, deterministic=deterministic)
    assert torch.backends.cuda.matmul.fp32_precision == products
    assert torch.backends.cudnn.conv.fp32_precision == (products if gpu else before)
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert torch.backends.cudnn.benchmark is not deterministic


def test_an_unknown_name():
    with pytest.raises(ValueError, match="precision='fp16' is not known; choose one of fp32, tf32, bf16"):
        set_up("fp16", deterministic=False)


@pytest.mark.parametrize("name", precision.PRECISIONS)
def test_autocast_is_for_bf16_alone(name):
    layer = torch.nn.Linear(2, 2)
    with autocast(name, tiny.CPU):
        assert layer(torch.ones(1, 2)).dtype == (torch.bfloat16 if name == "bf16" else torch.float32)
    assert layer(torch.ones(1, 2)).dtype == torch.float32


class Single(tiny.Vectors):
    """The vectors in float32."""

    def __init__(self) -> None:
        super().__init__(count=60, batch_size=20)
        self.inputs = {split: inputs.float() for split, inputs in self.inputs.items()}


def test_training_under_bf16_keeps_its_states_in_float32(tmp_path):
    """Low precision changes the numbers a little; weights, momenta and the sums of the loss stay as they are."""
    losses = {}
    for name in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = tiny.Classifier().float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        run = tiny.trainer(tmp_path / name, unwrapped=model, source=Single(), optimizer=optimizer, precision=name)
        run.fit(resume=False)
        momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
        assert len(momenta) == 6 and {t.dtype for t in (*momenta, *model.parameters())} == {torch.float32}
        losses[name] = run.final["test"]["loss"]
    assert losses["bf16"] != losses["fp32"] and losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
