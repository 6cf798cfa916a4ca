"""The Triton kernels of MDEQ's residual block: right in the interpreter, and small enough for a Hopper GPU."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.utils._triton

from models.mdeq.cell import MDEQCell

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SHARED_MEMORY = 227 * 1024  # bytes that a program may have on a Hopper GPU
CHANNELS, INNER, GROUPS, PIXELS = 24, 120, 8, 1024  # the finest branch of MDEQ-Tiny


@pytest.fixture(scope="module")
def interpreted():
    command = [sys.executable, "-m", "tests.models.interpreted_kernels"]
    found = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_the_fused_block_rounds_like_the_plain_one(interpreted):
    assert len(interpreted["blocks"]) >= 6
    for plain, fused in [*interpreted["blocks"], interpreted["cell"]]:
        assert 0 < fused < 1e-4
        assert fused < 5 * plain


def test_a_solve_uses_the_kernels(interpreted):
    """Its states are parts of a solver's own, whose images lie apart."""
    calls, plain, fused = interpreted["solve"]
    assert calls == 2 * 5, "a residual block per branch and evaluation"
    assert plain != fused and fused < 5 * plain


@pytest.mark.parametrize(("channels", "item"), [(64, 4), (128, 2)])
def test_what_does_not_fit_a_program_is_left_to_the_plain_block(channels, item, monkeypatch):
    from models.mdeq import kernels

    monkeypatch.setattr(kernels, "INTERPRETED", True)
    dtype = {4: torch.float32, 2: torch.bfloat16}[item]
    z = torch.zeros(2, channels, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weights = kernels.packed(*(torch.zeros(channels, channels, 3, 3, dtype=dtype) for _ in range(2)))
    assert not kernels.fits(z, weights, 4)
    small = z[..., :8]
    assert not kernels.fits(small, weights, 4), "the rows of an image lie apart"
    assert kernels.fits(small.contiguous(memory_format=torch.channels_last), weights, 4)
    assert not kernels.fits(z[:0], weights, 4)


def test_an_evaluation_with_a_graph_is_the_plain_one(interpreted):
    assert interpreted["graph"] is True


def test_without_triton_a_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    cell = MDEQCell(channels=(8, 16), expansion=2, num_groups=4, num_blocks=1, dropout=0.0)
    with pytest.raises(ValueError, match="the kernels need Triton"):
        cell.fuse()


def test_a_cell_with_kernels_is_one_graph_where_f_is_compiled(monkeypatch):
    from models.mdeq import kernels

    # torch's compiler looks for a GPU before it knows a kernel
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda **asked: True)
    monkeypatch.setattr(kernels, "fits", lambda *_: True)
    cell = MDEQCell(channels=(8, 16), expansion=2, num_groups=4, num_blocks=1, dropout=0.0)
    cell.fuse()
    names = []

    def record(graph, _):
        names.extend(node.name for node in graph.graph.nodes)
        return lambda *_: ()  # there is nothing to run the kernels on

    cell.compile(fullgraph=True, backend=record)
    z = tuple(torch.randn(2, c, s, s) for c, s in ((8, 6), (16, 3)))
    with torch.no_grad(), suppress(IndexError):
        cell.bind((z[0], None))(z)
    assert sum(name.startswith("triton_kernel_wrapper") for name in names) == 2 * len(cell.channels)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernels_compile_for_a_hopper_gpu_spilling_little(dtype, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.mdeq import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    common = {
        "C": CHANNELS,
        "I": INNER,
        "BLOCK_C": kernels.block_of(CHANNELS),
        "PIXELS": PIXELS,
        "PRECISION": "tf32",
    }
    first = common | {"GROUP": INNER // GROUPS, "BLOCK_O": kernels.block_of(INNER // GROUPS)}
    second = common | {"GROUP": CHANNELS // GROUPS, "BLOCK_I": kernels.BLOCK_I, "HAS_MASK": True, "HAS_U": True}
    for kernel, constants in ((kernels.conv_norm_relu, first), (kernels.conv_norm_add_norm, second)):
        names = kernel.arg_names
        types = {name: "constexpr" if name in constants else type_of(name, dtype) for name in names}
        # at run time Triton sees that memory begins at a multiple of 16 bytes, and that the state has as many numbers
        even = [i for i, name in enumerate(names) if types[name].startswith("*") or name == "stride"]
        aligned = {(i,): [["tt.divisibility", 16]] for i in even}
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": kernels.NUM_WARPS, "num_stages": kernels.NUM_STAGES},
        )
        asked = kernels.shared_memory(CHANNELS, INNER // GROUPS, PIXELS, 2 if dtype == "bf16" else 4)
        assert compiled.metadata.shared <= asked <= SHARED_MEMORY == kernels.MAX_ROOM
        assert "wgmma" in compiled.asm["ptx"], "the products do not use Hopper's matrix units"
        assert spilled(compiled.asm["cubin"], tmp_path) <= (64 if dtype == "bf16" else 768)


def type_of(name, dtype):
    scalars = {"stride": "i32", "H": "i32", "W": "i32", "eps": "fp32"}
    affine = name.startswith(("gamma", "beta"))
    return scalars.get(name) or ("*fp32" if affine else f"*{dtype}")


def spilled(binary, folder):
    """Return the bytes of stack that a thread needs, which is where registers are spilled to."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))
