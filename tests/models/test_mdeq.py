"""MDEQ: counts, the cell against a plain re-statement of its equations, purity of f, gradients, layouts, errors."""

import copy

import pytest
import torch
import torch.nn.functional as F

from models.mdeq.cell import MDEQCell, _resize
from models.mdeq.model import MDEQ
from phantom import BPTT, DEQ, NPG, UPG, Broyden, FixedPoint, Implicit, JacobianRegularizer, WeightNorm

CIFAR = dict(in_channels=3, num_classes=10, num_downsamples=0, init="normal")
OFFICIAL = {
    "tiny": dict(CIFAR, channels=(24, 24), head_channels=(8, 16), final_channels=200),
    "large": dict(CIFAR, channels=(32, 64, 128, 256), head_channels=(14, 28, 56, 112), final_channels=1680),
    "small": dict(
        in_channels=3,
        num_classes=1000,
        channels=(32, 64, 128, 256),
        head_channels=(24, 48, 96, 192),
        final_channels=2048,
        num_downsamples=2,
        init="default",
    ),
}
# the official code, measured: parameters by part, and in total
COUNTS = {
    "tiny": ([5_928, 0, 104_640, 5_856, 1_296, 7_232, 18_624, 13_400, 2_010], 158_986),
    "large": ([10_208, 1_088, 7_843_200, 784_512, 88_480, 408_660, 1_187_760, 757_680, 16_810], 11_098_398),
    "small": ([10_208, 1_088, 7_843_200, 784_512, 88_480, 965_760, 3_487_680, 1_579_008, 2_049_000], 16_808_936),
}
PARTS = [
    "stem",
    "stage0",
    "cell_blocks",
    "cell_fusion",
    "cell_post_fuse",
    "head_incre",
    "head_downsamp",
    "head_final",
    "head_classifier",
]


def make(**changes) -> MDEQ:
    """Return a small MDEQ for one-channel digits, in float64, with some of its arguments changed."""
    arguments = dict(
        in_channels=1,
        num_classes=4,
        channels=(8, 8),
        head_channels=(2, 4),
        final_channels=12,
        num_downsamples=0,
        expansion=2,
        num_groups=4,
        num_blocks=1,
        dropout=0.0,
        init="default",
        channels_last=False,
        deq=DEQ(solver=Broyden(max_steps=6, tol=None), grad=UPG(k=2, lam=0.5), confirm=False),
    )
    torch.manual_seed(0)
    return MDEQ(**(arguments | changes)).double()


def digits(batch: int = 3, size: tuple[int, int] = (8, 8), channels: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", OFFICIAL)
def test_parameter_counts_of_the_official_sizes(name):
    with torch.device("meta"):
        model = MDEQ(
            **OFFICIAL[name],
            expansion=5,
            num_groups=8,
            num_blocks=1,
            dropout=0.0,
            channels_last=False,
            deq=DEQ(solver=Broyden(max_steps=22, tol=None), grad=UPG(k=5, lam=0.5)),
        )
    parts, total = COUNTS[name]
    assert model.parameter_counts() == dict(zip(PARTS, parts, strict=True))
    assert sum(p.numel() for p in model.parameters()) == sum(parts) == total


@pytest.mark.parametrize(
    ("branches", "num_downsamples", "has_stage0", "size"),
    [(2, 0, False, 16), (2, 1, True, 8), (3, 0, True, 16), (3, 2, True, 4)],
)
def test_stem_strides_and_stage0_rule(branches, num_downsamples, has_stage0, size):
    model = make(channels=(8,) * branches, head_channels=(2,) * branches, num_downsamples=num_downsamples)
    assert (model.parameter_counts()["stage0"] > 0) == has_stage0
    _, z0 = model.bind(digits(size=(16, 16)))
    assert z0[0].shape[2:] == (size, size)
    assert [model.stem[i].stride[0] for i in (0, 3)] == [1 + (num_downsamples >= 1), 1 + (num_downsamples >= 2)]


def group_norm(x: torch.Tensor, norm: torch.nn.GroupNorm, groups: int) -> torch.Tensor:
    """Normalise every group of channels of every image, written out."""
    y = x.reshape(x.shape[0], groups, -1)
    y = (y - y.mean(2, keepdim=True)) / (y.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return y.reshape(x.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]


def effective(layer: WeightNorm) -> torch.Tensor:
    v = layer.weight_v
    return v * layer.weight_g / v.pow(2).sum((1, 2, 3), keepdim=True).sqrt()


def test_cell_is_its_equations():
    torch.manual_seed(0)
    cell = MDEQCell(channels=(8, 16, 12), expansion=2, num_groups=4, num_blocks=2, dropout=0.5).double()
    with torch.no_grad():
        for parameter in cell.parameters():  # norm affines and gains away from one and zero
            parameter.add_(0.3 * torch.randn_like(parameter))
    sizes = [(8, 12, 8), (16, 6, 4), (12, 3, 2)]
    z = tuple(torch.randn(2, *s, dtype=torch.float64) for s in sizes)
    u = (torch.randn_like(z[0]), None, torch.randn_like(z[2]))
    masks = tuple(tuple(torch.randint(0, 2, (2, s[0], 1, 1)).double() * 2 for _ in range(2)) for s in sizes)

    b = []
    for i in range(3):
        x = z[i]
        for j, block in enumerate(cell.branches[i]):
            t = F.relu(group_norm(F.conv2d(x, effective(block.conv1), padding=1), block.norm1, 4))
            t = masks[i][j] * F.conv2d(t, effective(block.conv2), padding=1)
            if j == 0 and u[i] is not None:
                t = t + u[i]
            x = group_norm(F.relu(group_norm(t, block.norm2, 4) + x), block.norm3, 4)
        b.append(x)
    expected = []
    for i in range(3):
        s = torch.zeros_like(z[i])
        for j in range(3):
            t = b[j]
            stages = list(cell.fusion[i][j].children())
            assert len(stages) == (0 if i == j else max(1, i - j))
            for n, stage in enumerate(stages):
                t = F.conv2d(t, stage.conv.weight, **({} if j > i else dict(stride=2, padding=1)))
                t = group_norm(t, stage.norm, 4)
                t = F.relu(t) if n + 1 < len(stages) else t
            s = s + t.repeat_interleave(2 ** max(0, j - i), 2).repeat_interleave(2 ** max(0, j - i), 3)
        last = cell.post_fuse[i]
        expected.append(group_norm(F.conv2d(F.relu(s), effective(last.conv)), last.norm, 2))

    for value, truth in zip(cell.bind(u, masks=masks)(z), expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)


def test_derivatives_of_the_cell_against_finite_differences():
    torch.manual_seed(0)
    cell = MDEQCell(channels=(4, 4), expansion=1, num_groups=2, num_blocks=1, dropout=0.0).double()
    names, parameters = zip(*cell.named_parameters(), strict=True)
    z = [torch.randn(1, 4, s, s, dtype=torch.float64, requires_grad=True) for s in (4, 2)]
    u = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)

    def f(z0, z1, u, *values):
        state = {f"cell.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(_Bound(cell), state, (z0, z1, u))

    inputs = (*z, u, *(p.detach().clone().requires_grad_() for p in parameters))
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)  # Jacobian regularisation differentiates twice


class _Bound(torch.nn.Module):
    def __init__(self, cell: MDEQCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, z0, z1, u):
        return self.cell.bind((u, None))((z0, z1))


def test_f_is_one_function_during_a_solve_and_another_in_the_next():
    model = make(dropout=0.5)
    f, z0 = model.bind(digits())
    z = tuple(torch.randn_like(part) for part in z0)
    first = f(z)
    f(z0)
    assert all(torch.equal(a, b) for a, b in zip(first, f(z), strict=True))
    g, _ = model.bind(digits())
    assert not any(torch.equal(a, b) for a, b in zip(first, g(z), strict=True))
    model.eval()
    f, g = model.bind(digits())[0], model.bind(digits())[0]
    assert all(torch.equal(a, b) for a, b in zip(f(z), g(z), strict=True))


def test_stem_and_effective_weights_are_computed_once_per_forward():
    model = make()
    calls = []
    for module in model.modules():
        if isinstance(module, WeightNorm):
            module.register_forward_hook(lambda *_: calls.append("weight"))
    model.cell.register_forward_hook(lambda *_: calls.append("f"))
    _, (solution,) = model(digits())
    assert calls.count("weight") == 6  # two in each block, one in each post-fuse layer
    assert calls.count("f") == solution.stats.num_evals == 7 + 2
    assert model.stem[1].num_batches_tracked == 1


@pytest.mark.parametrize(
    "grad",
    [UPG(k=2, lam=0.5), NPG(k=3, lam=0.5), Implicit(solver=Broyden(max_steps=4, tol=None)), BPTT(num_steps=2)],
    ids=lambda g: type(g).__name__,
)
def test_every_parameter_gets_a_gradient(grad):
    model = make(
        channels=(8, 8, 8),
        head_channels=(2, 2, 4),
        dropout=0.25,
        deq=DEQ(solver=Broyden(max_steps=4, tol=None), grad=grad, regularizer=JacobianRegularizer()),
    )
    logits, (solution,) = model(digits())
    (F.cross_entropy(logits, torch.tensor([0, 1, 3])) + solution.penalty).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    # a bias in front of a BatchNorm in training mode cannot matter: its gradient is zero up to rounding
    dead = {"head.downsamp.0.0.bias", "head.downsamp.1.0.bias", "head.final.0.bias"}
    assert {n for n, p in model.named_parameters() if p.grad.abs().max() < 1e-12} == dead


def test_normal_initialisation_touches_plain_convolutions_only():
    model = make(channels=(16, 32), head_channels=(16, 16), final_channels=64, init="normal")
    state = model.state_dict()
    plain = torch.cat(
        [state[f"{n}.weight"].flatten() for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    )
    assert plain.std().item() == pytest.approx(0.01, rel=0.05)
    assert plain.abs().max() > 0.03  # Gaussian, not uniform
    assert state["head.final.0.bias"].std().item() == pytest.approx(0.01, rel=0.4)
    for name, fan_in in (("conv1", 16 * 9), ("conv2", 32 * 9)):
        v = state[f"cell.branches.0.0.{name}.weight_v"]
        assert v.abs().max() <= fan_in**-0.5
        assert v.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)
        torch.testing.assert_close(state[f"cell.branches.0.0.{name}.weight_g"].flatten(), v.flatten(1).norm(dim=1))
    assert state["head.classifier.weight"].abs().max() <= 64**-0.5
    assert state["head.classifier.weight"].abs().max() > 0.1
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.BatchNorm2d)) and module.affine:
            assert (module.weight == 1).all() and (module.bias == 0).all(), name


def test_default_initialisation_is_that_of_pytorch():
    model = make(channels=(16, 32), head_channels=(16, 16), init="default")
    weight = model.stem[3].weight
    assert weight.std().item() == pytest.approx((3 * 16 * 9) ** -0.5, rel=0.05)


def test_channels_last_changes_the_layout_alone():
    plain, last = make(), make(channels_last=True)
    last.load_state_dict(plain.state_dict())
    assert last.cell.branches[0][0].conv1.weight_v.is_contiguous(memory_format=torch.channels_last)
    _, z0 = last.bind(digits())
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in z0)
    f, _ = last.bind(digits())
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in f(z0))
    a, b = plain(digits())[0], last(digits())[0]
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    a.sum().backward(), b.sum().backward()
    for (name, p), q in zip(plain.named_parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-11, msg=name)


@pytest.mark.parametrize(("size", "levels"), [((8, 8), 2), ((28, 28), 4), ((9, 7), 3), ((4, 11), 3)])
def test_any_size_that_survives_the_downsampling(size, levels):
    model = make(channels=(8,) * levels, head_channels=(2,) * levels)
    logits, (solution,) = model(digits(size=size))
    assert logits.shape == (3, 4)
    ceil = [tuple(-(-side // 2**i) for side in size) for i in range(levels)]
    assert [tuple(part.shape[2:]) for part in solution.value] == ceil


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 1, 7, 16), "at least 8x8"), ((2, 3, 16, 16), r"\(B, 1, H, W\)"), ((1, 16, 16), r"\(B, 1")],
)
def test_images_that_do_not_fit(shape, message):
    model = make(channels=(8, 8, 8), head_channels=(2, 2, 2), num_downsamples=1)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape, dtype=torch.float64))


def test_one_small_image_cannot_train_batch_norm():
    model = make(channels=(8, 8, 8), head_channels=(2, 2, 2))
    with pytest.raises(ValueError, match="one image of 4x4 pixels has one pixel in the coarsest branch"):
        model(digits(1, size=(4, 4)))
    model(digits(2, size=(4, 4)))
    model(digits(1, size=(4, 5)))
    model.eval()(digits(1, size=(4, 4)))


@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbours_in_evaluation():
    model = make(dropout=0.5).eval()
    together = model(digits(3))[0]
    alone = torch.cat([model(image[None])[0] for image in digits(3)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_copy_and_state_dict_carry_the_whole_model():
    model = make()
    model(digits())
    model.eval()
    expected = model(digits())[0]
    assert torch.equal(copy.deepcopy(model)(digits())[0], expected)
    torch.manual_seed(5)
    other = make(init="normal").eval()
    other(digits())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(digits())[0], expected)


def test_autocast_keeps_the_state_in_the_parameters_dtype():
    model = make(dropout=0.25).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, (solution,) = model(digits().float())
        loss = F.cross_entropy(logits.float(), torch.tensor([0, 1, 3]))
    loss.backward()
    assert all(part.dtype == torch.float32 for part in solution.z_star)
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_cell_is_one_graph_for_all_binds():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    model = make(dropout=0.25)
    model.cell.compile(fullgraph=True, backend=count)
    with torch.no_grad():
        for _ in range(3):
            f, z = model.bind(digits())
            z = f(f(z))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(channels=(8,), head_channels=(2,)), "at least two branches"),
        (dict(head_channels=(2,)), "one entry per branch"),
        (dict(channels=(8, 0)), r"channels\[1\]=0"),
        (dict(num_downsamples=3), "num_downsamples=3"),
        (dict(num_groups=3), "num_groups=3"),
        (dict(num_groups=1), "num_groups=1"),
        (dict(init="zeros"), "init='zeros'"),
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(num_blocks=0), "num_blocks=0"),
        (dict(num_classes=2.5), "num_classes=2.5"),
        (dict(channels_last="no"), "channels_last='no' must be true or false"),
    ],
)
def test_impossible_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_unknown_argument():
    with pytest.raises(TypeError, match="width"):
        make(width=3)


def test_converges_where_the_cell_contracts():
    model = make(channels_last=True, deq=DEQ(solver=Broyden(max_steps=60, tol=1e-10), grad=UPG(k=1, lam=1.0))).eval()
    with torch.no_grad():
        for post_fuse in model.cell.post_fuse:  # a state that varies little around a fixed bias: F contracts
            post_fuse.norm.weight.mul_(0.1)
            post_fuse.norm.bias.normal_()
        _, (solution,) = model(digits())
        f, _ = model.bind(digits())
        assert solution.stats.converged.all()
        for a, b in zip(f(solution.value), solution.value, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8)
        z = tuple(torch.zeros_like(part) for part in solution.value)
        for _ in range(200):
            z = f(z)
        for a, b in zip(z, solution.value, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_solver_setting_of_the_layer_is_used_in_evaluation():
    model = make()
    model.deq.eval_solver = FixedPoint(max_steps=2, tol=None)
    assert model(digits())[1][0].stats.num_evals == 7 + 2
    with torch.no_grad():
        assert model.eval()(digits())[1][0].stats.num_evals == 3


def test_upsampling_to_an_odd_size_takes_the_pixel_of_the_index():
    x = torch.arange(4.0).view(1, 1, 1, 4)
    assert _resize(x, torch.Size([1, 7])).flatten().tolist() == [0, 0, 1, 1, 2, 2, 3]
