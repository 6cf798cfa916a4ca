"""The Triton kernels of Broyden's two passes: right in the interpreter, and without a spill on a Hopper GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from phantom import Broyden, fixed_point
from tests.models.test_mdeq_kernels import SHARED_MEMORY, spilled

ROOT = Path(__file__).parents[2]
EPS = {"float32": 2**-23, "float64": 2**-52}


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.phantom.interpreted_broyden"]
    found = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize("dtype", EPS)
def test_the_passes_round_like_the_plain_ones(interpreted, dtype):
    assert len(interpreted[dtype]) >= 12
    for case in interpreted[dtype]:
        for plain, own in zip(*case, strict=True):
            assert own <= 5 * max(plain, EPS[dtype]) and own < 1e-4
    assert max(max(own) for _, own in interpreted[dtype]) > 0, "rounding must show, or this compares nothing"


def test_a_solve_takes_the_same_steps_to_the_same_solution(interpreted):
    for name, ((_, plain_steps), (own, steps)) in interpreted["solves"].items():
        assert own < 1e-8, name
        assert all(abs(a - b) <= max(2, b // 5) for a, b in zip(steps, plain_steps, strict=True)), name
    assert max(interpreted["solves"]["ring of one"][1][1]) > 3, "the ring must have wrapped"


def test_a_solve_takes_the_same_steps_where_its_room_grows(interpreted):
    assert interpreted["growth"] < 1e-9


def test_a_solve_in_single_precision_is_as_good(interpreted):
    plain, own = interpreted["single"]
    assert 0 < own < 5 * plain < 1e-4


def test_a_row_has_its_own_bits_whatever_its_neighbours_hold(interpreted):
    assert interpreted["rows"] is True and interpreted["rows of a solve"] is True


def test_on_a_cpu_a_sentence_says_so():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="kernels=True needs a state of numbers on a GPU, got a Tensor on cpu"):
        fixed_point(torch.cos, torch.zeros(2, 3), solver=Broyden(kernels=True))


def test_without_triton_a_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="the kernels need Triton, which torch brings"):
        Broyden(kernels=True)
    with pytest.raises(ValueError, match="kernels='yes' must be true or false"):
        Broyden(kernels="yes")


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("aligned", [True, False], ids=["D of 16", "any D"])
def test_the_kernels_compile_for_a_hopper_gpu_without_a_spill(dtype, aligned, tmp_path, monkeypatch):
    """A state of bfloat16 is packed in float32: solvers know no other dtypes than these two."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from phantom.solver import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    scalars = {"n": "i32", "width": "i32", "stride": "i64", "D": "i32", "BLOCK": "constexpr"}
    for kernel in (kernels.write_products, kernels.write_step):
        types = {name: scalars.get(name, f"*{dtype}") for name in kernel.arg_names}
        multiples = [name for name in types if types[name][0] == "*" or (aligned and name in ("stride", "D"))]
        compiled = triton.compile(
            ASTSource(
                fn=kernel,
                signature=types,
                constexprs={"BLOCK": kernels.BLOCK},
                attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples},
            ),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": kernels.NUM_WARPS},
        )
        assert compiled.metadata.shared <= SHARED_MEMORY
        assert spilled(compiled.asm["cubin"], tmp_path) == 0
        if dtype == "fp32" and aligned:
            assert "ld.global.v4" in compiled.asm["ptx"], "a thread reads 16 bytes at once"
