"""The two forms of a state: packing is exact, keeps the layout, and names what does not fit."""

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from phantom import UPG, Broyden, FixedPoint, Implicit, fixed_point
from phantom.state import Packing

PARTS = (torch.arange(24.0).reshape(2, 3, 2, 2), torch.arange(10.0).reshape(2, 5), torch.tensor([7.0, 8.0]))


@dataclass
class Pair:
    a: Tensor
    b: Tensor


class Known(Pair):
    """A pair that torch can take apart."""


class Keyed(UserDict):
    """A mapping that is no dict, as the ones of other libraries are."""


torch.export.register_dataclass(Known)
pytree.register_pytree_node(
    Keyed, lambda z: ([*z.values()], [*z]), lambda parts, keys: Keyed(zip(keys, parts, strict=True))
)
KEYED = Keyed(a=torch.zeros(2, 3), b=torch.zeros(2, 3))


def test_dataclasses_and_mappings_are_states():
    start, grad = torch.zeros(2, 3), Implicit(solver=FixedPoint(tol=1e-6))
    x = torch.ones(2, 3, requires_grad=True)
    pair = fixed_point(lambda z: Known(0.5 * z.b, 0.5 * z.a + x), Known(start, start), grad=grad).value
    keyed = fixed_point(lambda z: Keyed(a=0.5 * z["b"], b=0.5 * z["a"] + x), KEYED, grad=grad).value
    for a, b in ((pair.a, pair.b), (keyed["a"], keyed["b"])):  # b = b / 4 + x and a = b / 2
        torch.testing.assert_close(a, 2 / 3 * x, rtol=1e-3, atol=0)
        torch.testing.assert_close(b, 4 / 3 * x, rtol=1e-3, atol=0)
        torch.testing.assert_close(torch.autograd.grad((a + b).sum(), x)[0], 2 * torch.ones(2, 3))


@pytest.mark.parametrize("z", [PARTS[0], PARTS[1], PARTS[2], PARTS, PARTS[:1]], ids=["4d", "2d", "1d", "tuple", "one"])
def test_packing_is_reversible(z):
    packing = Packing(z)
    flat = packing.pack(z)
    assert flat.shape == (2, sum(part[0].numel() for part in (z if isinstance(z, tuple) else (z,))))
    back = packing.unpack(flat)
    assert type(back) is type(z)
    for a, b in zip(back, z, strict=True):
        assert torch.equal(a, b)


def test_rows_are_problems():
    flat = Packing(PARTS).pack(PARTS)
    for i in range(2):
        assert torch.equal(flat[i], torch.cat([part[i].flatten() for part in PARTS]))


@pytest.mark.parametrize("alone", [True, False])
def test_channels_last_is_kept_without_a_copy(alone):
    part = torch.randn(3, 4, 5, 2).contiguous(memory_format=torch.channels_last)
    z = part if alone else (part, torch.randn(3, 6))
    packing = Packing(z)
    flat = packing.pack(z)
    back = packing.unpack(flat)
    first = back if alone else back[0]
    assert torch.equal(first, part)
    assert first[0].stride() == part[0].stride()
    assert first.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr(), "unpacking is a view"
    if alone:
        assert flat.data_ptr() == part.data_ptr(), "packing is a view"
    # what was unpacked packs in the same layout again: a solution may be the next guess
    assert torch.equal(Packing(back).pack(back), flat)
    # f may answer in another layout than it was asked in
    other = part.contiguous() if alone else (part.contiguous(), z[1])
    assert torch.equal(packing.pack(other), flat)


def test_f_sees_slices_in_a_solve_and_dense_parts_with_a_graph():
    z = (torch.randn(3, 4, 5, 2).contiguous(memory_format=torch.channels_last), torch.randn(3, 6))
    packing, seen = Packing(z), []
    flat_f = packing.wrap(lambda parts: seen.append(parts) or parts)
    flat = packing.pack(z).requires_grad_()
    with torch.no_grad():
        flat_f(flat)
    value = flat_f(flat)
    solve, graph = seen
    home = flat.untyped_storage().data_ptr()
    assert all(part.untyped_storage().data_ptr() == home for part in solve)
    assert graph[0].is_contiguous(memory_format=torch.channels_last) and graph[1].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(graph, z, strict=True))
    weights = torch.randn_like(flat)
    assert torch.equal(torch.autograd.grad(value, flat, weights)[0], weights)


@pytest.mark.parametrize(
    ("dtype", "solver_dtype"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_solver_precision(dtype, solver_dtype):
    z = torch.ones(2, 3, dtype=dtype)
    packing = Packing(z)
    assert packing.pack(z).dtype == solver_dtype and packing.unpack(packing.pack(z)).dtype == dtype


def test_packing_carries_the_graph():
    z = tuple(part.clone().requires_grad_() for part in PARTS)
    packing = Packing(z)
    weights = torch.arange(36.0).reshape(2, 18)
    gradients = torch.autograd.grad(packing.pack(packing.unpack(packing.pack(z))), z, weights)
    for gradient, expected in zip(gradients, packing.unpack(weights), strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("f", [lambda z: (0.5 * z).to(torch.complex64), lambda z: z.long()], ids=["complex", "integer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_that_leaves_the_real_numbers(f, dtype):
    with pytest.raises(TypeError, match="f must return floating-point numbers, got a tensor"):
        fixed_point(f, torch.zeros(2, 3, dtype=dtype))


def test_complex_numbers_are_pairs_of_real_ones():
    """z = a z + 1 has the solution 1 / (1 - a), and d z / d a is its square."""
    a = torch.tensor([0.3 + 0.4j, -0.5j], dtype=torch.complex128, requires_grad=True)

    def f(z):
        return torch.view_as_real(a * torch.view_as_complex(z) + 1)

    z0 = torch.view_as_real(torch.zeros_like(a).detach())
    value = torch.view_as_complex(fixed_point(f, z0, solver=Broyden(tol=1e-13), grad=Implicit()).value)
    torch.testing.assert_close(value, 1 / (1 - a), rtol=1e-11, atol=1e-11)
    value.real.sum().backward()
    torch.testing.assert_close(a.grad, (1 / (1 - a.detach()) ** 2).conj(), rtol=1e-5, atol=1e-6)


def test_an_empty_batch_is_solved():
    solution = fixed_point(
        lambda z: 0.5 * z, torch.zeros(0, 4), solver=FixedPoint(max_steps=3, tol=None), grad=UPG(k=1, lam=0.5)
    )
    assert solution.value.shape == (0, 4)


@pytest.mark.parametrize(
    ("z0", "error", "message"),
    [
        ([torch.zeros(2, 3), 1.0], TypeError, "got a list of (a tensor (2, 3) of torch.float32, float)"),
        (
            {"h": torch.zeros(2, 3), "c": None},
            TypeError,
            "got a dict of (h: a tensor (2, 3) of torch.float32, c: NoneType)",
        ),
        (torch.zeros(2, 3, dtype=torch.long), TypeError, "got a tensor (2, 3) of torch.int64"),
        (None, TypeError, "got NoneType"),
        ((), TypeError, "non-empty tuple"),
        (
            Pair(torch.zeros(2, 3), torch.zeros(2, 1)),
            TypeError,
            "dataclasses that torch.export.register_dataclass knows",
        ),
        (torch.zeros(2, 3, dtype=torch.complex64), TypeError, "pass z0=torch.view_as_real(z0)"),
        (torch.zeros(()), ValueError, "leading axis B, got shapes [()]: parts of one problem without such an axis get"),
        ((torch.zeros(2, 3), torch.zeros(3, 3)), ValueError, "got shapes [(2, 3), (3, 3)]"),
        ((torch.zeros(2, 3), torch.zeros(2, 3).double()), ValueError, "share dtype and device"),
    ],
)
def test_a_guess_that_is_no_state(z0, error, message):
    with pytest.raises(error) as caught:
        Packing(z0)
    assert message in str(caught.value)


def test_a_sharded_guess():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        with pytest.raises(TypeError, match=r"DTensor: solve the local part of every rank, z0\.to_local\(\)"):
            Packing(torch.distributed.tensor.zeros(2, 3, device_mesh=mesh))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("f", "z0", "message"),
    [
        (lambda z: z[:, :2], torch.zeros(2, 3), "a tensor (2, 3), got a tensor (2, 2)"),
        (lambda z: (z,), torch.zeros(2, 3), "a tensor (2, 3), got a tuple of (a tensor (2, 3)"),
        (lambda z: list(z), (torch.zeros(2, 3),), "a tuple of tensors (2, 3), got a list of"),
        (lambda z: None, torch.zeros(2, 3), "got NoneType"),
        (lambda z: z.numpy(), torch.zeros(2, 3), "got ndarray"),
        (lambda z: {"a": z["a"], "b": z["b"]}, {"b": torch.zeros(2, 3), "a": torch.zeros(2, 3)}, "keys b, a in order"),
        (lambda z: Keyed(b=z["b"], a=z["a"]), KEYED, "keys a, b in order, got a Keyed of (b: a tensor (2, 3) of"),
        (lambda z: z[::-1], (torch.zeros(2, 3), torch.zeros(2, 4)), "(2, 3), (2, 4), got a tuple of (a tensor (2, 4)"),
    ],
)
def test_a_map_that_returns_another_form(f, z0: Tensor, message):
    with pytest.raises(ValueError) as caught:
        fixed_point(f, z0, solver=FixedPoint(max_steps=1, tol=None), grad=UPG(k=1, lam=0.5))
    assert "f must return the form of z0" in str(caught.value) and message in str(caught.value)
