"""Weight normalisation without cached state, and the dropout mask of a solve."""

import copy
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from phantom import SpectralNorm, WeightNorm, check, fixed_point, variational_mask


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


@pytest.mark.parametrize("layer", [WeightNorm, SpectralNorm])
def test_needs_an_axis_to_normalise(layer):
    with pytest.raises(ValueError, match="shape"):
        layer(torch.ones(3))


def norm(weight: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().flatten(1), ord=2))


@pytest.mark.parametrize("axes", [2, 4])
def test_spectral_norm_is_the_bound(weight, axes):
    layer = SpectralNorm(weight.flatten(1) if axes == 2 else weight, bound=0.9)
    for _ in range(300):
        layer()
    assert norm(layer()) == pytest.approx(0.9, abs=1e-9)
    torch.testing.assert_close(layer() / norm(layer()), layer.weight / norm(layer.weight), rtol=1e-8, atol=0)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


def test_capped_spectral_norm_scales_down_alone(weight):
    layer = SpectralNorm(5 * weight, learned=True, capped=True)
    for _ in range(300):
        layer()
    assert norm(layer()) == pytest.approx(1.0, abs=1e-6)
    small = SpectralNorm(1e-3 * weight, learned=True, capped=True)
    assert torch.equal(small(), small.weight), "the factor is capped at one"


def test_spectral_norm_is_that_of_torch(weight):
    layer, reference = SpectralNorm(weight), torch.nn.Conv2d(4, 6, 3, dtype=torch.float64)
    reference.weight = torch.nn.Parameter(weight.clone())
    torch.nn.utils.parametrizations.spectral_norm(reference)
    theirs = reference.parametrizations.weight
    with torch.no_grad():
        theirs[0]._u.copy_(layer.u), theirs[0]._v.copy_(layer.v)
    layer.eval(), reference.eval()
    torch.testing.assert_close(layer(), reference.weight, rtol=1e-13, atol=0)
    cotangent = torch.randn_like(weight)
    (found,) = torch.autograd.grad(layer(), layer.weight, cotangent)
    (expected,) = torch.autograd.grad(reference.weight, theirs.original, cotangent)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("capped", [True, False])
def test_gradients_of_spectral_norm_against_finite_differences(weight, capped):
    layer = SpectralNorm(weight[:3, :2], bound=0.5, learned=True, capped=capped).eval()
    names = ("weight", "g")
    assert torch.autograd.gradcheck(
        lambda *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), ()),
        tuple(p.detach().clone().requires_grad_() for p in layer.parameters()),
    )


def test_a_power_step_is_taken_in_training_alone_and_not_during_the_solve():
    torch.manual_seed(0)
    layer, x = SpectralNorm(torch.randn(4, 4, dtype=torch.float64), bound=0.8), torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.add_(torch.randn(4, 4))  # so that u and v have a way to go
    before = layer.u.clone()
    weight = layer()
    once = layer.u.clone()
    solution = fixed_point(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x))
    (0.5 * layer().sum() + solution.value.sum()).backward()  # a second bind does not spoil the first one's backward
    assert not torch.equal(once, before) and not torch.equal(layer.u, once) and layer.weight.grad.isfinite().all()
    assert check(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x)) == []
    layer.eval()
    still = layer.u.clone()
    assert torch.equal(layer(), layer()) and torch.equal(layer.u, still)


def test_torch_spectral_norm_inside_a_map_is_found():
    linear = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(4, 4))
    assert any(
        "f moves what it reads" in finding for finding in check(lambda z: torch.tanh(linear(z)), torch.zeros(3, 4))
    )


def test_spectral_norm_is_copied_and_loaded_whole(weight):
    source, target = SpectralNorm(weight), SpectralNorm(torch.ones_like(weight))
    target.load_state_dict(source.state_dict())
    twin = pickle.loads(pickle.dumps(source))
    assert torch.equal(target.eval()(), source.eval()()) and torch.equal(twin.eval()(), source())
    average = AveragedModel(source, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    assert torch.equal(average.eval()(), source())


def test_a_bound_that_is_none():
    with pytest.raises(ValueError, match="bound=0 must be a number > 0: it is about the largest singular value"):
        SpectralNorm(torch.ones(3, 3), bound=0)


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
    for training in (True, False):
        with pytest.raises(ValueError, match=rf"^p={p!r} must be in \[0, 1\)"):
            draw(p=p, training=training)


def test_spectral_norm_is_near_from_its_start():
    torch.manual_seed(0)
    weight = SpectralNorm(torch.randn(6, 8, dtype=torch.float64)).eval()()
    assert torch.linalg.svdvals(weight)[0].item() == pytest.approx(1, rel=0.02)


def test_spectral_norm_of_an_averaged_model_takes_the_length_of_its_vectors_out():
    """An average of unit vectors is shorter than one, and the bound would be exceeded by as much squared."""
    torch.manual_seed(0)
    layer = SpectralNorm(torch.randn(6, 8, dtype=torch.float64), bound=0.9).eval()
    expected = layer()
    with torch.no_grad():
        layer.u.mul_(0.9)
        layer.v.mul_(0.8)
    torch.testing.assert_close(layer(), expected, rtol=1e-12, atol=1e-14)
