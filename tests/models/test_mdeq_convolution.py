"""The forms of MDEQ's convolutions against torch's own, in float64: padded channels, one weight gradient for all."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from models.mdeq.cell import MDEQCell
from models.mdeq.convolution import Padded, Tied
from models.mdeq.model import MDEQ
from phantom import BPTT, DEQ, NPG, UPG, Broyden, FixedPoint, Implicit, JacobianRegularizer
from tests.phantom.processes import run_ranks

SOLVER = FixedPoint(max_steps=3, tol=None)
CONVOLUTIONS = 8  # of the cell, two branches: two in each block, two transitions, two post-fuse layers
# channels and expansion: MDEQ-Tiny's, three branches that differ, and what matrix units like already
CHANNELS = [((24, 24), 5), ((8, 16, 12), 2), ((16, 32), 2)]


class Convolutions(TorchDispatchMode):
    """Count convolutions by the channels of their weights, and backward calls by what gradients they compute."""

    def __init__(self):
        super().__init__()
        self.channels, self.weight_gradients, self.input_gradients, self.pads = set(), 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.channels |= set(args[1].shape[:2])
        elif func is torch.ops.aten.convolution_backward.default:
            of_x, of_weight, _ = args[-1]
            self.input_gradients += of_x
            self.weight_gradients += of_weight
        elif func is torch.ops.aten.constant_pad_nd.default:
            self.pads += 1
        return func(*args, **(kwargs or {}))


def tie(cell):
    cell._convolve_by(Tied())  # as `fuse` does, which needs Triton


def make(grad=None, *, channels=(8, 8), expansion=2, dropout=0.0, regularizer=None, channels_last=False):
    """Return a plain MDEQ in float64."""
    torch.manual_seed(0)
    return MDEQ(
        in_channels=1,
        num_classes=4,
        channels=channels,
        head_channels=(2,) * len(channels),
        final_channels=12,
        num_downsamples=0,
        expansion=expansion,
        num_groups=4,
        num_blocks=1,
        dropout=dropout,
        init="default",
        channels_last=channels_last,
        deq=DEQ(solver=SOLVER, grad=grad or UPG(k=3, lam=0.5), regularizer=regularizer, confirm=False),
    ).double()


def changed(model, form):
    """Return a copy of the model whose cell convolves in another form."""
    other = copy.deepcopy(model)
    form(other.cell)
    return other


def loss_of(model):
    torch.manual_seed(3)  # of the probes of the penalty
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits, (solution,) = model(images)
    penalty = solution.penalty if model.deq.regularizer else 0.0
    return logits.square().sum() + penalty


def gradients(model):
    model.zero_grad()
    loss_of(model).backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "expansion"), CHANNELS)
@pytest.mark.parametrize("form", [MDEQCell.pad, tie], ids=["padded", "tied"])
def test_a_form_has_the_values_and_gradients_of_the_plain_cell(form, channels, expansion, channels_last):
    plain = make(channels=channels, expansion=expansion, dropout=0.3, channels_last=channels_last)
    other = changed(plain, form)
    assert plain.state_dict().keys() == other.state_dict().keys()
    assert plain.parameter_counts() == other.parameter_counts()
    found = []
    for model in (other, plain):
        torch.manual_seed(2)  # of the dropout masks
        u = torch.randn(2, channels[0], 9, 6, dtype=torch.float64, requires_grad=True)
        z = [torch.randn(2, c, -(-9 // 2**i), -(-6 // 2**i), dtype=torch.float64) for i, c in enumerate(channels)]
        z = [t.contiguous(memory_format=model.memory_format).requires_grad_() for t in z]
        f = model.cell.bind((u, *(None for _ in channels[1:])))
        once = f(tuple(z))
        assert all(t.is_contiguous(memory_format=model.memory_format) for t in once)
        twice = f(tuple(a + 0.1 * b for a, b in zip(z, once, strict=True)))
        inputs = [u, *z, *model.cell.parameters()]
        found.append([*twice, *torch.autograd.grad(sum(t.sin().sum() for t in twice), inputs)])
    assert_equal(*found)
    assert_equal(gradients(other), gradients(plain))


def test_padded_convolutions_see_whole_blocks_and_others_are_left_alone():
    for channels, expansion, seen in [((24, 24), 5, {32, 128}), ((16, 32), 2, {16, 32, 64})]:
        model = make(channels=channels, expansion=expansion)
        model.cell.pad()
        z = tuple(torch.randn(2, c, s, s, dtype=torch.float64) for c, s in zip(channels, (8, 4), strict=True))
        with torch.no_grad(), Convolutions() as counted:
            model.cell.bind((z[0], None))(z)
        assert counted.channels == seen
        assert (counted.pads == 0) == (channels == (16, 32))
    weight = torch.randn(32, 48, 3, 3)
    assert Padded().bind(weight) is weight


@pytest.mark.parametrize("k", [1, 3])
def test_k_steps_share_one_weight_gradient(k):
    plain = make(UPG(k=k, lam=0.5))
    tied, counts = changed(plain, tie), []
    for model in (tied, plain):
        loss = loss_of(model)
        with Convolutions() as counted:
            loss.backward()
        counts.append((counted.weight_gradients, counted.input_gradients))
    outside = counts[1][0] - k * CONVOLUTIONS  # stem and head
    assert counts[0][0] == outside + CONVOLUTIONS
    assert counts[0][1] == counts[1][1], "the gradients of the inputs are those of the plain steps"
    assert_equal([p.grad for p in tied.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.parametrize(
    "grad",
    [
        UPG(k=3, lam=0.5, checkpoint=True),
        BPTT(num_steps=3),
        NPG(k=3, lam=0.5),
        Implicit(solver=Broyden(max_steps=4, tol=None)),
    ],
    ids=["UPG with checkpoint", "BPTT", "NPG", "Implicit"],
)
def test_a_shared_weight_gradient_under_every_estimator(grad):
    plain = make(grad)
    assert_equal(gradients(changed(plain, tie)), gradients(plain))


def test_a_shared_weight_gradient_under_the_penalty_that_differentiates_twice():
    plain = make(UPG(k=2, lam=0.5), regularizer=JacobianRegularizer(num_probes=2))
    assert_equal(gradients(changed(plain, tie)), gradients(plain))


@pytest.mark.parametrize("grad", [UPG(k=2, lam=0.5), BPTT(num_steps=2)], ids=["UPG", "BPTT"])
def test_second_derivatives_through_a_shared_weight_gradient(grad):
    plain = make(grad)
    assert_equal(second_derivative(changed(plain, tie)), second_derivative(plain))


def test_the_second_derivative_of_implicit_is_refused_where_weights_are_tied():
    model = changed(make(Implicit(solver=Broyden(max_steps=4, tol=None))), tie)
    with pytest.raises(RuntimeError, match="for its second derivative, Implicit evaluates f again"):
        second_derivative(model)


def second_derivative(model):
    parameters = list(model.cell.parameters())
    first = torch.autograd.grad(loss_of(model), parameters, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), parameters)


def test_derivatives_of_a_tied_convolution_against_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    tied = Tied()

    def twice(x, weight):
        bound = tied.bind(weight)
        return tied(tied(x, bound, 3).sin(), bound, 3)

    assert torch.autograd.gradcheck(twice, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(twice, (x, weight), fast_mode=True)


def test_several_backward_calls_through_one_graph():
    plain = make()
    tied = changed(plain, tie)
    found = []
    for model in (tied, plain):
        loss, parameters = loss_of(model), list(model.parameters())
        loss.backward(retain_graph=True)
        # of one weight alone, then of none of the cell's, and then of all again
        one = torch.autograd.grad(loss, model.cell.branches[1][0].conv2.weight_v, retain_graph=True)
        stem = torch.autograd.grad(loss, model.stem[0].weight, retain_graph=True)
        every = torch.autograd.grad(loss, parameters, retain_graph=True)
        loss.backward()
        found.append([*one, *stem, *every, *(p.grad for p in parameters)])
    assert_equal(*found)


@pytest.fixture
def uses():
    """Return x, a bound weight that is used twice, and the output."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    bound = Tied().bind(weight)
    return x, weight, bound, Tied()(Tied()(x, bound, 3), bound, 3)


def test_a_backward_leaves_nothing_behind(uses):
    x, weight, bound, out = uses
    torch.autograd.grad(out.sum(), x, retain_graph=True)
    assert bound.grad_fn.uses == {}, "a vjp with respect to the state never gets to the weight"
    out.sum().backward()
    assert bound.grad_fn.uses == {} and weight.grad is not None


def test_a_backward_that_failed_adds_nothing_to_the_next(uses):
    x, weight, _, out = uses
    (expected,) = torch.autograd.grad(out.sum(), weight, retain_graph=True)

    def fail(_):
        raise RuntimeError("a hook of the user's")

    handle = x.register_hook(fail)
    with pytest.raises(RuntimeError, match="a hook of the user's"):
        out.sum().backward(retain_graph=True)
    handle.remove()
    out.sum().backward()
    assert torch.equal(weight.grad, expected)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_two_ranks_share_weight_gradients(tmp_path):
    ranks = run_ranks("tests.models.tied_ranks", tmp_path)
    for found in ranks:
        assert_equal(found["tied"].values(), found["plain"].values())
        assert_equal(found["tied"].values(), ranks[0]["tied"].values())


@pytest.mark.parametrize("inside", [False, True], ids=["autocast around bind", "autocast around f alone"])
def test_a_tied_convolution_under_autocast_is_as_exact_as_the_plain_one(inside):
    plain = make().float()
    errors = []
    z = tuple(torch.randn(4, 8, s, s) for s in (8, 4))
    exact = None
    for model in (make(), plain, changed(plain, tie)):
        narrow = exact is not None
        state = tuple(t.to(model.head.classifier.weight.dtype) for t in z)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow and not inside):
            f = model.cell.bind((state[0], None))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            out = f(f(f(state)))
        sum(t.double().sin().sum() for t in out).backward()
        found = torch.cat([p.grad.double().flatten() for p in model.cell.parameters()])
        exact = found if exact is None else exact
        errors.append(((found - exact).norm() / exact.norm()).item())
    assert 1e-4 < errors[2] < 1.2 * errors[1]


@pytest.mark.parametrize("form", [MDEQCell.pad, pytest.param(tie, marks=pytest.mark.slow)], ids=["padded", "tied"])
def test_a_form_compiles_to_one_graph_and_keeps_its_gradients(form):
    plain = make(UPG(k=2, lam=0.5))
    other = changed(plain, form)
    other.cell.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    assert_equal(gradients(other), gradients(plain))
