"""Clipping and scaling of gradients, against torch's own and by hand."""

import pytest
import torch
from torch import nn

from phantom.engine.config.instantiate import locate
from phantom.engine.errors import ConfigError
from phantom.engine.plan import optimizer_factory
from phantom.engine.training.clipping import ClipEach, ClipTotal, gradient_norm, scale_gradients
from tests.phantom.problems import DTYPE, randn

SHAPES = [(3, 4), (5,), (2, 2, 2)]


def parameters(scale: float = 1.0) -> list[nn.Parameter]:
    """Return parameters with gradients, and one that has none."""
    result = [nn.Parameter(torch.zeros(shape, dtype=DTYPE)) for shape in SHAPES]
    for i, parameter in enumerate(result):
        parameter.grad = scale * (i + 1) * randn(*parameter.shape, seed=i)
    return [*result, nn.Parameter(torch.zeros(3, dtype=DTYPE))]


def gradients(of: list[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in of if parameter.grad is not None]


def flat_norm(tensors: list[torch.Tensor]) -> float:
    return float(sum(tensor.square().sum() for tensor in tensors).sqrt())


def test_the_norm_of_all_gradients_together():
    assert float(gradient_norm(parameters())) == pytest.approx(flat_norm(gradients(parameters())), rel=1e-12)


@pytest.mark.parametrize("bound", [0.1, 1.0, 5.0])
def test_total(bound):
    mine, theirs = parameters(), parameters()
    ClipTotal(max_norm=bound).clip(mine, gradient_norm(mine))
    nn.utils.clip_grad_norm_(theirs, bound)
    for a, b in zip(gradients(mine), gradients(theirs), strict=True):
        assert torch.equal(a, b)
    assert flat_norm(gradients(mine)) == pytest.approx(bound, rel=1e-4)
    original = gradients(parameters())
    ratios = [float((a / b).mean()) for a, b in zip(gradients(mine), original, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 3)  # the direction is kept


def test_each():
    original = gradients(parameters())
    low, bound, high = sorted(float(gradient.norm()) for gradient in original)
    assert low < bound < high
    mine = parameters()
    ClipEach(max_norm=bound).clip(mine, gradient_norm(mine))
    for clipped, before in zip(gradients(mine), original, strict=True):
        torch.testing.assert_close(clipped, before * min(1.0, bound / float(before.norm())), rtol=1e-5, atol=0)


@pytest.mark.parametrize("clipping", [ClipTotal, ClipEach])
def test_small_gradients_are_left_alone(clipping):
    mine = parameters(1e-3)
    clipping(max_norm=1.0).clip(mine, gradient_norm(mine))
    for a, b in zip(gradients(mine), gradients(parameters(1e-3)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("clipping", [ClipTotal, ClipEach])
@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_bounds(clipping, bound):
    with pytest.raises(ValueError, match=r"max_norm=.* must be a number > 0; choose clipping=null"):
        clipping(max_norm=bound)


@pytest.mark.parametrize("factor", [0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=DTYPE)])
@pytest.mark.parametrize("dtype", [torch.float32, DTYPE])
def test_scaling(factor, dtype):
    weights = [nn.Parameter(torch.ones(2, dtype=dtype)), nn.Parameter(torch.ones(2, dtype=dtype))]
    weights[0].grad = torch.tensor([1.0, 3.0], dtype=dtype)
    scale_gradients(weights, factor)
    assert weights[0].grad.dtype == dtype and weights[0].grad.tolist() == [0.25, 0.75]
    assert weights[1].grad is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_target_": "torch.optim.LBFGS", "_partial_": True, "lr": 1.0}, "LBFGS.step needs a closure"),
        ({"_target_": "torch.optim.SGD", "lr": 0.1}, "its leaf needs `_partial_: true`"),
    ],
)
def test_an_optimiser_that_cannot_train_here(settings, message):
    with pytest.raises(ConfigError, match=message):
        optimizer_factory(settings)


def test_the_reason_why_a_class_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "broken_of_test.py").write_text("import no_such_package_of_test\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"broken_of_test.X cannot be imported: .*no_such_package_of_test"):
        locate("broken_of_test.X")
