"""`phantom.check` on maps with one fault each, and on sound ones; checkpointing with random numbers inside f."""

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import phantom
from phantom import BPTT, UPG, FixedPoint, fixed_point
from tests.phantom.problems import DTYPE, TanhMap, randn

Z = randn(5, 4, seed=1)
LEAF = randn(4, seed=2).requires_grad_()
CELL = TanhMap(4, seed=3)
CHAIN = torch.diag(torch.ones(4, dtype=DTYPE), 1) + torch.diag(torch.ones(4, dtype=DTYPE), -1)
NORM = nn.BatchNorm1d(4, dtype=DTYPE)
FROZEN = nn.BatchNorm1d(4, dtype=DTYPE).eval()


def in_place(z: Tensor) -> Tensor:
    z.mul_(0.5)
    return z + 1


def under_no_grad(z: Tensor) -> Tensor:
    with torch.no_grad():
        weight = LEAF * 2
    return torch.tanh(z + weight)


class Remembering:
    """The mean over all states seen so far, as attention to a growing cache: the same where z is the same."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, z: Tensor) -> Tensor:
        self.seen.append(z)
        return 0.5 * torch.stack(self.seen).mean(0)


FAULTS = {
    "writes": ([in_place], "writes its argument"),
    "relu": ([nn.ReLU(inplace=True)], "writes its argument"),
    "random": ([nn.Dropout(0.5), lambda z: z + torch.rand_like(z)], "is random"),
    "remembers": ([Remembering()], "remembers earlier calls"),
    "rows": ([lambda z: 0.2 * CHAIN @ z, lambda z: z - z.mean(0), lambda z: z.flip(0)], "couples the rows"),
    "last_row": ([lambda z: torch.cat((z[:4], z[:1] * 0.5)), lambda z: z.cumsum(0)], "couples the rows"),
    "dtype": ([lambda z: z.float()], "changes the dtype of its state from torch.float64 to torch.float32"),
    "shape": ([lambda z: z[:, :3], lambda z: z.T], "changes the shape of its state from (5, 4)"),
    "form": ([lambda z: (z,), lambda z: None], "must return the form of its argument"),
    "buffers": ([NORM, lambda z: NORM(z)], "moves what it reads, num_batches_tracked, running_mean, running_var"),
    "constant": ([lambda z: LEAF.expand(5, 4), lambda z: 0 * z + LEAF], "does not depend on z"),
    "cut_z": ([lambda z: torch.tanh(z.detach()) + LEAF], "does not lead to z"),
    "cut_leaf": ([lambda z: z.tanh() * LEAF.detach(), under_no_grad], "a tensor of shape (4,), which needs a gradient"),
    "cut_named": ([lambda z: z.tanh() * CELL.bias.data], "bias, which needs a gradient"),
    "nan": ([lambda z: z.log()], "is not finite"),
    "modes": ([lambda z: z.tanh() * (2.0 if torch.is_grad_enabled() else 1.0)], "another value with a graph"),
}
SOUND = {
    "tanh": CELL.bind(randn(5, 4, seed=4)),
    "linear": nn.Linear(4, 4, dtype=DTYPE),
    "partial": functools.partial(torch.mul, torch.tensor(0.5, dtype=DTYPE)),
    "layer_norm": nn.Sequential(nn.Linear(4, 4, dtype=DTYPE), nn.LayerNorm(4, dtype=DTYPE), nn.ReLU(inplace=True)),
    "frozen_batch_norm": FROZEN,
    "row_weights": lambda z: z * torch.arange(5, dtype=DTYPE)[:, None] * 0.1 + LEAF,
    "gradient_inside": lambda z: z - 0.1 * torch.func.grad(lambda w: (w - LEAF).square().sum() / 2)(z),
    "vmap_inside": lambda z: torch.func.vmap(lambda row: 0.5 * torch.tanh(row) + LEAF)(z),
    "solve_inside": lambda z: (
        fixed_point(
            lambda y: 0.3 * torch.tanh(y) + z + LEAF,
            z,
            solver=FixedPoint(max_steps=60, tol=1e-12),
            grad=UPG(k=2, lam=1.0),
        ).value
    ),
}


@pytest.mark.parametrize(
    ("f", "sentence"),
    [(f, sentence) for maps, sentence in FAULTS.values() for f in maps],
    ids=lambda value: value[:30] if isinstance(value, str) else "f",
)
def test_a_fault_is_told(f, sentence):
    findings = phantom.check(f, Z)
    assert any(sentence in finding for finding in findings), findings
    assert len(findings) <= 2 and all(finding.endswith(".") for finding in findings)
    with pytest.raises(ValueError, match="f"):
        fixed_point(f, Z, solver=FixedPoint(max_steps=3, tol=None), grad=UPG(k=1, lam=1.0), debug=True)


@pytest.mark.parametrize("f", SOUND.values(), ids=SOUND)
def test_a_sound_map_is_left_alone(f):
    assert phantom.check(f, Z) == []
    solver = FixedPoint(max_steps=3, tol=None)
    values = [fixed_point(f, Z, solver=solver, grad=UPG(k=1, lam=1.0), debug=debug).value for debug in (False, True)]
    assert torch.equal(*values)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_an_empty_state_has_no_fault(shape):
    assert phantom.check(torch.sin, torch.zeros(shape)) == []


def test_every_pair_of_rows_is_tried():
    z = randn(9, 2, seed=5)
    for i in range(9):
        for j in range(9):
            mix = torch.eye(9, dtype=DTYPE)
            mix[i, j] += 0.5
            assert (phantom.check(lambda z, mix=mix: 0.5 * mix @ z, z) == []) == (i == j)


def test_nothing_is_changed_by_asking():
    norm, z = nn.BatchNorm1d(4, dtype=DTYPE), Z.clone()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert phantom.check(norm, z) and phantom.check(in_place, z) and phantom.check(nn.Dropout(0.5), z)
    assert torch.equal(torch.rand(3), expected) and torch.equal(z, Z)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_a_tuple_state_is_asked_part_by_part():
    z = (Z, Z[:, :2])
    assert phantom.check(lambda z: (torch.tanh(z[0]), z[1] * 0.5 + z[0][:, :2]), z) == []
    assert "writes" in phantom.check(lambda z: (z[0] * 0.5, z[1].mul_(0.5)), z)[0]
    assert "couples" in phantom.check(lambda z: (z[0] * 0.5 + z[1].mean(), z[1] * 0.5), z)[0]
    assert "for a tuple of (a tensor (5, 4)" in phantom.check(lambda z: z[0], z)[0]
    assert "float32" in phantom.check(lambda z: (z[0], z[1].float()), z)[0]


def test_a_graph_of_nodes_is_one_problem():
    assert phantom.check(lambda z: 0.3 * CHAIN @ z, Z[None]) == []


@pytest.mark.parametrize("make", [lambda c: UPG(k=3, lam=0.5, checkpoint=c), lambda c: BPTT(num_steps=3, checkpoint=c)])
@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.AlphaDropout(0.3), lambda z: z * torch.rand_like(z)], ids=["dropout", "alpha", "rand"]
)
def test_checkpointing_draws_the_same_numbers(make, layer):
    """The gradient of the masks that forward has used: checkpointed and not, from the same seed."""
    weight = (0.3 * randn(4, 4, seed=6)).requires_grad_()
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        value = fixed_point(
            lambda z: layer(torch.tanh(z @ weight + 1)),
            Z,
            solver=FixedPoint(max_steps=4, tol=None),
            grad=make(checkpointed),
        ).value
        torch.manual_seed(7)  # backward must not draw from here
        results.append((value, *torch.autograd.grad(value.sum(), weight)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


class Pair(NamedTuple):
    h: Tensor
    c: Tensor


@pytest.mark.parametrize(
    ("f", "z"),
    [
        (lambda z: {"h": 0.5 * z["h"] + 1}, {"h": Z}),
        (lambda z: Pair(0.5 * z.h + z.c, 0.3 * z.c + 1), Pair(Z, Z)),
        (lambda z: [0.5 * z[0] + 1, (0.2 * z[1][0],)], [Z, (Z[:, :1],)]),
        (lambda z: 0.5 * z, Z[:0]),
    ],
    ids=["dict", "namedtuple", "nested", "empty"],
)
def test_every_form_of_a_state_is_checked(f, z):
    assert phantom.check(f, z) == []
    fixed_point(f, z, debug=True)


def test_another_key_is_another_form():
    assert "f returns a dict of (g: " in phantom.check(lambda z: {"g": 0.5 * z["h"]}, {"h": Z})[0]


def test_a_cell_may_put_its_value_into_the_collection_that_it_was_given():
    def f(z):
        z["h"] = 0.5 * z["h"] + 1
        return z

    assert phantom.check(f, {"h": Z}) == []


def test_autocast_may_give_its_dtype():
    layer = nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert phantom.check(layer, Z.float()) == []


def test_where_no_graph_can_be_looked_at():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of inference mode"):
        phantom.check(lambda z: 0.5 * z, Z)
    with pytest.raises(RuntimeError, match=r"and torch\.func"):
        torch.func.vmap(lambda z: fixed_point(lambda z: 0.5 * z, z[None], debug=True).value)(Z)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc], ids=str)
def test_a_map_that_reads_a_sparse_matrix(layout):
    """The adjacency matrix of one graph; the nodes are found to be one problem where they are given as many."""
    weight = torch.nn.Parameter(0.5 * torch.eye(2))
    adjacency = torch.diag(torch.ones(3), 1).to_sparse(layout=layout)
    assert phantom.check(lambda z: torch.tanh(adjacency @ z[0] @ weight + 1)[None], torch.zeros(1, 4, 2)) == []
    (finding,) = phantom.check(lambda z: torch.tanh(adjacency @ z @ weight + 1), torch.zeros(4, 2))
    assert finding.startswith("f couples the rows of z")


class Quantised(Tensor):
    """A weight of numbers that cannot be compared, as in torchao."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.equal:
            raise NotImplementedError("no equal of quantised weights")
        return super().__torch_function__(func, types, args, kwargs)


def test_a_map_that_reads_a_quantised_weight():
    weight = (0.3 * torch.eye(4, dtype=DTYPE)).as_subclass(Quantised)
    assert phantom.check(lambda z: (z @ weight).as_subclass(Tensor) + 1, Z) == []
    assert "couples the rows" in phantom.check(lambda z: (z @ weight).as_subclass(Tensor).flip(0), Z)[0]
