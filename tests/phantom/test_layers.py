"""Weight normalisation without cached state, and the dropout mask of a solve."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from phantom import WeightNorm, variational_mask


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(6, 4, 3, 3, dtype=torch.float64)


def test_starts_at_the_given_weight(weight):
    layer = WeightNorm(weight)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "weight_v": (6, 4, 3, 3),
        "weight_g": (6, 1, 1, 1),
    }
    torch.testing.assert_close(layer(), weight, rtol=1e-14, atol=0)
    torch.testing.assert_close(layer.weight_g.flatten(), weight.flatten(1).pow(2).sum(1).sqrt(), rtol=1e-14, atol=0)


def test_is_length_times_direction(weight):
    layer = WeightNorm(weight)
    with torch.no_grad():
        layer.weight_v.mul_(7.0)
        layer.weight_g.copy_(torch.arange(1.0, 7.0).view(6, 1, 1, 1))
    torch.testing.assert_close(layer().flatten(1).norm(dim=1), torch.arange(1.0, 7.0, dtype=torch.float64))
    torch.testing.assert_close(layer() / layer.weight_g, weight / weight.flatten(1).norm(dim=1).view(6, 1, 1, 1))


def test_gradients_against_finite_differences(weight):
    layer = WeightNorm(weight)
    names = ("weight_v", "weight_g")
    assert torch.autograd.gradcheck(
        lambda *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), ()),
        tuple(p.detach().clone().requires_grad_() for p in layer.parameters()),
    )


def test_changing_a_parameter_is_enough(weight):
    layer = WeightNorm(weight)
    before = layer()
    with torch.no_grad():
        layer.weight_g.mul_(2.0)
    torch.testing.assert_close(layer(), 2 * before)


def test_eval_right_after_load_state_dict(weight):
    source, target = WeightNorm(weight), WeightNorm(torch.ones_like(weight))
    target(), target.eval()
    target.load_state_dict(source.state_dict())
    assert list(target.state_dict()) == ["weight_v", "weight_g"]
    assert torch.equal(target(), source())


def test_deepcopy_is_independent(weight):
    layer = WeightNorm(weight)
    layer()  # a graph has been made before the copy
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(), layer())
    with torch.no_grad():
        layer.weight_v.add_(1.0)
    assert torch.equal(twin(), WeightNorm(weight)())
    assert not torch.equal(twin(), layer())


def test_moving_average_averages_the_parameters(weight):
    layer = WeightNorm(weight)
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(layer)
    with torch.no_grad():
        layer.weight_g.mul_(3.0)
    average.update_parameters(layer)
    torch.testing.assert_close(average(), 1.2 * weight)  # 0.9 + 0.1 * 3


def test_needs_an_axis_to_normalise():
    with pytest.raises(ValueError, match="shape"):
        WeightNorm(torch.ones(3))


def test_copies_the_weight_it_is_given(weight):
    layer = WeightNorm(weight)
    weight.zero_()
    assert layer().abs().min() > 0


def draw(p: float = 0.25, training: bool = True) -> torch.Tensor | None:
    return variational_mask((200, 300, 1, 1), p=p, training=training, device=torch.device("cpu"), dtype=torch.float64)


def test_mask_values_and_mean():
    torch.manual_seed(0)
    mask = draw()
    assert mask.shape == (200, 300, 1, 1)
    assert mask.dtype == torch.float64
    assert sorted(mask.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    # 60 000 draws: the mean has standard deviation sqrt(p / (1 - p) / 60000) = 0.0024
    assert mask.mean().item() == pytest.approx(1.0, abs=0.01)


def test_mask_is_drawn_anew_and_follows_the_seed():
    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


def test_no_mask_where_dropout_does_nothing():
    state = torch.get_rng_state()
    assert draw(training=False) is None
    assert draw(p=0.0) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan"), "0.1"])
def test_impossible_probability(p):
    with pytest.raises(ValueError, match="dropout"):
        draw(p=p)
    with pytest.raises(ValueError, match="dropout"):
        draw(p=p, training=False)
