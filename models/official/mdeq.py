"""Names of MDEQ in four public code bases.

phantom_grad (Gsunshine/phantom_grad, the paper's code), mdeq (locuslab/mdeq), deq (locuslab/deq, MDEQ-Vision) and
torchdeq (locuslab/torchdeq, deq-zoo/mdeq) share one naming scheme, with the differences that each function notes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from models.official.piece import Convert, Piece, rename

# beginning of an official name -> ours
_RULES = {
    r"downsample\.": r"stem.",
    r"fullstage\.branches\.(\d+)\.blocks\.(\d+)\.gn(\d)\.": r"cell.branches.\1.\2.norm\3.",
    r"fullstage\.branches\.(\d+)\.blocks\.(\d+)\.": r"cell.branches.\1.\2.",
    r"fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.(\d+)\.gnorm\.": r"cell.fusion.\1.\2.\3.norm.",
    r"fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.(\d+)\.conv\.": r"cell.fusion.\1.\2.\3.conv.",
    r"fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.gnorm\.": r"cell.fusion.\1.\2.0.norm.",
    r"fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.conv\.": r"cell.fusion.\1.\2.0.conv.",
    r"fullstage\.post_fuse_layers\.(\d+)\.gnorm\.": r"cell.post_fuse.\1.norm.",
    r"fullstage\.post_fuse_layers\.(\d+)\.conv\.": r"cell.post_fuse.\1.conv.",
    r"incre_modules\.(\d+)\.0\.downsample\.": r"head.incre.\1.shortcut.",
    r"incre_modules\.(\d+)\.0\.": r"head.incre.\1.",
    r"downsamp_modules\.": r"head.downsamp.",
    r"final_layer\.": r"head.final.",
    r"classifier\.": r"head.classifier.",
}


def rename_mdeq(official: str) -> str:
    """Return our name of an official parameter or buffer; a name that no rule matches stays unchanged."""
    return rename(official, _RULES)


def phantom_grad(state: dict[str, Tensor]) -> Iterator[Piece]:
    """Convert a state dict of the paper's code: `deq.func.*` repeats `fullstage.*`, and must equal it."""
    for official, tensor in state.items():
        yield Piece(official, rename_mdeq(re.sub(r"^deq\.func\.", "fullstage.", official)), tensor)


def mdeq(state: dict[str, Tensor]) -> Iterator[Piece]:
    """Convert a state dict of locuslab/mdeq: as `phantom_grad`, plus a second cell for its backward pass.

    Every forward copies the first cell into the second (`fullstage_copy.*`, `deq.func_copy.*`), which may lag one
    optimiser step behind. The converter leaves it out if its two names hold equal tensors; otherwise the loader
    reports `deq.func_copy.*` as unknown.
    """
    kept = {}
    for official, tensor in state.items():
        original = state.get(re.sub(r"^deq\.func_copy\.", "fullstage_copy.", official))
        is_copy = official.startswith(("fullstage_copy.", "deq.func_copy."))
        if not (is_copy and original is not None and torch.equal(tensor, original)):
            kept[official] = tensor
    yield from phantom_grad(kept)


def deq(state: dict[str, Tensor]) -> Iterator[Piece]:
    """Convert a state dict of locuslab/deq: no aliases; if it lacks post-fuse affines, ours become one and zero."""
    yield from phantom_grad(state)
    for official, gain in state.items():
        layer = re.fullmatch(r"(fullstage\.post_fuse_layers\.\d+)\.conv\.weight_g", official)
        if layer and f"{layer[1]}.gnorm.weight" not in state:
            for name, tensor in (("weight", torch.ones_like(gain)), ("bias", torch.zeros_like(gain))):
                yield Piece(official, rename_mdeq(f"{layer[1]}.gnorm.{name}"), tensor.flatten())


def torchdeq(state: dict[str, Tensor]) -> Iterator[Piece]:
    """Convert a state dict of torchdeq: the cell is `full_stage`, and its fusion convolutions are weight-normalised.

    Ours have plain weights: the converter yields the effective weight, which gives the same function.
    """
    for official, tensor in state.items():
        name = re.sub(r"^full_stage\.", "fullstage.", official)
        gain = state.get(official.removesuffix("v") + "g")
        if ".fuse_layers." in name and name.endswith(".weight_v") and gain is not None:
            name = name.removesuffix("_v")
            tensor = tensor * (gain / torch.linalg.vector_norm(tensor, dim=(1, 2, 3), keepdim=True))
        elif ".fuse_layers." in name and name.endswith(".weight_g"):
            continue
        yield Piece(official, rename_mdeq(name), tensor)


MDEQ_SOURCES: dict[str, Convert] = {
    "phantom_grad": phantom_grad,
    "mdeq": mdeq,
    "deq": deq,
    "torchdeq": torchdeq,
}
